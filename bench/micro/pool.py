"""What the block pool costs: `python -m bench.micro.pool`.

Prints, for one prompt of 2,048 tokens, the medians of looking it up, of taking and releasing its
blocks, and of making them reusable, beside their budgets.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

from engine.blocks import BlockPool
from engine.prefix import PrefixIndex

PROMPT_TOKENS = 2048
BLOCK_SIZE = 32
NUM_BLOCKS = 16_384
ROUNDS = 300
BUDGETS_US = {"hit": 200.0, "miss": 100.0, "take+release": 100.0, "seal": 400.0}


def measure() -> dict[str, float]:
    """Median µs by operation, in a pool whose blocks all hold other prompts."""
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, PrefixIndex(b"key"))
    count = PROMPT_TOKENS // BLOCK_SIZE
    for number in range(NUM_BLOCKS // count):
        blocks = pool.take(count)
        _seal(pool, _prompt(number), blocks)
        pool.release(reversed(blocks))
    times: dict[str, list[float]] = {name: [] for name in BUDGETS_US}
    for number in range(ROUNDS):
        prompt = _prompt(1_000_000 + number)
        lookup = partial(pool.match, prompt, [pool.root(b"")], PROMPT_TOKENS)
        times["miss"].append(_timed(lookup))
        blocks = pool.take(count)
        times["seal"].append(_timed(partial(_seal, pool, prompt, blocks)))
        pool.release(reversed(blocks))
        times["hit"].append(_timed(lookup))
        times["take+release"].append(_timed(lambda: pool.release(reversed(pool.take(count)))))
    return {name: statistics.median(values) for name, values in times.items()}


def _prompt(number: int) -> list[int]:
    return [(number * 7919 + place * 31) % 32_000 for place in range(PROMPT_TOKENS)]


def _seal(pool: BlockPool, tokens: list[int], blocks: list[int]) -> None:
    chain = [pool.root(b"")]
    for number, block in enumerate(blocks):
        pool.seal(tokens, chain, number, block)


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e6


def main() -> None:
    """Prints one line."""
    gc.disable()
    medians = measure()
    parts = ", ".join(
        f"{name} {value:.0f} µs (budget {BUDGETS_US[name]:.0f})" for name, value in medians.items()
    )
    print(f"pool: {PROMPT_TOKENS} tokens in blocks of {BLOCK_SIZE}: {parts}")


if __name__ == "__main__":
    main()
