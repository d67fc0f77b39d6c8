"""Clients that misbehave, over plain sockets, and what must be left of them: nothing.

    phases = await abort_many(url, 200, seed=1)      # requests given up at random moments
    async with steady(url) as client, probing(url) as probe: ...      # who must not notice
    books = Books.of(server)                          # descriptors, tasks, blocks, queues

Every client is a task of the running loop; nothing here asserts a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from tests.serving import Server, wait_for

PHASES: Final = ("head", "body", "sent", "queue", "begin", "middle", "end", "whole")
COMPLETIONS: Final = "/v1/completions"
LIMIT_S: Final = 120.0  # against hangs


def request_bytes(url: str, fields: dict[str, Any], *headers: str) -> bytes:
    """A POST to /v1/completions."""
    body = json.dumps({"model": "tiny", **fields}).encode()
    head = [
        f"POST {COMPLETIONS} HTTP/1.1",
        f"Host: {urlsplit(url).netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is gone at the end, whatever happened to it."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def vanish(writer: asyncio.StreamWriter) -> None:
    """The connection ends with a reset, as of a machine that went away."""
    raw: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def abort_one(url: str, phase: str, chance: random.Random) -> None:
    """One request, given up in that phase, by closing or by a reset."""
    fields = {
        "prompt": "x" * chance.choice([3, 40, 300]),
        "max_tokens": 3 if phase == "end" else chance.randint(20, 80),
        "ignore_eos": True,
        "n": chance.choice([1, 1, 3]),
        "stream": phase != "whole" and chance.random() < 0.8,
    }
    data = request_bytes(url, fields, "Connection: close")
    part = {"head": 40, "body": len(data) - 20}.get(phase, len(data))
    async with connected(url) as (reader, writer):
        writer.write(data[:part])
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await writer.drain()
            if phase == "queue":
                await asyncio.sleep(chance.random() * 0.05)
            elif phase == "begin":
                await reader.read(1)
            elif phase in ("middle", "end"):
                for _ in range(chance.randint(1, 6)):
                    await reader.read(200)
            elif phase == "whole":
                await asyncio.sleep(chance.random() * 0.2)
        if chance.random() < 0.5:
            vanish(writer)


async def abort_many(url: str, count: int, *, seed: int, at_once: int = 24) -> Counter[str]:
    """So many requests, given up at random moments; how many in which phase."""
    chance = random.Random(seed)
    phases = [chance.choice(PHASES) for _ in range(count)]
    room = asyncio.Semaphore(at_once)

    async def one(number: int, phase: str) -> None:
        async with room:
            await abort_one(url, phase, random.Random(seed * 1_000_003 + number))

    async with asyncio.timeout(LIMIT_S + count):
        await asyncio.gather(*(one(number, phase) for number, phase in enumerate(phases)))
    return Counter(phases)


async def storm(url: str, clients: int, rounds: int) -> None:
    """All connect, send a long request and vanish, again and again."""
    fields = {"prompt": "storm " * 20, "max_tokens": 200, "ignore_eos": True, "stream": True}
    data = request_bytes(url, fields)

    async def one() -> None:
        async with connected(url) as (_, writer):
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            vanish(writer)

    for _ in range(rounds):
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(one() for _ in range(clients)))


# -- what must be as it was


@dataclass(frozen=True)
class Books:
    """What a router and its engines hold at rest."""

    descriptors: tuple[int, ...]
    tasks: int

    @classmethod
    def of(cls, server: Server) -> Books:
        """Once nothing runs, waits or is held. Raises AssertionError if that never comes."""
        wait_for(lambda: is_idle(server), LIMIT_S, server)
        wait_for(lambda: num_connections(server) == 0, LIMIT_S, server)
        told = len(server.events("state"))
        server.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: len(server.events("state")) > told, LIMIT_S, server)
        processes = [psutil.Process(server.process.pid), *server.engines()]
        return cls(
            tuple(process.num_fds() for process in processes),
            int(server.events("state")[-1]["tasks"]),
        )


def is_idle(server: Server) -> bool:
    """Nothing runs or waits, no block is held."""
    names = ("requests_running", "requests_waiting", "permits_used", "kv_blocks_held")
    return all(server.metric(f"router_{name}") == 0 for name in names)


def num_connections(server: Server) -> int:
    """Of clients to the router."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(each.status != psutil.CONN_LISTEN for each in found)


# -- who must not notice


def tell(text: str) -> None:
    """A figure for whoever runs the tests with -s."""
    sys.stdout.write(f"{text}\n")


def share(values: list[float], part: float) -> float:
    """The value that such a part of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


@dataclass
class Watch:
    """Times in seconds, and what went wrong in words."""

    times_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def told(self) -> str:
        """For the record."""
        p99, worst = share(self.times_s, 0.99) * 1e3, share(self.times_s, 1.0) * 1e3
        return f"{len(self.times_s)} times, p99 {p99:.0f} ms, worst {worst:.0f} ms"


@asynccontextmanager
async def probing(url: str, hz: float = 10.0) -> AsyncGenerator[Watch]:
    """R29: asks for liveness so often, each time on a connection of its own."""
    watch = Watch()
    data = f"GET /health/live HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n\r\n"

    async def run() -> None:
        while True:
            begun_s = time.monotonic()
            try:
                async with connected(url) as (reader, writer):
                    writer.write(data.encode())
                    answer = await reader.read()
                if not answer.startswith(b"HTTP/1.1 200"):
                    watch.failures.append(answer.decode(errors="replace"))
            except OSError as error:
                watch.failures.append(repr(error))
            watch.times_s.append(time.monotonic() - begun_s)
            await asyncio.sleep(1 / hz)

    async with _running(run()):
        yield watch


@asynccontextmanager
async def steady(url: str, *headers: str) -> AsyncGenerator[Watch]:
    """A client that streams one answer after the other; `times_s` are gaps between its events."""
    watch = Watch()
    fields = {"prompt": "steady", "max_tokens": 40, "ignore_eos": True, "stream": True}

    async def run() -> None:
        while True:
            async with connected(url) as (reader, writer):
                writer.write(request_bytes(url, fields, "Connection: close", *headers))
                last_s, answer = None, b""
                while part := await reader.read(65536):
                    now_s = time.monotonic()
                    if last_s is not None:
                        watch.times_s.append(now_s - last_s)
                    last_s, answer = now_s, answer + part
            if not answer.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in answer:
                watch.failures.append(answer.decode(errors="replace"))

    async with _running(run()):
        yield watch


@asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
