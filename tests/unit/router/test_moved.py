"""R2: on every generating route, an engine's death at any token changes nothing of the answer.

The death is placed before each token of the answer in turn; the engines follow a script. How real
engines take a sequence up again is the affair of tests/unit/engine/test_continuation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.router_parts import MODEL, Answer, Play, call, router_parts
from tools.tiny_model import encode_text, write_tiny_model

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
USER = [{"role": "user", "content": "hi"}]
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"

# name: route, body, what the engine generates
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": (COMPLETE, {"prompt": "hi"}, "ab é😊"),
    "stop": (COMPLETE, {"prompt": "hi", "stop": ["cd"]}, "abcabcde"),
    "echo": (COMPLETE, {"prompt": "hi there", "echo": True, "logprobs": 2}, "abc"),
    "n": (COMPLETE, {"prompt": "hi", "n": 2, "seed": 3, "logprobs": 1}, "abc"),
    "prompts": (COMPLETE, {"prompt": ["hi", "ho"]}, "abc"),
    "length": (COMPLETE, {"prompt": "hi", "max_tokens": 4}, "abcdef"),
    "chat": (CHAT, {"logprobs": True, "top_logprobs": 2}, "é😊x"),
    "tools": (CHAT, {"tools": TOOLS}, f"ok {CALL}"),
    "required": (CHAT, {"tools": TOOLS, "tool_choice": "required"}, CALL),
    "json": (CHAT, {"response_format": {"type": "json_object"}}, '{"a": [1, 2]}'),
    "ids": (CHAT, {"return_token_ids": True, "n": 2}, "abc"),
    "responses": ("/v1/responses", {"input": "hi"}, "ab é"),
    "messages": ("/v1/messages", {"stop_sequences": ["cd"]}, "abcabcde"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def body_of(route: str, fields: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {"model": MODEL, **fields}
    if route in (CHAT, "/v1/messages"):
        body["messages"] = USER
    body.setdefault("max_output_tokens" if route == "/v1/responses" else "max_tokens", 400)
    return body


def plain(answer: Answer) -> str:
    """Without ids and times, which are random."""
    text = answer.body.decode()
    text = re.sub(r'"(id|item_id|call_id)":"[^"]*"', r'"\1":""', text)
    return re.sub(r'"(created|created_at|completed_at)":[0-9.]+', r'"\1":0', text)


def joined(answer: Answer) -> Any:
    """A stream of any route: what its chunks add up to, however they were cut."""
    told: dict[str, Any] = {}
    for line in plain(answer).splitlines():
        if line.startswith("data: {"):
            _add(told, "", json.loads(line.removeprefix("data: ")))
    return told


def _add(told: dict[str, Any], path: str, value: Any) -> None:
    if isinstance(value, dict):
        number = f"{value['index']}" if isinstance(value.get("index"), int) else ""
        kind = value["type"] if isinstance(value.get("type"), str) else ""
        for key, inner in value.items():
            if key not in ("index", "sequence_number", "type"):
                _add(told, f"{path}/{key}{number}{kind}", inner)
    elif isinstance(value, list):
        for inner in value:
            _add(told, path, inner)
    elif isinstance(value, str) and path.count("/") > 1:
        told[path] = told.get(path, "") + value
    elif value is not None:
        told.setdefault(path, []).append(value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_r2_a_death_before_any_token(folder: Path, kind: str, stream: bool) -> None:
    route, fields, text = KINDS[kind]
    tokens = [[token] for token in encode_text(text)]
    dies_at, deaths = -1, 0

    def plays(_prompt: str) -> Play:
        return Play(tokens, dies_at=dies_at)

    read: Callable[[Answer], Any] = joined if stream else plain
    body = {**body_of(route, fields), **({"stream": True} if stream else {})}
    async with router_parts(folder, plays, replicas=2) as router:
        calm = await call(router.app, "POST", route, body)
        assert calm.status == 200, calm.body
        for dies_at in range(len(tokens)):
            router.engines.deaths.clear()
            answer = await call(router.app, "POST", route, body)
            assert answer.status == 200
            assert read(answer) == read(calm), dies_at
            deaths += len(router.engines.deaths)
        assert deaths > 1
        rendered = router.metrics.render().decode()
    assert 'router_requests_migrated_total{reason="engine_died"}' in rendered
