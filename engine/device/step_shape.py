"""Sizes of a GPU step, and the few sizes that graphs are captured for. Pure; no torch.

A captured graph does the same work whatever is in its buffers, so a step runs in the smallest one
that holds it and the rest is padding.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

# Tokens of a step with prompts. Dense where a step still costs little more than its weights.
_PROMPT_TOKENS = (16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)
# Tokens and decode rows of a step with both; its size is the scheduler's choice (`step_size`), so
# that few sizes serve.
_MIXED_TOKENS = (32, 64, 128, 256, 384, 512, 640, 768, 1024)
_MIXED_ROWS = (8, 32, 64, 128, 256, 512)
# Captured before the others: what most mixed steps are padded to.
_USUAL_TOKENS = (256, 384, 640, 512, 1024, 64, 128)
_LONGEST_END = 256
_SPARE_TILES = 8
# Chunks up to here are cut into short tiles: there is more to gain from more programs.
_SHORT_CHUNK = 64
SHORT_TILE = 16


class StepShape(NamedTuple):
    """What the kernels of one step are launched for.

    `tokens` are computed in all; the first `decode_rows` of them are one each of as many sequences;
    the others are cut into `tiles` of up to `tile` queries for prefill attention.
    """

    tokens: int
    decode_rows: int
    tiles: int
    tile: int


def decode_buckets(max_batch: int) -> tuple[int, ...]:
    """Numbers of rows that decode graphs are captured for, rising, up to `max_batch`."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, max_batch, 16)]
    return (*(size for size in sizes if size < max_batch), max_batch)


def tile_of(longest_chunk: int, long_tile: int) -> int:
    """Queries of a tile in a step whose longest chunk has so many."""
    return min(SHORT_TILE, long_tile) if longest_chunk <= _SHORT_CHUNK else long_tile


def max_tiles(max_tokens: int, long_tile: int) -> int:
    """Tiles that any captured or exact shape reads, of steps of up to `max_tokens`."""
    return -(-max(max_tokens, _PROMPT_TOKENS[-1]) // tile_of(1, long_tile)) + _SPARE_TILES


def captured_shape(exact: StepShape, decode: tuple[int, ...]) -> StepShape | None:
    """The captured shape that an exact one is padded to; None if it is to be launched as it is.

    `decode` are the engine's decode buckets.
    """
    if exact.decode_rows == exact.tokens:
        rows = _at_least(exact.tokens, decode)
        return StepShape(rows, rows, 0, exact.tile) if rows else None
    tokens = _at_least(exact.tokens, _MIXED_TOKENS if exact.decode_rows else _PROMPT_TOKENS)
    rows = min(_at_least(exact.decode_rows, (0, *_MIXED_ROWS)), decode[-1])
    if not tokens or rows < exact.decode_rows:
        return None
    shape = _with_prompts(tokens, rows, exact.tile)
    return shape if exact.tiles <= shape.tiles else None


def first_shapes(decode: tuple[int, ...], long_tile: int) -> list[StepShape]:
    """Shapes to be captured while nothing else is to be done: the likeliest first."""
    rows = [StepShape(size, size, 0, tile_of(1, long_tile)) for size in decode]
    prompts = [_with_prompts(size, 0, tile_of(size, long_tile)) for size in _PROMPT_TOKENS]
    mixed = [
        _with_prompts(tokens, min(beside, decode[-1]), tile_of(tokens, long_tile))
        for tokens in _USUAL_TOKENS
        for beside in _MIXED_ROWS
        if beside < tokens and (beside == _MIXED_ROWS[0] or beside // 2 < decode[-1])
    ]
    # What is left of prompts in the end is short, whatever else the step does.
    ends = [
        _with_prompts(shape.tokens, shape.decode_rows, SHORT_TILE)
        for shape in mixed
        if shape.tile > SHORT_TILE and shape.tokens <= _LONGEST_END
    ]
    return [*rows[:4], *prompts, *mixed[:5], *rows[4:], *mixed[5:], *ends]


def _with_prompts(tokens: int, decode_rows: int, tile: int) -> StepShape:
    return StepShape(tokens, decode_rows, -(-tokens // tile) + _SPARE_TILES, tile)


def _at_least(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`; 0 if there is none."""
    return buckets[bisect_left(buckets, size)] if size <= buckets[-1] else 0
