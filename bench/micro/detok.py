"""Cost per token of the text path: detokenizer, stop matcher, and both; encoding for comparison.

Run as `python -m bench.micro.detok`. Budget: 1 µs per token of detokenizing with one token a push.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

from router.text.detokenizer import Detokenizer
from router.text.pool import TextPool
from router.text.stops import StopMatcher, StopStrings

NUM_TOKENS = 20_000
REPEATS = 7
BUDGET_US = 1.0

WORDS = ("the", " quick", " brown", " fox", ".", "\n", " 你好", " é", ", and", " jumps", " over")
STOPS = ("\n\nUser:", "</answer>", " the end")


def make_pieces(vocab_size: int) -> list[bytes]:
    """A vocabulary of words and of part characters."""
    source = random.Random(1)
    pieces = [source.choice(WORDS).encode() for _ in range(vocab_size - 4)]
    return [*pieces, *(bytes([byte]) for byte in "😊".encode())]


def make_tokens(vocab_size: int) -> list[int]:
    """Mostly words, now and then an emoji of four tokens."""
    source = random.Random(2)
    tokens: list[int] = []
    while len(tokens) < NUM_TOKENS:
        emoji = source.random() < 0.02
        tokens += range(vocab_size - 4, vocab_size) if emoji else [source.randrange(vocab_size - 4)]
    return tokens[:NUM_TOKENS]


def best_us(function: Callable[[], object], count: int) -> float:
    """Microseconds per item, best of several runs."""
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) / count * 1e6


def detokenize(pieces: Sequence[bytes], tokens: list[int], chunk: int) -> list[str]:
    """Texts of the tokens, `chunk` at a time."""
    push = Detokenizer(pieces).push
    return [push(tokens[at : at + chunk]) for at in range(0, len(tokens), chunk)]


def match(texts: list[str], stops: StopStrings) -> None:
    """All texts through one matcher."""
    matcher = StopMatcher(stops)
    for text in texts:
        matcher.push(text)


async def hop_us(count: int = 500) -> float:
    """Microseconds of one trip to a thread and back."""
    pool = TextPool()
    start = time.perf_counter()
    for _ in range(count):
        await pool.run(int)
    elapsed = time.perf_counter() - start
    pool.close()
    return elapsed / count * 1e6


def main() -> int:
    """Prints the table; 1 if the budget is exceeded."""
    vocab_size = 50_000
    pieces, tokens = make_pieces(vocab_size), make_tokens(vocab_size)
    stops = StopStrings(STOPS)
    texts = detokenize(pieces, tokens, 1)
    hostile = ["</answe" if position % 2 else " the en" for position in range(NUM_TOKENS)]
    one = best_us(lambda: detokenize(pieces, tokens, 1), NUM_TOKENS)
    rows = {
        "detokenize, 1 token a push": one,
        "detokenize, 8 tokens a push": best_us(lambda: detokenize(pieces, tokens, 8), NUM_TOKENS),
        "stop matcher, 3 strings": best_us(lambda: match(texts, stops), NUM_TOKENS),
        "stop matcher, near misses": best_us(lambda: match(hostile, stops), NUM_TOKENS),
        "compile 3 stop strings (each)": best_us(lambda: StopStrings(STOPS), 1),
        "thread hop (each)": asyncio.run(hop_us()),
    }
    for name, value in rows.items():
        print(f"{name:32s} {value:8.3f} µs")
    print(f"budget: {BUDGET_US} µs for one token, {'kept' if one <= BUDGET_US else 'EXCEEDED'}")
    return 0 if one <= BUDGET_US else 1


if __name__ == "__main__":
    raise SystemExit(main())
