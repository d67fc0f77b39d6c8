"""R1 and R2 with real engines on a tiny model: every kind of request at once, engines killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from typing import Any

import httpx
import pytest

from tests.router_process import Start, tiny_model, until

pytestmark = pytest.mark.slow

LIMIT_S = 120.0  # against hangs
ROUNDS = 3  # of all kinds at once, one kill in each
SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string"}, "minItems": 30}},
    "required": ["names"],
    "additionalProperties": False,
}
ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "minLength": 200, "maxLength": 220}},
    "required": ["street"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "find", "parameters": ADDRESS}}]
USER = [{"role": "user", "content": "Once upon a time"}]
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
LONG = {"max_tokens": 400, "ignore_eos": True, "prompt": "Once"}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETE, {**LONG, "temperature": 0}),
    "seeded": (COMPLETE, {**LONG, "seed": 1}),
    "streamed": (COMPLETE, {**LONG, "seed": 2, "stream": True}),
    "n": (COMPLETE, {**LONG, "seed": 3, "n": 2}),
    "best": (COMPLETE, {**LONG, "seed": 4, "best_of": 2}),
    "stop": (COMPLETE, {**LONG, "seed": 5, "stop": ["xyz", "??", "é"]}),
    "penalties": (
        COMPLETE,
        {**LONG, "seed": 6, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    ),
    "least": (COMPLETE, {"prompt": "Once", "max_tokens": 400, "min_tokens": 350, "seed": 7}),
    "echo": (COMPLETE, {**LONG, "seed": 8, "echo": True}),
    "json": (CHAT, {"messages": USER, "seed": 9, "max_tokens": 400, "response_format": FORM}),
    "tools": (
        CHAT,
        {
            "messages": USER,
            "seed": 1,
            "max_tokens": 400,
            "tools": TOOLS,
            "tool_choice": "required",
        },
    ),
    "responses": ("/v1/responses", {"input": "Once", "temperature": 0, "max_output_tokens": 400}),
    "messages": ("/v1/messages", {"messages": USER, "temperature": 0, "max_tokens": 400}),
    "embeddings": ("/v1/embeddings", {"input": [f"text {i} " * 9 for i in range(40)]}),
}


NUMBER = re.compile(r"-?\d+\.\d+(e-\d+)?")  # of a vector


def numbers(text: str) -> list[float]:
    return [float(found[0]) for found in NUMBER.finditer(text)]


def plain(text: str) -> str:
    """Without what is random: ids and times.

    A stream becomes the text that its chunks add up to, with its ends and its usage.
    """
    if text.endswith("data: [DONE]\n\n"):
        said = "".join(re.findall(r'"text":"((?:[^"\\]|\\.)*)"', text))
        ends = re.findall(r'"finish_reason":"\w+"|"usage":{.*?}|\[DONE\]', text)
        return f"{said} {ends}"
    text = re.sub(r'"(id|item_id|call_id)":"[^"]*"', r'"\1":""', text)
    text = re.sub(r'"(created|created_at|completed_at)":[0-9.]+', r'"\1":0', text)
    text = re.sub(r'"(cached_tokens|cache_read_input_tokens)":\d+', r'"\1":0', text)
    return text


async def test_r1_r2_every_kind_of_request_over_kills(start: Start, tmp_path: Any) -> None:
    models = ("--models", f"tiny={tiny_model(tmp_path)}", "--max-len", "1024")
    router = start(*models, gpus="cpu,cpu")
    url = await asyncio.to_thread(lambda: router.url)

    async def ask(http: httpx.AsyncClient, kind: str) -> str:
        route, fields = KINDS[kind]
        answer = await http.post(route, json={"model": "tiny", **fields})
        assert answer.status_code == 200, (kind, answer.text)
        return plain(answer.text)

    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S, trust_env=False) as http:
        undisturbed = {kind: await ask(http, kind) for kind in KINDS}
        for number in range(ROUNDS):
            async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
                running = {kind: group.create_task(ask(http, kind)) for kind in KINDS}
                await asyncio.sleep(0.2 + 0.2 * number)
                os.kill(router.engine_pid(number % 2), signal.SIGKILL)
            for kind, task in running.items():
                got, wanted = task.result(), undisturbed[kind]
                assert NUMBER.sub("#", got) == NUMBER.sub("#", wanted), kind
                assert numbers(got) == pytest.approx(numbers(wanted), abs=1e-4)
            await until(lambda n=number: len(router.events("engine_ready")) > 2 + n, LIMIT_S)  # type: ignore[misc]
        metrics = (await http.get("/metrics")).text
    moved = re.search(r'requests_migrated_total\{reason="engine_died"\} (\d+)', metrics)
    assert moved is not None
    assert int(moved[1]) >= ROUNDS
    assert len(router.events("engine_died")) == ROUNDS
