"""Reports of what clients did to a server, or a server to its clients, in small.

Pauses are printed, and bounded against hangs only: the machine may be slow and busy.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from router.acceptor import bind
from router.api.turns import Turns
from router.text.template import ChatTemplate
from tests.router_parts import MODEL, Answer, Play, Router, call, router_parts, text_play
from tests.router_process import RouterProcess, Start
from tests.serving import wait_for

HANG_S = 30.0  # far more than anything here takes
NUM_STREAMS = 8
NUM_SAME_IDS = 50
HEADERS = {"content-type": "application/json"}


# -- A9: a huge prompt


class Gaps:
    """The longest pause between two events of a stream, and whether it ended as it should."""

    def __init__(self, router: RouterProcess, num_tokens: int) -> None:
        self.longest_s = 0.0
        last_s = time.monotonic()
        with router.stream("slow", max_tokens=num_tokens) as events:
            for event in events:
                now_s = time.monotonic()
                self.longest_s, last_s = max(self.longest_s, now_s - last_s), now_s
                assert "error" not in event
        assert event == "[DONE]"


def absurd_bodies() -> Iterator[tuple[str, bytes]]:
    """(path, body) of requests that take a server long if it does not look at their size first."""
    chat = b'{"model": "tiny", "messages": ['
    yield "/v1/completions", b'{"model": "tiny", "prompt": "' + b"word " * 4_000_000 + b'"}'
    one = b'{"role": "user", "content": "'
    yield "/v1/chat/completions", chat + one + b"word " * 4_000_000 + b'"}]}'
    yield "/v1/chat/completions", chat + b",".join([one + b'hi"}'] * 20_000) + b"]}"
    yield "/v1/chat/completions", chat + b",".join([one + b'deep"}'] * 400) + b"]}"


def test_a9_huge_prompts_are_not_felt_by_others(shared: RouterProcess) -> None:
    slowest_s = 0.0
    with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS + 1) as pool:
        streams = [pool.submit(Gaps, shared, 150) for _ in range(NUM_STREAMS)]
        wait_for(lambda: shared.metric("router_requests_running") == NUM_STREAMS, HANG_S)
        for path, body in absurd_bodies():
            asked = pool.submit(httpx.post, shared.url + path, content=body, headers=HEADERS,
                                timeout=60, trust_env=False)  # fmt: skip
            while not asked.done():
                begin_s = time.monotonic()
                live = httpx.get(f"{shared.url}/health/live", trust_env=False, timeout=60)
                assert live.status_code == 200
                slowest_s = max(slowest_s, time.monotonic() - begin_s)
            assert asked.result().status_code in (400, 413), path
        longest_s = max(stream.result(60).longest_s for stream in streams)
    told = (
        f"A9: longest gap {longest_s * 1e3:.0f} ms, slowest /health/live {slowest_s * 1e3:.0f} ms"
    )
    sys.stdout.write(told + "\n")
    assert max(longest_s, slowest_s) < 10
    assert shared.metric("router_event_loop_lag_max_seconds") < 10


def test_a9_many_small_parts_take_linear_time() -> None:
    """Adjacent user texts are gathered once: each for itself would be 200 million steps."""
    turns = Turns(joins_users=True)
    begin_s = time.monotonic()
    for _ in range(20_000):
        turns.say("user", [""])
    (message,) = turns.messages
    assert len(message.content or "") == 20_000
    assert time.monotonic() - begin_s < 5


@pytest.mark.parametrize(
    "more",
    [
        {
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": 0}}
            ]
        },
        {"reasoning_content": 0},
    ],
)
async def test_a9_calls_and_thinking_count_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """A short content beside long arguments is no short text, to be worked on in the loop."""
    threads: list[int] = []
    render = ChatTemplate.render_tokens

    def noting(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.get_ident())
        return render(*args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render_tokens", noting)
    user = {"role": "user", "content": "hi"}
    for size, inline in ((10, True), (5000, False), (20_000_000, None)):
        text = json.dumps({"a": "x" * size}) if "tool_calls" in more else "x" * size
        told = json.loads(json.dumps(more).replace(": 0", ": " + json.dumps(text)))
        messages = [user, {"role": "assistant", "content": "", **told}, user]
        async with router_parts(tmp_path, lambda _: text_play("x"), max_len=20_000) as router:
            body = {"model": MODEL, "messages": messages}
            answer = await call(router.app, "POST", "/v1/chat/completions", body)
        if inline is None:
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert threads == []
        else:
            assert answer.status == 200
            assert (threads.pop() == threading.get_ident()) is inline


# -- A14: clients that leave


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """A router that runs one request at a time."""
    from tests.reports.conftest import SCRIPT
    from tests.router_process import starting

    make = starting(tmp_path_factory.mktemp("narrow"))
    router = next(make)("--max-concurrency", "1", script=SCRIPT)
    assert router.url
    yield router
    next(make, None)


def leave(connection: socket.socket, how: str) -> None:
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "half-close":
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.close()


def connect(router: RouterProcess, prompt: str, **fields: Any) -> socket.socket:
    """A connection on which a whole request was sent, and nothing was read."""
    url = urlsplit(router.url)
    connection = socket.create_connection((url.hostname or "", url.port or 0), timeout=HANG_S)
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 400, **fields}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@contextmanager
def busy(router: RouterProcess) -> Iterator[None]:
    """While all permits are taken by another client."""
    other = connect(router, "silent")
    wait_for(lambda: router.metric("router_permits_used") == 1, HANG_S)
    try:
        yield
    finally:
        other.close()
        wait_for(lambda: idle(router), HANG_S)


def idle(router: RouterProcess) -> bool:
    names = ("permits_used", "requests_waiting", "requests_running", "kv_blocks_held")
    return all(router.metric(f"router_{name}") == 0 for name in names)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_a14_work_ends_with_its_client(
    narrow: RouterProcess, phase: str, how: str, stream: bool
) -> None:
    lines = len(narrow.events("request"))
    wait_for(lambda: idle(narrow), HANG_S)
    if phase == "queue":
        with busy(narrow):
            connection = connect(narrow, "slow", stream=stream)
            wait_for(lambda: narrow.metric("router_requests_waiting") == 1, HANG_S)
            leave(connection, how)
            wait_for(lambda: narrow.metric("router_requests_waiting") == 0, HANG_S)
            (line,) = narrow.wait_for("request", lines + 1, HANG_S)[lines:]
    else:
        connection = connect(narrow, "silent" if phase == "prefill" else "slow", stream=stream)
        wait_for(lambda: narrow.metric("router_requests_running") == 1, HANG_S)
        if phase == "decode":
            before = narrow.metric("router_engine_generated_tokens_total")
            wait_for(
                lambda: narrow.metric("router_engine_generated_tokens_total") > before + 3, HANG_S
            )
        leave(connection, how)
        wait_for(lambda: idle(narrow), HANG_S)
        made = narrow.metric("router_engine_generated_tokens_total")
        (line,) = narrow.wait_for("request", lines + 1, HANG_S)[lines:]
        assert line["finish"] == "none"
        assert (line.get("completion_tokens", 0) > 0) == (
            phase == "decode"
        )  # what was made is counted
        assert narrow.metric("router_engine_generated_tokens_total") == made
    assert line["status"] == 499
    connection.close()


def test_a14_the_kernel_asks_after_clients_that_say_nothing() -> None:
    """So a machine that vanished is a client that left; connections inherit it."""
    with bind("127.0.0.1", 0) as listener:
        listener.setblocking(True)
        with socket.create_connection(listener.getsockname()) as _, listener.accept()[0] as met:
            assert met.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            ask_s = met.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            again_s = met.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            times = met.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
            assert ask_s + again_s * times <= 60
            assert met.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


# -- A16: one request id for many requests


async def test_a16_a_clients_id_is_only_a_label(shared: RouterProcess) -> None:
    async with httpx.AsyncClient(base_url=shared.url, trust_env=False, timeout=60) as client:
        streams = [asyncio.create_task(echoed(client, n)) for n in range(NUM_SAME_IDS)]
        assert await asyncio.gather(*streams) == [f"number {n}" for n in range(NUM_SAME_IDS)]
        # one of two is aborted in flight, and its id is used again at once
        for n in range(10):
            async with client.stream("POST", "/v1/completions", **asking("slow")) as running:
                assert running.headers["x-request-id"] == "same"
                aborted = asyncio.create_task(echoed(client, n, leave=True))
                assert await aborted == ""
                assert await echoed(client, n) == f"number {n}"
    wait_for(lambda: shared.metric("router_requests_running") == 0, HANG_S)
    assert not shared.events("bug")
    assert not shared.events("engine_died")


def asking(prompt: str) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "stream": True, "max_tokens": 400}
    return {"json": body, "headers": {"x-request-id": "same"}}


async def echoed(client: httpx.AsyncClient, n: int, *, leave: bool = False) -> str:
    """The text of a request's own stream; "" if it is left before."""
    prompt = "slow" if leave else f"number {n}"
    text = ""
    async with client.stream("POST", "/v1/completions", **asking(prompt)) as answer:
        assert answer.headers["x-request-id"] == "same"
        async for line in answer.aiter_lines():
            if leave and line:
                return ""
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
        assert line == "" or line == "data: [DONE]"
    return text


# -- A19: how streams end


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Router]:
    def plays(prompt: str) -> Play:
        if "broken" in prompt:
            return Play(text_play("abc").steps, error="a fault")
        if "dying" in prompt:
            return Play(text_play("abc").steps, dies_at=2, deaths=2)
        return text_play("abc", "def", stop="long" not in prompt)

    async with router_parts(tmp_path, plays, replicas=1) as router:
        yield router


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "@"}]},
    "/v1/completions": {"prompt": "@"},
    "/v1/responses": {"input": "@"},
    "/v1/messages": {"messages": [{"role": "user", "content": "@"}], "max_tokens": 50},
}


@pytest.mark.parametrize("prompt", ["fine", "long", "broken", "dying"])
@pytest.mark.parametrize("path", ROUTES)
async def test_a19_every_stream_has_one_end(parts: Router, path: str, prompt: str) -> None:
    body = json.loads(json.dumps(ROUTES[path]).replace("@", prompt))
    answer = await call(parts.app, "POST", path, {"model": MODEL, "stream": True, **body})
    assert answer.status == 200
    assert answer.ended
    good, bad = ends_of(path, answer)
    assert (good, bad) == ((0, 1) if prompt in ("broken", "dying") else (1, 0))


def ends_of(path: str, answer: Answer) -> tuple[int, int]:
    """(ends that say why, ends by an error) of a stream, whose last words must be the API's."""
    blocks = [block for block in answer.body.decode().split("\n\n") if block]
    data = [line[6:] for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    done = data.pop() if data[-1] == "[DONE]" else ""
    events = [json.loads(each) for each in data]
    kinds = [event.get("type", "") for event in events]
    if path == "/v1/messages":
        assert not done
        assert kinds[-1] in ("message_stop", "error")
        return kinds.count("message_stop"), kinds.count("error")
    if path == "/v1/responses":
        ends = ("response.completed", "response.incomplete")
        return sum(map(kinds.count, ends)), kinds.count("response.failed") or kinds.count("error")
    assert done
    assert answer.body.endswith(b"data: [DONE]\n\n")
    choices = [choice for event in events for choice in event.get("choices", ())]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return len(reasons), sum("error" in event for event in events)


def test_a19_the_only_engine_dies_for_good_in_the_middle_of_a_stream(start: Start) -> None:
    """It is not cut, as if the answer were complete: an error is its end."""
    fault = {"kind": "crash", "at_token": 3}
    rule = {"match": {"contains": "die"}, "reply": "abcdefgh", "faults": [fault]}
    router = start(script={"rules": [rule]})
    with router.stream("die", max_tokens=50) as stream:
        events = list(stream)
    assert events[-1] == "[DONE]"
    ends = [e for e in events[:-1] if "error" in e or e["choices"][0]["finish_reason"]]
    assert len(ends) == 1
    assert ends[0]["error"]["code"]
    assert ends == [events[-2]]
