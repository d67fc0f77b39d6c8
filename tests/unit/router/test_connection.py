"""Heads that are too large, too slow or no HTTP, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from router import acceptor, connection
from router.acceptor import HttpServer, bind
from router.connection import MAX_HEAD_BYTES, MAX_HEADERS, TOO_SLOW

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    while scope["method"] == "POST" and (await receive()).get("more_body"):
        pass
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    """The application on a free port."""
    with bind("127.0.0.1", 0) as listener:
        server = HttpServer(app, listener, 100)
        task = asyncio.ensure_future(server.serve())
        yield listener.getsockname()[1]
        server.should_exit = True
        await task


@pytest_asyncio.fixture
async def port() -> AsyncIterator[int]:
    async with serving(hello) as number:
        yield number


async def talk(port: int, *parts: bytes) -> bytes:
    """Sends the parts and reads until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.01)
        async with asyncio.timeout(60):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def refusal(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def test_usual_requests_pass(port: int) -> None:
    long = b"X-Long: " + b"a" * 30_000 + b"\r\n"
    last = GET + b"Connection: close\r\n\r\n"
    answer = await talk(port, GET + long + b"\r\n", GET[:9], GET[9:] + b"\r\n", last)
    assert answer.count(b"200 OK") == 3


async def test_a_head_that_comes_behind_a_large_body(port: int) -> None:
    size = 3 * MAX_HEAD_BYTES
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
    last = GET + b"Connection: close\r\n\r\n"
    answer = await talk(port, post + b"x" * size + last[:20], last[20:])
    assert answer.count(b"200 OK") == 2


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X-Long: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
        GET + b"X: y\r\n" * MAX_HEADERS + b"\r\n",
        b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    ],
    ids=["bytes", "count", "path"],
)
async def test_s6_large_heads(port: int, head: bytes) -> None:
    answer = await talk(port, head)
    assert refusal(answer) == (431, "headers_too_large")


async def test_s6_endless_heads(port: int) -> None:
    line = b"X-%d: " + b"a" * 8000 + b"\r\n"
    answer = await talk(port, GET, *(line % i for i in range(40)))
    assert answer == b"" or refusal(answer) == (431, "headers_too_large")
    value = await talk(port, GET + b"X: ", *[b"a" * 8000] * 40)
    assert value == b"" or refusal(value) == (431, "headers_too_large")


async def test_what_is_no_http(port: int) -> None:
    answer = await talk(port, b"\x16\x03\x01 hello\r\n\r\n")
    assert refusal(answer) == (400, "invalid_http")


@pytest.mark.parametrize("begun", [b"", b"GET / HT", GET + b"X: y"])
async def test_slow_heads(port: int, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.05)
    assert await talk(port, begun) == b""


async def test_time_ends_with_the_head(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\n")
    await asyncio.sleep(0.7)
    writer.write(b"x")
    assert b"200 OK" in await reader.read()
    writer.close()


async def closed_within(port: int, limit_s: float, *parts: bytes, every_s: float) -> bool:
    """Sends the parts, then the last one again and again. Whether the server ends that in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    ended = asyncio.ensure_future(reader.read())
    try:
        async with asyncio.timeout(limit_s):
            for part in parts:
                writer.write(part)
            while not ended.done():
                await asyncio.sleep(every_s)
                writer.write(parts[-1])
            return True
    except (TimeoutError, ConnectionError):
        return ended.done()
    finally:
        ended.cancel()
        writer.close()


async def test_r13_a_body_that_drips_behind_its_answer(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any byte ended uvicorn's pause for keep-alive, and nothing began it again."""
    monkeypatch.setattr(connection, "REST_S", 0.1)
    head = b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    assert await closed_within(port, 20, head, b"x", every_s=0.02)


async def test_r13_empty_lines_between_requests(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "KEEP_ALIVE_S", 1)
    async with serving(hello) as own:
        assert await closed_within(own, 20, GET + b"\r\n", b"\r\n", every_s=0.1)


async def test_r13_a_body_that_comes_after_its_answer_is_taken(port: int) -> None:
    """The next request is then answered as usual."""
    head = b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
    last = GET + b"Connection: close\r\n\r\n"
    answer = await talk(port, head, b"01234", b"56789" + last)
    assert answer.count(b"200 OK") == 2


@pytest.mark.parametrize("parts", [1, 64], ids=["whole", "streamed"])
async def test_r12_an_answer_that_nobody_reads(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that the application is done with, and a connection that is closed already."""
    monkeypatch.setattr(connection, "STALL_S", 0.2)
    seen: list[Any] = []

    async def much(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(parts):
            body = b"x" * (64 * 2**20 // parts)
            await send(
                {"type": "http.response.body", "body": body, "more_body": number < parts - 1}
            )
        if parts > 1:
            seen.append(scope.get(TOO_SLOW))

    async with serving(much) as own:
        reader, writer = await asyncio.open_connection("127.0.0.1", own, limit=1)
        writer.write(GET + b"Connection: close\r\n\r\n")
        await asyncio.sleep(2)
        got = 0
        async with asyncio.timeout(20):
            while part := await reader.read(2**20):
                got += len(part)
        writer.close()
    assert got < 32 * 2**20  # what the kernel took before
    assert seen in ([], [True])


async def test_r12_who_reads_slowly_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.3)
    size = 16 * 2**20

    async def much(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size})

    async with serving(much) as own:
        reader, writer = await asyncio.open_connection("127.0.0.1", own, limit=2**16)
        writer.write(GET + b"Connection: close\r\n\r\n")
        got = 0
        while part := await reader.read(2**19):
            got += len(part)
            await asyncio.sleep(0.02)
        writer.close()
    assert got > size
