"""The demo model behind the whole system: real router, real engines, many clients, signals."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.demo_model import GOLDEN, demo_model
from tests.serving import Server, serve, wait_for

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m"
_GOLDEN = json.loads((GOLDEN / "smollm2/greedy.json").read_text())
_ITEMS: list[dict[str, Any]] = [item for item in _GOLDEN["items"] if "messages" in item]


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    """Two replicas of the demo model."""
    demo_model()
    with serve("--models", MODEL, "--gpus", "cpu,cpu", "--kv-memory", "500M") as running:
        yield running


def chat(item: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": item["messages"], "temperature": 0, **fields}


def text_of_stream(lines: list[str]) -> str:
    """The joined deltas; the stream must have ended in order."""
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1] if line.startswith("data: ")]
    choices = [event["choices"][0] for event in events]
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def ask(client: httpx.AsyncClient, body: dict[str, Any], patience_s: float) -> str | None:
    """One answer, streamed or not as `body` says; None if the client hung up before its end."""
    try:
        async with (
            asyncio.timeout(patience_s),
            client.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            if not body["stream"]:
                whole = json.loads(await answer.aread())
                assert answer.status_code == 200, whole
                text: str = whole["choices"][0]["message"]["content"]
                return text
            return text_of_stream([line async for line in answer.aiter_lines() if line])
    except TimeoutError:
        return None


async def until(server: Server, condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_for, condition, 30, server)


def test_golden_texts_over_http(pair: Server) -> None:
    for item in _ITEMS[:6]:
        got = httpx.post(
            f"{pair.url}/v1/chat/completions", json=chat(item, max_tokens=32), timeout=60
        )
        text = got.json()["choices"][0]["message"]["content"]
        wanted = item["text_float32"]
        assert text.startswith(wanted) if item["eos_at"] is None else text == wanted


async def test_two_hundred_mixed_requests_with_a_third_dropped(pair: Server) -> None:
    """What is finished equals the same request alone; nothing leaks; both replicas work."""
    rnd = random.Random(7)
    kinds = [
        chat(item, max_tokens=rnd.randint(4, 24), seed=i, temperature=rnd.choice([0, 0, 0.7]))
        for i, item in enumerate(_ITEMS)
    ]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=pair.url, timeout=120, limits=limits) as client:
        alone = [await ask(client, {**kind, "stream": False}, 120) for kind in kinds]
        jobs = iter(
            [(rnd.randrange(len(kinds)), rnd.random() < 0.5, rnd.random()) for _ in range(200)]
        )
        dropped = 0

        async def worker() -> None:
            nonlocal dropped
            for kind, stream, fate in jobs:
                patience_s = fate * 3 if fate < 1 / 3 else 120
                text = await ask(client, {**kinds[kind], "stream": stream}, patience_s)
                dropped += text is None
                assert text is None or text == alone[kind], kinds[kind]

        await asyncio.gather(*(worker() for _ in range(16)))
        metrics = (await client.get("/metrics")).text
    assert 20 < dropped < 100
    wait_for(lambda: pair.metric("router_requests_running") == 0, 60, pair)
    wait_for(lambda: pair.metric("router_kv_blocks_held") == 0, 60, pair)
    assert pair.metric("router_kv_blocks_leaked") == 0
    steps = re.findall(r"^router_engine_steps_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert len(steps) == 2
    assert all(float(count) > 20 for count in steps)


def test_engines_share_the_cores(pair: Server) -> None:
    assert all(engine.environ()["OMP_NUM_THREADS"] for engine in pair.engines())


async def test_sigterm_under_load_lets_streams_end() -> None:
    demo_model()
    with serve("--models", MODEL, "--kv-memory", "300M", clean=False) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            bodies = [chat(item, max_tokens=24, stream=True) for item in _ITEMS[:6]]
            asked = [asyncio.create_task(ask(client, body, 120)) for body in bodies]
            await until(server, lambda: server.metric("router_requests_running") == 6)
            server.process.send_signal(signal.SIGTERM)
            texts = await asyncio.gather(*asked)
        assert all(text for text in texts)
        assert server.wait_end() == 0


async def test_kill_9_of_the_router_in_the_middle_of_a_long_prompt() -> None:
    demo_model()
    with serve("--models", MODEL, "--kv-memory", "500M", clean=False) as server:
        engines = server.engines()
        prompt = list(range(1000, 5000))
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 4}
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            asked = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(server, lambda: server.metric("router_requests_running") == 1)
            server.process.kill()
            with pytest.raises(httpx.TransportError):
                await asked
        server.process.wait()
        server.assert_nothing_left(1.0)
        assert engines
