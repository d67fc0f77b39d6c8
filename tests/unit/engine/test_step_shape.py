"""Shapes that graphs are captured for: each exact step fits into the one it is padded to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.device.step_shape import (
    SHORT_TILE,
    StepShape,
    captured_shape,
    decode_buckets,
    first_shapes,
    max_tiles,
    tile_of,
)

LONG_TILE = 128


@pytest.mark.parametrize("max_batch", [1, 3, 8, 64, 256, 300])
def test_buckets_rise_to_the_batch_and_hold_every_number_of_rows(max_batch: int) -> None:
    buckets = decode_buckets(max_batch)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == max_batch
    for rows in range(1, max_batch + 1):
        padded = captured_shape(StepShape(rows, rows, 0, SHORT_TILE), buckets)
        assert padded is not None
        assert rows <= padded.decode_rows == padded.tokens <= max(2 * rows, 16)
    assert captured_shape(StepShape(max_batch + 1, max_batch + 1, 0, 16), buckets) is None


@given(
    decodes=st.integers(0, 256),
    chunks=st.lists(st.integers(2, 900), min_size=1, max_size=40),
    max_batch=st.sampled_from([8, 64, 256]),
)
def test_a_step_fits_into_its_graph(decodes: int, chunks: list[int], max_batch: int) -> None:
    tile = tile_of(max(chunks), LONG_TILE)
    tiles = sum(-(-count // tile) for count in chunks)
    exact = StepShape(decodes + sum(chunks), decodes, tiles, tile)
    padded = captured_shape(exact, decode_buckets(max_batch))
    if padded is None:
        return
    assert padded.tokens >= exact.tokens
    assert padded.decode_rows >= exact.decode_rows
    assert (padded.decode_rows == 0) == (decodes == 0)
    assert padded.tiles >= exact.tiles
    assert padded.tile == exact.tile
    assert padded.tiles <= max_tiles(exact.tokens, LONG_TILE) + max_batch


def test_long_steps_are_launched_as_they_are() -> None:
    buckets = decode_buckets(256)
    assert captured_shape(StepShape(2049, 0, 17, LONG_TILE), buckets) is None
    assert captured_shape(StepShape(1025, 3, 9, LONG_TILE), buckets) is None
    assert captured_shape(StepShape(600, 500, 5, LONG_TILE), buckets) is None


@pytest.mark.parametrize("max_batch", [1, 8, 256])
def test_what_is_captured_first_is_what_steps_are_padded_to(max_batch: int) -> None:
    buckets = decode_buckets(max_batch)
    shapes = first_shapes(buckets, LONG_TILE)
    assert len(set(shapes)) == len(shapes)
    assert shapes[0] == StepShape(1, 1, 0, SHORT_TILE)
    padded_to = {
        captured_shape(StepShape(rows, rows, 0, SHORT_TILE), buckets)
        for rows in range(1, max_batch + 1)
    }
    assert padded_to <= set(shapes)
    assert captured_shape(StepShape(512, 0, 4, LONG_TILE), buckets) in shapes
