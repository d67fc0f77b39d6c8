"""What the host's decisions cost per step: `python -m bench.micro.scheduler`.

Prints the medians of plan, commit and output beside the budget. Needs no device: the tokens of a
step are constants.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

from engine.blocks import BlockPool
from engine.plan import Sampled
from engine.prefix import PrefixIndex
from engine.protocol import Limits, Sampling, Submit, encode, pack_tokens
from engine.scheduler import Scheduler

BUDGET_US = 1000.0  # plan + commit + output of one step with 256 sequences
PROMPT_TOKENS = 512
BLOCK_SIZE = 32


def measure(num_sequences: int, num_steps: int) -> dict[str, float]:
    """Median µs per decode step of `num_sequences`, by part, with one step run ahead."""
    length = PROMPT_TOKENS + num_steps + BLOCK_SIZE
    limits = Limits(
        max_len=length + 1,
        vocab_size=32_000,
        block_size=BLOCK_SIZE,
        num_blocks=num_sequences * (length // BLOCK_SIZE + 2),
        max_batch=num_sequences,
    )
    pool = BlockPool(limits.num_blocks, limits.block_size, PrefixIndex(b"key"))
    scheduler = Scheduler(pool, limits, step_tokens=num_sequences * PROMPT_TOKENS)
    for number in range(num_sequences):
        size = PROMPT_TOKENS - number % BLOCK_SIZE  # block borders come at different steps
        prompt = [(number * 7919 + place * 31) % limits.vocab_size for place in range(size)]
        scheduler.add(
            Submit(0, number, pack_tokens(prompt), Sampling(), num_steps + BLOCK_SIZE, (2,))
        )
    plan = scheduler.plan()
    times: dict[str, list[float]] = {"plan": [], "commit": [], "output": [], "sum": []}
    sampled = Sampled([7] * num_sequences, {}, {}, {})
    for _ in range(num_steps):
        started = time.perf_counter()
        ahead = scheduler.plan()
        planned = time.perf_counter()
        if plan is None or ahead is None:
            raise RuntimeError("the benchmark's sequences ended early")
        scheduler.commit(plan, sampled)
        committed = time.perf_counter()
        output = scheduler.take_output()
        if output is not None:
            encode(output)
        sent = time.perf_counter()
        plan = ahead
        for part, seconds in (
            ("plan", planned - started),
            ("commit", committed - planned),
            ("output", sent - committed),
            ("sum", sent - started),
        ):
            times[part].append(seconds * 1e6)
    return {part: statistics.median(values) for part, values in times.items()}


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    gc.disable()  # as the engine's loop does
    medians = measure(options.sequences, options.steps)
    parts = ", ".join(f"{part} {value:.0f} µs" for part, value in medians.items())
    print(f"scheduler: {options.sequences} decode rows: {parts}; budget {BUDGET_US:.0f} µs")


if __name__ == "__main__":
    main()
