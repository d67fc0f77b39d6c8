"""What sizes of steps would give, without a card: the real scheduler, an H100's step times.

    python -m bench.step_sizes                   # closed loops of 512 in, 128 out, 8 to 256 clients
    python -m bench.step_sizes --mixed 256,640   # the largest step beside decode rows, one by one

Owns the simulated clock and clients. Times are those of ChatGLM2-6B (bench/results/h100-steps-*);
`--products` leaves nothing of a step but its products, the reading of keys and values and the head.
Before the sizes of `policy.StepSizes` were chosen, the same simulation with the old ones gave five
measured rates within 3 %. Prints a line for each size and number of clients.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from engine.blocks import BlockPool
from engine.plan import Sampled, StepPlan
from engine.protocol import Limits, Sampling, Submit, pack_tokens
from engine.scheduler import Scheduler

PROMPT, OUTPUT, STEP_TOKENS = 512, 128, 2048
CLIENTS = (8, 32, 64, 128, 256)
BLOCK, BLOCKS = 32, 60_000
LATENCY_MS, HOST_MS = 1.5, 0.6  # from an answer to the next request; of planning one step
KV_MS_PER_ROW = 576 * 28_672 / 3.07e9
HEAD_MS = 0.18

Curve = Sequence[tuple[int, float]]
DECODE: Curve = (
    (1, 4.4), (8, 4.8), (16, 4.9), (32, 5.05), (64, 5.5), (128, 6.2), (256, 7.9),
)  # fmt: skip
ALONE: Curve = (
    (16, 4.7), (64, 5.0), (128, 5.4), (256, 6.5), (512, 9.9), (1024, 19.8), (2048, 39.5),
)  # fmt: skip
# Beside decode rows, which cost `ROW_MS` each; steps are padded to the next of these sizes.
MIXED: Curve = (
    (32, 5.0), (64, 5.3), (128, 5.7), (256, 6.7), (384, 8.8), (512, 11.1), (640, 13.3),
    (768, 16.0), (1024, 21.2), (1280, 26.8), (2048, 41.3),
)  # fmt: skip
ROW_MS = 0.006
PRODUCTS: Curve = (
    (1, 3.9), (16, 4.3), (64, 4.54), (128, 4.7), (256, 5.5), (384, 7.2), (512, 9.1), (640, 10.9),
    (768, 13.4), (1024, 17.3), (1280, 22.3), (2048, 33.9),
)  # fmt: skip


class Outcome(NamedTuple):
    """Of one closed loop."""

    tok_s: float
    ttft_p50_ms: float
    itl_p99_ms: float


def at(curve: Curve, size: int) -> float:
    """Between the points of a curve, linearly; beyond its ends, the end."""
    for (low, before), (high, after) in pairwise(curve):
        if size <= high:
            return before + (after - before) * max(size - low, 0) / (high - low)
    return curve[-1][1]


def step_ms(plan: StepPlan, *, products: bool) -> float:
    """How long the card takes."""
    tokens = sum(row.count for row in plan.rows)
    decodes = sum(row.count == 1 for row in plan.rows)
    if products:
        return at(PRODUCTS, tokens) + decodes * KV_MS_PER_ROW + HEAD_MS
    if decodes == tokens:
        return at(DECODE, tokens)
    if not decodes:
        return at(ALONE, tokens)
    padded = next(size for size, _ in MIXED if size >= tokens)
    return at(MIXED, padded) + decodes * ROW_MS


class Loop:
    """So many requests always open, `requests` in all; the host one step ahead of the card."""

    def __init__(self, clients: int, requests: int, mixed_tokens: int, *, products: bool) -> None:
        limits = Limits(
            max_len=4096, vocab_size=65_024, block_size=BLOCK, num_blocks=BLOCKS, max_batch=256
        )
        pool = BlockPool(BLOCKS, BLOCK, None)
        self._scheduler = Scheduler(
            pool, limits, step_tokens=STEP_TOKENS, mixed_tokens=mixed_tokens
        )
        self._products = products
        self._random = random.Random(0)
        self._requests = requests
        self._arrivals: list[tuple[float, int]] = []
        self._sent = 0
        self._now = 0.0
        self._born: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._first_ms: list[float] = []
        self._gaps_ms: list[float] = []
        for number in range(clients):
            self._send(LATENCY_MS + 0.1 * number)

    def run(self) -> Outcome:
        """Until all requests are answered."""
        scheduler, free, done = self._scheduler, 0.0, 0
        launched: deque[tuple[StepPlan, float]] = deque()
        while done < self._requests:
            if not scheduler.busy and not launched:
                self._now = max(self._now, self._arrivals[0][0])
            self._receive()
            plan = scheduler.plan()
            if plan is not None:
                free = max(self._now, free) + step_ms(plan, products=self._products)
                launched.append((plan, free))
                self._now += HOST_MS
            if len(launched) > (0 if plan is None else 1):
                oldest, end = launched.popleft()
                self._now = max(self._now, end)
                tokens = [1000] * sum(row.samples for row in oldest.rows)
                scheduler.commit(oldest, Sampled(tokens, {}, {}, {}))
            done += self._answer()
        firsts, gaps = sorted(self._first_ms), sorted(self._gaps_ms)
        rate = self._requests * OUTPUT / self._now * 1e3
        return Outcome(rate, firsts[len(firsts) // 2], gaps[int(0.99 * len(gaps))])

    def _send(self, when_ms: float) -> None:
        if self._sent < self._requests:
            heapq.heappush(self._arrivals, (when_ms, self._sent))
            self._sent += 1

    def _receive(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self._now:
            when_ms, number = heapq.heappop(self._arrivals)
            self._born[number] = when_ms - LATENCY_MS
            tokens = pack_tokens([self._random.randrange(10, 30_000) for _ in range(PROMPT)])
            self._scheduler.add(Submit(0, number, tokens, Sampling(temperature=0.0), OUTPUT))

    def _answer(self) -> int:
        """Takes the step's news to the clients; how many requests ended with it."""
        output = self._scheduler.take_output()
        if output is None:
            return 0
        for number in output.ids:
            if number in self._last:
                self._gaps_ms.append(self._now - self._last[number])
            else:
                self._first_ms.append(self._now - self._born[number])
            self._last[number] = self._now
        for _ in output.finished:
            self._send(self._now + LATENCY_MS + self._random.random() / 2)
        return len(output.finished)


def main() -> int:
    """Prints the lines; returns an exit code."""
    parser = argparse.ArgumentParser("bench.step_sizes", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--mixed", default="640", help="tokens (default: %(default)s)")
    parser.add_argument("--products", action="store_true", help="nothing but products and reading")
    options = parser.parse_args()
    for size in map(int, options.mixed.split(",")):
        for clients in CLIENTS:
            loop = Loop(clients, max(32, 3 * clients), size, products=options.products)
            tok_s, ttft, itl = loop.run()
            print(f"{size} tokens, {clients} clients: {tok_s:.0f} tok/s, first token p50 "
                  f"{ttft:.0f} ms, gaps p99 {itl:.1f} ms", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
