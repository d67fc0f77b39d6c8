"""What a large request for embeddings does to running chat streams.

    python -m bench.embeddings                     # both cases, about four minutes on 2 cores
    python -m bench.embeddings --case encoder --texts 500

Owns the measurement: streams of the demo model run alone for a while, then beside one request of
many texts of 1 to 256 tokens; compared are the gaps between the streams' events, as a client sees
them. Cases, each with two CPU engines of one router:

* encoder  the texts go to all-MiniLM-L6-v2 on an engine of its own, the streams to the other one
* chat     texts and streams share both engines, two replicas of the demo model

Memory is that of the processes as Linux counts it (RSS): before the request, and the highest while
it ran. Prints a Markdown table, and writes bench/results/embeddings-<date>.json.

Exit codes: 0 all targets met, 1 one missed or a measurement failed, 64 usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from bench import report
from bench.client import ClientError, ConnectionPool, Sink, StreamTally, build_request, fetch
from bench.cpu import DECODE_PROMPT, MODEL, ROOT, Router, running_router
from bench.drive import run_async
from bench.report import percentile
from bench.workloads import WORDS

ENCODER: Final = "all-minilm-l6-v2"
CASES: Final = ("encoder", "chat")
LONGEST_TEXT: Final = 256  # tokens, those around the text included
STREAM_TOKENS: Final = 6000  # never reached
WARM_UP_S: Final = 3.0
SAMPLE_S: Final = 0.05
TARGET_MS: Final = 100.0  # that the largest gap may grow by


class Gaps(msgspec.Struct):
    """Between two events with text of one stream, over all streams."""

    count: int
    median_ms: float
    p99_ms: float
    largest_ms: float


class Case(msgspec.Struct):
    """One case; memory in bytes, first the router's and then the engines'."""

    case: str
    texts: int
    tokens: int
    seconds: float
    alone: Gaps
    beside: Gaps
    rss_before: list[int]
    rss_highest: list[int]
    loop_lag_ms: float  # the router's largest so far, as its metrics tell

    @property
    def added_ms(self) -> float:
        """What the request added to the largest gap."""
        return self.beside.largest_ms - self.alone.largest_ms


class Streams:
    """Chat streams that run until they are cancelled, and when their events came."""

    def __init__(self, pool: ConnectionPool, router: Router, count: int) -> None:
        self._pool = pool
        self._target = router.target
        self._count = count
        self._tallies: list[StreamTally] = []

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """All of them, for the time of the block."""
        tasks = [asyncio.create_task(self._run(number)) for number in range(self._count)]
        try:
            yield
            for task in tasks:
                if task.done():
                    raise RuntimeError(f"a stream ended early: {task.exception()}")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, number: int) -> None:
        body = {
            "model": MODEL,
            "prompt": [*DECODE_PROMPT, 1000 + number],
            "max_tokens": STREAM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        tally = StreamTally()
        self._tallies.append(tally)
        request = build_request(self._target, "POST", "/v1/completions", json.dumps(body).encode())
        await self._pool.exchange(request, lambda status: _sink_of(status, tally))

    def gaps(self, start_s: float, end_s: float) -> Gaps:
        """Of the gaps that lie at least partly between these times."""
        found: list[float] = []
        for tally in self._tallies:
            at = tally.first_at or 0.0
            for gap_s in tally.gaps_s:
                if at + gap_s > start_s and at < end_s:
                    found.append(gap_s * 1e3)
                at += gap_s
        return Gaps(len(found), *(percentile(found, p) for p in (50, 99, 100)))


def _sink_of(status: int, tally: StreamTally) -> Sink:
    if status != 200:
        raise RuntimeError(f"a stream was answered with {status}")
    return tally.feed


def make_texts(count: int, longest: int, rnd: random.Random) -> list[str]:
    """Texts of 1 to about `longest` words, which common vocabularies hold as one token each."""
    return [" ".join(rnd.choices(WORDS, k=rnd.randint(1, longest))) for _ in range(count)]


async def measure(router: Router, case: str, texts: list[str], args: argparse.Namespace) -> Case:
    """One case on a running router. Raises RuntimeError, ClientError."""
    pool = ConnectionPool(router.target)
    streams = Streams(pool, router, args.streams)
    body = {
        "model": ENCODER if case == "encoder" else MODEL,
        "input": texts,
        "encoding_format": "base64",
    }
    request = build_request(router.target, "POST", "/v1/embeddings", json.dumps(body).encode())
    await _embed(pool, build_small(router, body))
    try:
        async with streams.running():
            await asyncio.sleep(WARM_UP_S)
            start_s = time.monotonic()
            await asyncio.sleep(args.alone_s)
            alone_s = time.monotonic()
            async with _watched(router) as memory:
                tokens = await _embed(pool, request)
                end_s = time.monotonic()
        _, metrics = await fetch(pool, build_request(router.target, "GET", "/metrics"))
    finally:
        pool.close()
    return Case(
        case,
        len(texts),
        tokens,
        end_s - alone_s,
        streams.gaps(start_s, alone_s),
        streams.gaps(alone_s, end_s),
        memory.first,
        memory.highest,
        _value(metrics, b"router_event_loop_lag_max_seconds") * 1e3,
    )


def build_small(router: Router, body: dict[str, Any]) -> bytes:
    """The same request with one text: what is loaded on first use is no part of the figures."""
    small = json.dumps({**body, "input": "warm up"}).encode()
    return build_request(router.target, "POST", "/v1/embeddings", small)


async def _embed(pool: ConnectionPool, request: bytes) -> int:
    """The tokens of the request's texts."""
    status, answer = await fetch(pool, request)
    if status != 200:
        raise RuntimeError(
            f"the request for embeddings was answered with {status}: {answer[:300]!r}"
        )
    return int(msgspec.json.decode(answer)["usage"]["prompt_tokens"])


def _value(metrics: bytes, name: bytes) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith(name + b" ")]
    return float(lines[0].split()[1]) if lines else 0.0


class Memory:
    """Resident bytes of some processes: now, and the highest seen."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self.first = self.highest = [_rss_bytes(pid) for pid in pids]

    def sample(self) -> None:
        """Looks again."""
        now = [_rss_bytes(pid) for pid in self._pids]
        self.highest = list(map(max, self.highest, now))


@asynccontextmanager
async def _watched(router: Router) -> AsyncGenerator[Memory, None]:
    memory = Memory([router.pid, *_children(router.pid)])

    async def watch() -> None:
        while True:
            memory.sample()
            await asyncio.sleep(SAMPLE_S)

    task = asyncio.create_task(watch())
    try:
        yield memory
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _children(pid: int) -> list[int]:
    """Of the main thread, which starts the engines in their order (Linux)."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return sorted(int(word) for word in text.split())


def _rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def markdown(cases: list[Case]) -> str:
    """The table."""
    rows = [
        "| case | texts | texts/s | tokens/s | gap alone: median, p99, largest | beside | added "
        "| router RSS | engines RSS |",
        "|" + "---|" * 9,
    ]
    for case in cases:
        memory = [
            f"{before / 1e6:.0f} → {highest / 1e6:.0f} MB"
            for before, highest in zip(case.rss_before, case.rss_highest, strict=True)
        ]
        rows.append(
            f"| {case.case} | {case.texts} | {case.texts / case.seconds:.1f} "
            f"| {case.tokens / case.seconds:.0f} | {_three(case.alone)} | {_three(case.beside)} "
            f"| {case.added_ms:.0f} ms | {memory[0]} | {', '.join(memory[1:])} |"
        )
    return "\n".join(rows)


def _three(gaps: Gaps) -> str:
    return f"{gaps.median_ms:.0f}, {gaps.p99_ms:.0f}, {gaps.largest_ms:.0f} ms"


def run_case(case: str, args: argparse.Namespace, rnd: random.Random) -> Case:
    """Starts the router of one case and measures. Raises RuntimeError, ClientError."""
    models = f"{MODEL},{ENCODER}={args.encoder}" if case == "encoder" else MODEL
    count = args.texts if case == "encoder" else args.chat_texts
    texts = make_texts(count, LONGEST_TEXT - 2, rnd)
    words = ["--models", models, "--gpus", "cpu,cpu"]
    with running_router(words) as router:
        return run_async(measure(router, case, texts, args))


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the figures; returns the exit code."""
    parser = argparse.ArgumentParser(
        "bench.embeddings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", choices=CASES, action="append", help="default: both")
    parser.add_argument("--streams", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--chat-texts", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--alone-s", type=float, default=20.0, help="default: %(default)s")
    parser.add_argument("--encoder", default=ENCODER, help="folder (default: the short name)")
    parser.add_argument("--save", type=Path, help="default: bench/results/embeddings-<date>.json")
    args = parser.parse_args(argv)
    facts = report.host_facts()
    cases: list[Case] = []
    try:
        for case in args.case or CASES:
            print(f"bench.embeddings: case {case}", file=sys.stderr, flush=True)
            cases.append(run_case(case, args, random.Random(1)))
    except (RuntimeError, ClientError) as error:
        print(f"bench.embeddings: {error}", file=sys.stderr)
        return 1
    print(markdown(cases))
    path: Path = args.save or ROOT / "bench" / "results" / f"embeddings-{facts['date']}.json"
    report.save_json(path, facts | {"streams": args.streams, "cases": msgspec.to_builtins(cases)})
    return 0 if all(case.added_ms <= TARGET_MS for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
