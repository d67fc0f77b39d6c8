"""Closed-loop load for any server that speaks the OpenAI API: so many requests always open.

    python -m bench.closed_loop --model NAME -c 64 -n 192 -i 512 -o 128 --procs 4

Owns one measurement and its one line of output. Prompts are random token ids to /v1/completions,
with a stream, usage, temperature 0 and ignore_eos. All definitions are those of the yardstick
behind the anchors in `bench.shapes`, so that figures compare: TTFT is from sending to the first
event, with text or without; ITL is the gap between events; TPOT is (last - first event) /
(completion_tokens - 1); tokens are what usage says; seconds count from the first process's start
to the last one's end. The prompts depend on the arguments alone: the same command again asks for
the same prompts, and finds them in a prefix cache.

Exit codes: 0 all answers were whole, 1 one was not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing as mp
import random
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any

import msgspec

from bench.client import (
    BadResponse,
    ClientError,
    ConnectionPool,
    Sink,
    Target,
    build_request,
    error_message,
    parse_target,
)
from bench.drive import run_async

PREFIXES = 8
FIRST_ID = 10  # ids below it are control tokens in most vocabularies
TIMEOUT_S = 900.0

_PREFIX_SEED = 1000
_DATA, _DONE = b"data: ", b"[DONE]"
# Only the last event has usage and no choice. Quotes inside of a text are escaped, so no text
# looks like a key.
_USAGE, _ERROR = b'"usage"', b'"error"'


class Load(msgspec.Struct, frozen=True):
    """What one process sends: `requests` in all, `concurrency` at once. Lengths in tokens."""

    target: Target
    model: str
    concurrency: int
    requests: int
    input: int
    output: int
    shared_prefix: int
    vocab: int
    rank: int


class Answer(msgspec.Struct):
    """Times of one whole answer, in seconds; `span_s` is from sending to the last event."""

    ttft_s: float
    gaps_s: list[float]
    span_s: float
    tokens: int


class Part(msgspec.Struct):
    """One process's answers and when it began and ended (`time.time`); or why it failed."""

    answers: list[Answer]
    began_at: float
    ended_at: float
    failure: str = ""


class Events:
    """The events of one stream and when they came, from bytes in any cut."""

    def __init__(self, sent_at: float) -> None:
        self.first_at: float | None = None
        self.last_at = sent_at
        self.gaps_s: list[float] = []
        self.tokens = 0  # as usage states them
        self.error = ""
        self._rest = b""

    def feed(self, piece: bytes, now: float) -> None:
        """Takes the next bytes of the body. Raises `BadResponse` on an end that is no JSON."""
        if self._rest:
            piece = self._rest + piece
        *lines, self._rest = piece.split(b"\n")
        for line in lines:
            if not line.startswith(_DATA) or line.startswith(_DONE, len(_DATA)):
                continue
            if (_USAGE in line or _ERROR in line) and self._ends(line[len(_DATA) :]):
                continue
            if self.first_at is None:
                self.first_at = now
            else:
                self.gaps_s.append(now - self.last_at)
            self.last_at = now

    def _ends(self, event: bytes) -> bool:
        """Whether this is usage or an error, and no part of the answer."""
        if b'"usage":null' in event and _ERROR not in event:
            return False
        try:
            found = msgspec.json.decode(event, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadResponse(f"an event that is no JSON object: {event[:80]!r}") from error
        if found.get("error"):
            self.error = self.error or error_message(event)
            return True
        if found.get("usage") and not found.get("choices"):
            self.tokens = int(found["usage"]["completion_tokens"])
            return True
        return False


def prompts(load: Load) -> Iterator[list[int]]:
    """Token ids of each request: one of eight common prefixes, then ids of its own."""
    ids = range(FIRST_ID, load.vocab)
    common: list[list[int]] = []
    for number in range(PREFIXES):
        source = random.Random(_PREFIX_SEED + number)
        common.append([source.randrange(ids.start, ids.stop) for _ in range(load.shared_prefix)])
    own = random.Random(load.rank)
    for number in range(load.requests):
        rest = [own.randrange(ids.start, ids.stop) for _ in range(load.input)]
        yield common[number % PREFIXES] + rest


def request(load: Load, ids: Sequence[int]) -> bytes:
    """One whole HTTP request."""
    body = {
        "model": load.model,
        "prompt": ids,
        "max_tokens": load.output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return build_request(load.target, "POST", "/v1/completions", msgspec.json.encode(body))


class Client:
    """One process's requests and its connections."""

    def __init__(self, load: Load) -> None:
        self.answers: list[Answer] = []
        self._load = load
        self._pool = ConnectionPool(load.target)

    async def run(self) -> None:
        """Sends them all. Raises RuntimeError for the first answer that is not whole."""
        todo = prompts(self._load)
        workers = [asyncio.ensure_future(self._work(todo)) for _ in range(self._load.concurrency)]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            self._pool.close()

    async def _work(self, todo: Iterator[list[int]]) -> None:
        for ids in todo:
            self.answers.append(await self._ask(request(self._load, ids)))

    async def _ask(self, data: bytes) -> Answer:
        refusal: list[bytes] = []
        sent_at = time.monotonic()
        events = Events(sent_at)

        def sink(status: int) -> Sink:
            return events.feed if status == 200 else lambda piece, _now: refusal.append(piece)

        status = await self._pool.exchange(data, sink)
        if status != 200:
            raise RuntimeError(f"{status}: {error_message(b''.join(refusal))[:300]}")
        if events.error:
            raise RuntimeError(events.error)
        if events.tokens != self._load.output:
            raise RuntimeError(f"asked for {self._load.output} tokens, usage says {events.tokens}")
        if events.first_at is None:
            raise RuntimeError("an answer without any event")
        span_s = events.last_at - sent_at
        return Answer(events.first_at - sent_at, events.gaps_s, span_s, events.tokens)


def run_load(load: Load) -> Part:
    """One process's share, here and now."""
    client = Client(load)
    gc.freeze()  # what exists now need not be looked at while streams are timed
    began_at = time.time()
    failure = ""
    try:
        run_async(client.run())
    except (RuntimeError, ClientError, TimeoutError) as error:
        failure = f"client {load.rank}: {type(error).__name__}: {error}"
    return Part(client.answers, began_at, time.time(), failure)


def shares(load: Load, procs: int) -> list[Load]:
    """The load divided among processes, at most one for each open request."""
    procs = max(1, min(procs, load.concurrency))

    def share(total: int, rank: int) -> int:
        return total // procs + (rank < total % procs)

    return [
        msgspec.structs.replace(
            load,
            rank=rank,
            concurrency=share(load.concurrency, rank),
            requests=share(load.requests, rank),
        )
        for rank in range(procs)
    ]


def run_shares(loads: list[Load]) -> list[Part]:
    """A process for each. Raises RuntimeError if one of them dies."""
    context = mp.get_context("spawn")
    pipes: list[Pipe] = []
    processes: list[Any] = []
    try:
        for load in loads:
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            ours.send_bytes(msgspec.msgpack.encode(load))
            pipes.append(ours)
            processes.append(process)
        return [msgspec.msgpack.decode(pipe.recv_bytes(), type=Part) for pipe in pipes]
    except (EOFError, BrokenPipeError) as error:
        raise RuntimeError("a client process died; its own message is above") from error
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()


def _child(pipe: Pipe) -> None:
    """A client process: one load in, one part out."""
    load = msgspec.msgpack.decode(pipe.recv_bytes(), type=Load)
    pipe.send_bytes(msgspec.msgpack.encode(run_load(load)))


def percentile(values: Sequence[float], share: float) -> float:
    """The yardstick's: an element of the sorted values, in ms; 0.0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 if ordered else 0.0


def report_line(load: Load, parts: Sequence[Part]) -> str:
    """The figures of all processes' answers."""
    seconds = max(part.ended_at for part in parts) - min(part.began_at for part in parts)
    answers = [answer for part in parts for answer in part.answers]
    ttft_s = [answer.ttft_s for answer in answers]
    gaps_s = [gap for answer in answers for gap in answer.gaps_s]
    tpot_s = [(answer.span_s - answer.ttft_s) / max(1, answer.tokens - 1) for answer in answers]
    tokens = sum(answer.tokens for answer in answers)
    return (
        f"{load.model} c={load.concurrency} n={len(answers)} "
        f"in={load.shared_prefix}+{load.input} out={load.output}: "
        f"{tokens / seconds:.0f} tok/s {len(answers) / seconds:.2f} req/s "
        f"TTFT p50 {percentile(ttft_s, 0.5):.1f} p99 {percentile(ttft_s, 0.99):.1f} "
        f"TPOT p50 {percentile(tpot_s, 0.5):.2f} "
        f"ITL p50 {percentile(gaps_s, 0.5):.2f} p99 {percentile(gaps_s, 0.99):.2f} ms"
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "bench.closed_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    add("--model", required=True)
    add("-c", "--concurrency", type=int, default=1, help="default: %(default)s")
    add("-n", "--requests", type=int, default=8, help="default: %(default)s")
    add("-i", "--input", type=int, default=512, help="unique prompt tokens (%(default)s)")
    add("-o", "--output", type=int, default=128, help="tokens of each answer (%(default)s)")
    add("--shared-prefix", type=int, default=0, help="tokens shared by every eighth request")
    add("--vocab", type=int, default=30000, help="ids are below this (default: %(default)s)")
    add("--procs", type=int, default=1, help="client processes (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        target = parse_target(args.url)
    except ValueError as error:
        parser.error(str(error))
    load = Load(
        target,
        model=args.model,
        concurrency=args.concurrency,
        requests=args.requests,
        input=args.input,
        output=args.output,
        shared_prefix=args.shared_prefix,
        vocab=args.vocab,
        rank=0,
    )
    loads = shares(load, args.procs)
    try:
        parts = run_shares(loads) if len(loads) > 1 else [run_load(loads[0])]
    except RuntimeError as error:
        parts = [Part([], 0.0, 0.0, str(error))]
    failures = [part.failure for part in parts if part.failure]
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 1
    print(report_line(load, parts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
