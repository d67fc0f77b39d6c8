"""R10 to R14, R28, R29: clients that leave, vanish, do not read or drip, beside some that behave.

Figures (gaps, lags) are printed, and asserted only where a machine ten times slower would pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.aborts import (
    COMPLETIONS,
    LIMIT_S,
    Books,
    abort_many,
    connected,
    is_idle,
    probing,
    request_bytes,
    share,
    steady,
    storm,
    tell,
)
from tests.serving import Server, serve, wait_for
from tools.tiny_model import write_tiny_model

pytestmark = pytest.mark.slow

ABORTS = 200  # R10; 10,000 in tools/soak
STORM = (100, 3)  # R11: clients and rounds; 500 and 20
SLOW_READERS = 100  # R12; 200
DRIPS = 200  # R13; 500
STREAMS = 200  # R28
NEVER_S = 30.0  # nobody may be kept waiting so long, on whatever machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Server]:
    """A real engine with few blocks, short steps and few permits, so that every phase is long."""
    small = ("--max-concurrency", "8", "--kv-blocks", "64", "--step-tokens", "64")
    with serve("--models", f"tiny={folder}", "--max-len", "512", *small) as server:
        yield server


@pytest.fixture(scope="module")
def fake(folder: Path) -> Iterator[Server]:
    """An engine as fast as it is told to be."""
    rules = [
        {"match": {"contains": "flood"}, "reply": "x" * 64, "repeat": True, "tokens_per_s": 1000},
        {"match": "*", "reply": "0123456789", "repeat": True, "tokens_per_s": 20},
    ]
    words = ("--models", f"tiny={folder}", "--max-concurrency", "400", "--max-batch", "400")
    with serve(*words, script={"rules": rules, "step_ms": 5}) as server:
        yield server


async def test_r10_requests_that_are_given_up_leave_nothing(real: Server) -> None:
    await abort_many(real.url, 20, seed=0)  # what is made at the first use of all
    before = await asyncio.to_thread(Books.of, real)
    async with probing(real.url) as probe:
        phases = await abort_many(real.url, ABORTS, seed=1)
        await asyncio.sleep(0.2)
    assert len(phases) > 5
    after = await asyncio.to_thread(Books.of, real)
    assert after == before
    assert real.metric("router_kv_blocks_leaked") == 0
    assert real.metric("router_ipc_messages_dropped_total") == 0
    assert real.metric("router_engine_restarts_total") == 0
    assert probe.failures == []
    tell(f"R10: {ABORTS} requests given up, {dict(phases)}; live: {probe.told()}")


async def test_r11_a_storm_of_clients_that_vanish(real: Server) -> None:
    before = await asyncio.to_thread(Books.of, real)
    async with steady(real.url) as client, probing(real.url) as probe:
        await asyncio.sleep(2)
        quiet_s = share(client.times_s, 0.99)
        client.times_s.clear()
        await storm(real.url, *STORM)
        ended_s = time.monotonic()
        await asyncio.to_thread(wait_for, lambda: few_run(real), NEVER_S, real)
        idle_s = time.monotonic() - ended_s
        tell(f"R11: quiet p99 {quiet_s * 1e3:.0f} ms, storm {client.told()}; idle {idle_s:.2f} s")
    assert client.failures == []
    assert probe.failures == []
    assert share(client.times_s, 1.0) < NEVER_S
    assert await asyncio.to_thread(Books.of, real) == before
    assert real.metric("router_kv_blocks_leaked") == 0


def few_run(server: Server) -> bool:
    """Nobody but the steady client."""
    running = server.metric("router_requests_running")
    return running <= 1 and server.metric("router_requests_waiting") == 0


async def test_r12_slow_readers_do_not_fill_the_router(fake: Server) -> None:
    """The sockets hold most here; the router must in tests/unit/router/test_slow_readers.py."""
    router = psutil.Process(fake.process.pid)
    data = request_bytes(
        fake.url, {"prompt": "flood", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    )
    await asyncio.to_thread(Books.of, fake)
    rss_bytes = router.memory_info().rss
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(steady(fake.url))
        probe = await stack.enter_async_context(probing(fake.url))
        await asyncio.sleep(1)
        for _ in range(SLOW_READERS):
            _, writer = await stack.enter_async_context(connected(fake.url))
            writer.transport.pause_reading()
            writer.write(data)
        ended_s = time.monotonic() + 6
        grown_bytes = 0
        while time.monotonic() < ended_s:
            await asyncio.sleep(0.1)
            grown_bytes = max(grown_bytes, router.memory_info().rss - rss_bytes)
        tell(
            f"R12: {SLOW_READERS} readers, router +{grown_bytes / 1e6:.0f} MB; beside them "
            f"{client.told()}; live: {probe.told()}"
        )
    assert client.failures == []
    assert probe.failures == []
    assert client.times_s
    assert grown_bytes < 50e6
    await asyncio.to_thread(wait_for, lambda: is_idle(fake), LIMIT_S, fake)


async def test_r13_heads_that_drip(fake: Server) -> None:
    begun_s = time.monotonic()

    async def drip() -> float:
        async with connected(fake.url) as (reader, writer):
            ended = asyncio.ensure_future(reader.read())
            writer.write(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nX-Drip: ".encode())
            while not ended.done():
                writer.write(b"a")
                await asyncio.wait((ended,), timeout=0.5)
            return time.monotonic() - begun_s

    async with steady(fake.url) as client, probing(fake.url) as probe:
        async with asyncio.timeout(LIMIT_S):
            closed_s = await asyncio.gather(*(drip() for _ in range(DRIPS)))
        tell(f"R13: {DRIPS} closed after {min(closed_s):.1f} to {max(closed_s):.1f} s")
        tell(f"R13: beside them {client.told()}; live: {probe.told()}")
    assert client.failures == []
    assert probe.failures == []
    assert min(closed_s) > 5


MALFORMED = (
    b"\r\n\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"G\x00T / HTTP/1.1\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n",
    b"GET http:///:::/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET //[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
    b"Content-Length: 4\r\n\r\n{}  ",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Type: application/json\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
)


async def test_r14_what_is_no_proper_http_is_refused_in_the_usual_form(fake: Server) -> None:
    """No crash, no 5xx, and no engine hears of it; what is no HTTP may also just be cut off."""
    submitted = fake.metric("router_request_success_total")

    async def send(data: bytes) -> bytes:
        async with connected(fake.url) as (reader, writer):
            writer.write(data)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                return await reader.read()
        return b""

    async with asyncio.timeout(LIMIT_S), probing(fake.url) as probe:
        answers = [await send(data) for data in MALFORMED]
        await asyncio.sleep(0.2)
    for data, answer in zip(MALFORMED, answers, strict=True):
        for part in answer.split(b"HTTP/1.1 ")[1:]:
            if part.startswith(b"100"):
                continue
            head, _, body = part.partition(b"\r\n\r\n")
            assert head[:1] == b"4", (data, part)
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, data
    assert sum(bool(answer) for answer in answers) > len(MALFORMED) / 2
    assert probe.failures == []
    assert fake.metric("router_request_success_total") == submitted
    assert not any("Traceback" in line for line in fake.lines)


async def test_r28_the_event_loop_s_lag(fake: Server) -> None:
    """The worst of the last minute and the share of late ticks, as the loop itself counts them."""
    fields = {"prompt": "many", "max_tokens": 60, "ignore_eos": True, "stream": True}
    data = request_bytes(fake.url, fields, "Connection: close")

    async def one() -> bytes:
        async with connected(fake.url) as (reader, writer):
            writer.write(data)
            return await reader.read()

    before = lag_counts(fake)
    async with probing(fake.url) as probe, asyncio.timeout(LIMIT_S):
        answers = await asyncio.gather(*(one() for _ in range(STREAMS)))
    assert all(answer.count(b"data: [DONE]") == 1 for answer in answers)
    assert probe.failures == []
    counts = {le: count - before.get(le, 0.0) for le, count in lag_counts(fake).items()}
    total = counts["+Inf"]
    late = {le: round(1 - count / total, 3) for le, count in counts.items() if total}
    tell(f"R28: {STREAMS} streams, of {total:.0f} ticks later than s: {late}; {probe.told()}")
    assert total > 5
    assert share(probe.times_s, 1.0) < NEVER_S


def lag_counts(server: Server) -> dict[str, float]:
    """Cumulative counts of the loop's lag by bucket."""
    import httpx

    name = 'router_event_loop_lag_seconds_bucket{le="'
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    found = [line.removeprefix(name) for line in lines if line.startswith(name)]
    return {line.partition('"')[0]: float(line.rpartition(" ")[2]) for line in found}
