"""Who connects is served, or told that there is no room; never cut off without a word."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.acceptor import FAREWELLS, HttpServer, bind, connection_limit, open_descriptors
from tests.router_process import until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/long":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(limit: int) -> AsyncIterator[tuple[HttpServer, int]]:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = HttpServer(hello, listener, limit)
        task = asyncio.ensure_future(server.serve())
        try:
            yield server, port
        finally:
            server.should_exit = True
            await task


async def begin(port: int, number: int) -> list[asyncio.StreamWriter]:
    """Requests that have to wait for their answers."""
    writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(number)]
    for writer in writers:
        writer.write(GET.replace(b"/ ", b"/long "))
    return writers


async def ask(port: int) -> tuple[bytes, asyncio.StreamWriter]:
    """The head of the answer; the connection stays open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    async with asyncio.timeout(20):
        return await reader.readuntil(b"\r\n\r\n"), writer


@pytest.mark.parametrize(
    ("descriptors", "engines", "limit"), [(256, 1, 168), (256, 2, 160), (64, 1, 8), (1024, 8, 880)]
)
def test_something_is_kept_for_everything_else(descriptors: int, engines: int, limit: int) -> None:
    assert connection_limit(descriptors, engines) == limit


def test_descriptors_are_counted() -> None:
    before = open_descriptors()
    a, b = socket.socketpair()
    assert open_descriptors()["socket"] == before.get("socket", 0) + 2
    a.close()
    b.close()
    assert sum(open_descriptors().values()) == sum(before.values())


async def test_beyond_the_limit_is_503_until_somebody_leaves() -> None:
    async with serving(limit=3) as (server, port):
        admitted = await begin(port, 3)
        await until(lambda: server.answering == 3)
        refused = [await ask(port) for _ in range(2 * FAREWELLS)]  # more than may say goodbye
        for head, writer in refused:
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in head.lower()
            assert b"connection: close" in head.lower()
            writer.close()
        assert (server.connections, server.refused) == (3, 2 * FAREWELLS)
        for writer in admitted:
            writer.close()
        await until(lambda: server.connections == 0)
        head, writer = await ask(port)
        assert b"200 OK" in head
        writer.close()


async def test_refused_clients_that_stay_do_not_stop_it() -> None:
    async with serving(limit=1) as (server, port):
        (admitted,) = await begin(port, 1)
        await until(lambda: server.answering == 1)
        staying = [await ask(port) for _ in range(FAREWELLS)]
        head, late = await ask(port)  # once the first of them is given up
        assert b"503" in head
        assert server.alive
        for writer in (admitted, late, *(writer for _, writer in staying)):
            writer.close()


async def test_it_recovers_from_having_no_descriptor_at_all() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(limit=100) as (server, port):
        client = socket.socket()
        client.setblocking(False)
        probe = os.dup(0)  # the lowest free number
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, before[1]))
        try:
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
            await asyncio.sleep(0.1)
            assert server.connections == 0
            assert server.alive
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        await until(lambda: server.connections == 1)
        client.close()


async def test_who_only_waits_for_another_request_makes_room() -> None:
    """Idle connections of many clients must not keep a new one out until they time out."""
    async with serving(limit=3) as (server, port):
        idle = [await ask(port) for _ in range(3)]
        await until(lambda: server.answering == 0)
        newcomers = [await ask(port) for _ in range(2 * FAREWELLS)]
        assert all(b"200 OK" in head for head, _ in newcomers)
        assert server.refused == 0
        await until(lambda: server.connections <= 3)
        for _, writer in (*idle, *newcomers):
            writer.close()
