"""What streaming costs the router: its CPU time per chunk, against the fake engine.

    python -m bench.router                       # about two minutes, two idle cores, no model
    python -m bench.router --streams 64 --rates 40000 --seconds 10 --endpoints chat

Owns the load: the router alone on core 0, the fake engine and this client on core 1, one token per
event. CPU time per chunk is the robust figure on a shared machine; chunks a second are what came
out. A rate is what the engine offers (streams / time of a step), 0 as much as it can. TTFT is that
of requests for one token, one after the other, with an engine that answers at once. A bare write is
what the kernel takes for the bytes of one chunk to a local socket: the floor, and a measure of the
machine's mood. Needs Linux, two cores and the test extras.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import msgspec

from bench import report
from bench.client import Target, build_request
from bench.cpu import ROOT, Router, cpu_seconds, running_router
from bench.drive import run_async

ENDPOINTS = ("completions", "chat")
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MODEL = "tiny"
MARK = "~"  # the text of each token; nothing else in an answer holds it
MAX_TOKENS = 2000
TTFT_REQUESTS = 500
WRITES, CHUNK_BYTES = 20_000, 230
ROUTER_CORE, CLIENT_CORE = 0, 1
SETTLE_S = 1.0


class Figures(msgspec.Struct, frozen=True):
    """One measurement. `events_per_write`: of those that hold text; CPU time in µs."""

    endpoint: str
    streams: int
    rate: float  # tokens a second that the engine offers, 0: flat out
    chunks_per_s: float
    cpu_us_per_chunk: float
    load: float  # share of its core that the router used
    events_per_write: float
    tokens_per_event: float
    requests: int


class Counts:
    """What all connections have read so far."""

    def __init__(self) -> None:
        self.events = 0
        self.writes = 0
        self.tokens = 0
        self.requests = 0
        self.failure = ""


class Reader(asyncio.Protocol):
    """One connection that asks again as soon as an answer is over, and only counts."""

    def __init__(self, request: bytes, counts: Counts) -> None:
        self._request = request
        self._counts = counts
        self._tail = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        counts = self._counts
        counts.tokens += data.count(MARK.encode())
        seen = self._tail + data
        self._tail = seen[-6:]  # one byte less than the shorter of the two marks
        counts.events += seen.count(b"\ndata: ")
        counts.writes += seen.count(b"\r\ndata: ")
        if seen.endswith(b"0\r\n\r\n") and self._transport is not None:
            counts.requests += 1
            self._tail = b""
            self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._counts.failure = self._counts.failure or str(exc or "the router closed a connection")


def stream_request(target: Target, endpoint: str, max_tokens: int) -> bytes:
    """One streamed request."""
    prompt: dict[str, Any] = {"prompt": "hi"}
    if endpoint == "chat":
        prompt = {"messages": [{"role": "user", "content": "hi"}]}
    body = {"model": MODEL, "stream": True, "max_tokens": max_tokens, "ignore_eos": True, **prompt}
    return build_request(target, "POST", PATHS[endpoint], json.dumps(body).encode())


@contextlib.contextmanager
def fake_router(folder: Path, streams: int, step_ms: float) -> Generator[Router]:
    """A router of `streams` permits whose engine makes a token per stream every `step_ms`."""
    rule = {"match": "*", "reply": MARK, "repeat": True, "finish": "length"}
    script = {"rules": [rule], "step_ms": step_ms, "max_batch": streams}
    script_file = folder / "script.json"
    script_file.write_text(json.dumps(script), encoding="utf-8")
    engine = (sys.executable, ROOT / "tools" / "fake_engine.py", "--script", script_file)
    words = ["--models", f"{MODEL}={folder / 'tiny'}", "--gpus", "cpu"]
    words += ["--max-concurrency", str(streams)]
    words += ["--engine-command", shlex.join(map(str, engine))]
    with running_router(words) as router:
        _pin(router.pid, ROUTER_CORE)
        yield router


def _pin(pid: int, core: int) -> None:
    """All threads of the process; its children stay where they are."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


async def _stream(router: Router, endpoint: str, streams: int, seconds: float) -> list[float]:
    """Differences over the window: seconds, CPU seconds, events, writes, tokens, requests."""
    counts = Counts()
    loop = asyncio.get_running_loop()
    request = stream_request(router.target, endpoint, MAX_TOKENS)
    where = (router.target.host, router.target.port)
    transports = [
        (await loop.create_connection(lambda: Reader(request, counts), *where))[0]
        for _ in range(streams)
    ]

    def now() -> list[float]:
        marks = (counts.events, counts.writes, counts.tokens, counts.requests)
        return [time.perf_counter(), cpu_seconds(router.pid), *marks]

    await asyncio.sleep(SETTLE_S)
    before = now()
    await asyncio.sleep(seconds)
    after = now()
    if counts.failure or after[2] == before[2]:
        raise RuntimeError(f"the streams broke: {counts.failure or 'no token came'}")
    for transport in transports:
        transport.abort()
    return [b - a for a, b in zip(before, after, strict=True)]


def measure_streams(
    folder: Path, endpoint: str, streams: int, rate: float, seconds: float
) -> Figures:
    """One measurement with a router of its own: no backlog is inherited. Raises RuntimeError."""
    with fake_router(folder, streams, streams / rate * 1e3 if rate else 0.0) as router:
        spent = run_async(_stream(router, endpoint, streams, seconds))
    took_s, cpu_s, events, writes, tokens, requests = spent
    return Figures(
        endpoint=endpoint,
        streams=streams,
        rate=rate,
        chunks_per_s=events / took_s,
        cpu_us_per_chunk=cpu_s / events * 1e6,
        load=cpu_s / took_s,
        events_per_write=events / writes,
        tokens_per_event=tokens / events,
        requests=int(requests),
    )


async def _first_tokens(target: Target, requests: int) -> list[float]:
    reader, writer = await asyncio.open_connection(target.host, target.port)
    request = stream_request(target, "completions", 1)
    taken_s: list[float] = []
    for _ in range(requests):
        started = time.perf_counter()
        writer.write(request)
        await reader.readuntil(MARK.encode())
        taken_s.append(time.perf_counter() - started)
        await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    return taken_s


def measure_ttft(folder: Path) -> tuple[list[float], float]:
    """Seconds to the token of each request for one, sorted; the router's CPU µs per request."""
    with fake_router(folder, 1, 0.0) as router:
        run_async(_first_tokens(router.target, 20))
        before_s = cpu_seconds(router.pid)
        taken_s = sorted(run_async(_first_tokens(router.target, TTFT_REQUESTS)))
        return taken_s, (cpu_seconds(router.pid) - before_s) / TTFT_REQUESTS * 1e6


def measure_write() -> float:
    """CPU µs of one write of a chunk's size to a local socket that another process reads."""
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        with socket.create_connection(listener.getsockname()) as reader:
            while reader.recv(65536):
                pass
        os._exit(0)
    os.sched_setaffinity(0, {ROUTER_CORE})
    try:
        with listener, listener.accept()[0] as writer:
            writer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            started = time.process_time()
            for _ in range(WRITES):
                writer.send(b"x" * CHUNK_BYTES)
            return (time.process_time() - started) / WRITES * 1e6
    finally:
        os.sched_setaffinity(0, {CLIENT_CORE})
        os.waitpid(child, 0)


def line_of(f: Figures) -> str:
    """One row of the table."""
    offered = f"{f.rate:,.0f}" if f.rate else "flat out"
    return (
        f"| {f.endpoint} | {f.streams} | {offered} | {f.chunks_per_s:,.0f} "
        f"| {f.cpu_us_per_chunk:.1f} | {f.load:.0%} | {f.events_per_write:.2f} "
        f"| {f.tokens_per_event:.2f} |"
    )


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a Markdown table; returns the exit code."""
    parser = argparse.ArgumentParser(
        "bench.router", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", default="64,256", help="default: %(default)s")
    parser.add_argument("--rates", default="2560,25600,50000,0", help="default: %(default)s")
    parser.add_argument("--endpoints", default=",".join(ENDPOINTS), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--save", type=Path, help="writes the figures as JSON")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, {CLIENT_CORE})  # the engine inherits it
    print(f"a bare write: {measure_write():.1f} µs\n")
    columns = "endpoint,streams,offered/s,chunks/s,router µs/chunk,of its core,events/write"
    print("|" + "|".join(f" {name} " for name in (*columns.split(","), "tokens/event")) + "|")
    print("|" + "---|" * 8, flush=True)
    found: list[Figures] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = [sys.executable, str(ROOT / "tools" / "tiny_model.py"), str(folder / "tiny")]
        subprocess.run(tiny, check=True, stdout=subprocess.DEVNULL)
        given = (args.streams.split(","), args.rates.split(","), args.endpoints.split(","))
        for streams, rate, endpoint in itertools.product(*given):
            one = measure_streams(folder, endpoint, int(streams), float(rate), args.seconds)
            found.append(one)
            print(line_of(one), flush=True)
        ttft_s, request_us = measure_ttft(folder)
    median_ms, late_ms = (ttft_s[int(len(ttft_s) * q)] * 1e3 for q in (0.5, 0.99))
    print(
        f"\nrequests for one token, one client: TTFT p50 {median_ms:.2f}, p99 {late_ms:.2f} ms, "
        f"router's CPU {request_us:.0f} µs each"
    )
    if args.save:
        facts = {**report.host_facts(), "ttft_s": ttft_s, "streams": msgspec.to_builtins(found)}
        args.save.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
