"""The HTTP API over real sockets: a router process with scripted engines.

What needs no socket is in tests/unit/router/test_app.py. Numbers are cases of the API corpus.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.serving import Server, serve, wait_for
from tools.tiny_model import write_tiny_model

MODEL = "tiny"
DIGITS = "0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


def script(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    slow = {"match": {"contains": "slow"}, "reply": "x", "repeat": True, "tokens_per_s": 20}
    return {"rules": [*rules, slow, {"match": "*", "reply": DIGITS}], **more}


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serve("--models", str(folder), script=script()) as running:
        yield running


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": text, **fields}


def post(server: Server, text: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body(text, **fields), timeout=60)


def stream_text(response: httpx.Response) -> str:
    """The joined text of a finished stream without errors."""
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@contextlib.contextmanager
def raw_request(server: Server, payload: bytes) -> Iterator[socket.socket]:
    """A connection on which a whole POST /v1/completions was sent."""
    url = urlsplit(server.url)
    assert url.hostname is not None
    with socket.create_connection((url.hostname, url.port or 0), timeout=60) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        connection.sendall(head.encode() + payload)
        yield connection


def idle(server: Server) -> bool:
    """Nothing runs or waits, in the router and in the engine."""
    names = ("router_permits_used", "router_requests_waiting", "router_requests_running")
    return all(server.metric(name) == 0 for name in names)


def test_streamed_and_whole(server: Server) -> None:
    assert post(server, "hi").json()["choices"][0]["text"] == DIGITS
    streamed = post(server, "hi", stream=True)
    assert stream_text(streamed) == DIGITS
    assert streamed.headers["content-type"].startswith("text/event-stream")


def test_one_connection_survives_errors_127(server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        for fields, status in (({"n": 0, "stream": True}, 400), ({"stream": "x"}, 400), ({}, 200)):
            assert client.post("/v1/completions", json=body("hi", **fields)).status_code == status
        assert client.post("/v1/completions", content=b"{}").status_code == 415
        assert client.get("/v1/models").status_code == 200


def test_a_body_without_end_is_refused_189(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**20

    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        answer = httpx.post(
            f"{server.url}/v1/completions",
            content=endless(),
            headers={"content-type": "application/json"},
            timeout=30,
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert process.memory_info().rss - before < 80 * 2**20
    assert post(server, "hi").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request_171_172(server: Server, stream: bool) -> None:
    payload = json.dumps(body("slow", max_tokens=2000, stream=stream, n=2)).encode()
    with raw_request(server, payload) as connection:
        wait_for(lambda: server.metric("router_requests_running") == 2)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    wait_for(lambda: idle(server), 30, server)
    wait_for(lambda: bool(server.events("request")))
    assert server.events("request")[-1]["finish"] == "none"


def test_a_reader_that_sleeps_gets_everything(server: Server) -> None:
    payload = json.dumps(body("hi", stream=True, max_tokens=10, n=100)).encode()
    with raw_request(server, payload) as connection:
        time.sleep(0.3)
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(65536)
    assert received.count(b'"finish_reason":"length"') == 100


def test_one_log_line_for_each_request(server: Server) -> None:
    ids = ["log-1", "log-2", "log-3"]
    bodies = (body("hi"), body("hi", temperature=9), body("hi", stream=True))
    for request_id, sent in zip(ids, bodies, strict=True):
        headers = {"x-request-id": request_id}
        httpx.post(f"{server.url}/v1/completions", json=sent, headers=headers)
    wait_for(lambda: any(e["request_id"] == ids[2] for e in server.events("request")))
    lines = [event for event in server.events("request") if event["request_id"] in ids]
    assert [line["request_id"] for line in lines] == ids
    assert [line["status"] for line in lines] == [200, 400, 200]
    assert lines[1]["code"] == "invalid_value"
    assert (lines[0]["model"], lines[0]["completion_tokens"]) == (MODEL, 11)
    assert all(0 <= lines[i]["ttft_s"] < 60 for i in (0, 2))


async def test_many_at_once_065(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        fields = {"n": 8, "temperature": 1}
        sent = [client.post("/v1/completions", json=body("hi", **fields)) for _ in range(20)]
        for answer in await asyncio.gather(*sent):
            choices = answer.json()["choices"]
            assert [choice["index"] for choice in choices] == list(range(8))
            assert {choice["text"] for choice in choices} == {DIGITS}


def test_time_limit_247(folder: Path) -> None:
    words = ("--models", str(folder), "--request-timeout", "0.5")
    with serve(*words, script=script()) as server:
        whole = post(server, "slow", max_tokens=2000)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "request_timeout")
        streamed = post(server, "slow", max_tokens=2000, stream=True)
        assert streamed.status_code == 200
        *_, event, done, _ = streamed.text.split("\n\n")
        assert json.loads(event[6:])["error"]["code"] == "request_timeout"
        assert done == "data: [DONE]"
        wait_for(lambda: idle(server), 30, server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_dead_engine_is_not_seen_240(folder: Path, tmp_path: Path, stream: bool) -> None:
    crash = {"kind": "crash", "at_token": 5, "once_file": str(tmp_path / "crashed")}
    rule = {"match": {"contains": "crash"}, "reply": DIGITS, "faults": [crash], "tokens_per_s": 100}
    with serve("--models", str(folder), script=script(rule)) as server:
        answer = post(server, "crash", stream=stream, stop="8", logprobs=1)
        assert answer.status_code == 200
        text = stream_text(answer) if stream else answer.json()["choices"][0]["text"]
        assert text == "01234567"
        assert (tmp_path / "crashed").exists()
        wait_for(lambda: bool(server.events("request")), 30, server)
        assert server.events("request")[-1]["moves"] == 1


def test_a_poisonous_request_is_quarantined(folder: Path) -> None:
    fault = {"kind": "crash", "how": "segv"}
    rule = {"match": {"contains": "poison"}, "reply": DIGITS, "faults": [fault]}
    with serve("--models", str(folder), "--gpus", "cpu,cpu", script=script(rule)) as server:
        answer = post(server, "poison")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "request_quarantined")
        assert post(server, "hi").json()["choices"][0]["text"] == DIGITS


def test_loading_is_told_182(folder: Path) -> None:
    with serve("--models", str(folder), script=script(load_s=1.5), ready=False) as server:
        wait_for(lambda: bool(server.events("engine_loading")), 60, server)
        url = next(
            f"http://127.0.0.1:{connection.laddr.port}"
            for connection in psutil.Process(server.process.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        )
        assert httpx.get(f"{url}/health/live").status_code == 200
        for answer in (
            httpx.get(f"{url}/health"),
            httpx.get(f"{url}/health/started"),
            httpx.post(f"{url}/v1/completions", json=body("hi")),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "server_is_overloaded"
            assert int(answer.headers["retry-after"]) >= 1
        server.wait_ready()
        assert post(server, "hi").status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.slow
def test_comments_during_a_long_silence_216(folder: Path) -> None:
    rule = {"match": {"contains": "late"}, "reply": DIGITS, "first_token_s": 11}
    with serve("--models", str(folder), script=script(rule)) as server:
        answer = post(server, "late", stream=True)
        assert answer.text.count(": ping\n\n") >= 2
        assert stream_text(answer) == DIGITS
