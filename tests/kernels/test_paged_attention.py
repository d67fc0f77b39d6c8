"""Paged attention kernels against dense attention in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine.attention.base import AttentionRule
from engine.attention.paged import PagedStep
from engine.attention.paged_decode import (
    DecodeConfig,
    DecodeRows,
    decode_config,
    decode_splits,
    paged_decode,
    shared_bytes,
)
from engine.attention.paged_prefill import (
    SHORT_TILE,
    PrefillConfig,
    PrefillTiles,
    paged_prefill,
    prefill_config,
    prefill_tile,
)
from engine.kernels.launch import interpreted

pytestmark = pytest.mark.slow  # interpreted, where there is no card

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PLAIN = AttentionRule(0.3)
# An entry behind a row's own blocks: whoever reads there faults.
STALE = 2**30
MAX_BLOCKS = 64


class Heads(NamedTuple):
    kv_heads: int
    group: int
    head_dim: int


class Scene(NamedTuple):
    """One step: `rows` of (slot, start, count, first token), pages that hold what rows may see."""

    qkv: Tensor
    layer_kv: Tensor
    rows: Tensor
    tables: Tensor
    heads: Heads

    @property
    def q(self) -> Tensor:
        return self.qkv[:, : self.heads.kv_heads * self.heads.group]

    def empty(self) -> Tensor:
        """An output full of NaN."""
        width = self.heads.kv_heads * self.heads.group * self.heads.head_dim
        return self.q.new_full((self.q.shape[0], width), math.nan)


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers, and its product takes them for numbers."""
    if interpreted():
        from triton.runtime import interpreter

        product = interpreter.InterpreterBuilder.create_dot

        def wide(operand: Any) -> Any:
            data = operand.data
            if data.dtype != np.uint16:
                return operand
            data = (data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(data, interpreter.tl.float32)

        def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            return product(self, wide(a), wide(b), *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def make_scene(
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads,
    spans: list[tuple[int, int]],
    block_size: int,
) -> Scene:
    """Rows that compute (start, count) each, their blocks shuffled, all else in memory NaN."""
    torch.manual_seed(len(spans) * 1000 + heads.head_dim)
    kv_heads, group, head_dim = heads
    needed = [-(-(start + count) // block_size) for start, count in spans]
    blocks = torch.randperm(sum(needed) + 3).tolist()
    layer_kv = torch.full((2 * kv_heads, len(blocks), block_size, head_dim), math.nan)
    tables = torch.full((len(spans) + 1, MAX_BLOCKS), STALE, dtype=torch.int32)
    rows: list[tuple[int, int, int, int]] = []
    token = 0
    for number, (start, count) in enumerate(spans):
        slot = len(spans) - number
        mine = [blocks.pop() for _ in range(needed[number])]
        tables[slot, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for position in range(start + count):
            place = layer_kv[:, mine[position // block_size], position % block_size]
            place.copy_(torch.randn(2 * kv_heads, head_dim))
        rows.append((slot, start, count, token))
        token += max(count, 1)
    qkv = torch.randn(token, kv_heads * (group + 2), head_dim)
    return Scene(
        qkv.to(device, dtype),
        layer_kv.to(device, dtype),
        torch.tensor(rows, dtype=torch.int32, device=device),
        tables.to(device),
        heads,
    )


def expected(scene: Scene, row: int, rule: AttentionRule) -> Tensor:
    """[count, num_heads * head_dim] of one row, in float64."""
    slot, start, count, token = (int(value) for value in scene.rows[row])
    kv_heads, group, head_dim = scene.heads
    length = start + count
    block_size = scene.layer_kv.shape[2]
    blocks = scene.tables[slot, : -(-length // block_size)].long()
    pages = scene.layer_kv[:, blocks].reshape(2, kv_heads, -1, head_dim)[:, :, :length].double()
    keys, values = pages.repeat_interleave(group, 1)
    queries = scene.q[token : token + count].double()
    scores = torch.einsum("qhd,hld->hql", queries, keys) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    places = torch.arange(length, device=scores.device)
    ahead = places[start:, None] - places[None]
    hidden = (ahead < 0) | (ahead >= (rule.window or length))
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hql,hld->qhd", weights, values).reshape(count, -1)


def check_row(scene: Scene, out: Tensor, row: int, rule: AttentionRule) -> None:
    _, _, count, token = (int(value) for value in scene.rows[row])
    limit = TOLERANCE[scene.qkv.dtype]
    torch.testing.assert_close(
        out[token : token + count].double(), expected(scene, row, rule), rtol=limit, atol=limit
    )


def make_tiles(scene: Scene, rows: list[int], size: int) -> Tensor:
    tiles = [(row, first) for row in rows for first in range(0, int(scene.rows[row, 2]), size)]
    return torch.tensor([*tiles, (-1, 0)], dtype=torch.int32, device=scene.rows.device)


def decode_spans(lengths: list[int]) -> list[tuple[int, int]]:
    """Of contexts of these lengths; 0 is a padding row."""
    return [(max(length - 1, 0), min(length, 1)) for length in lengths]


def cases(listed: list[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], torch.dtype]]:
    """All in float32, every other one in the half types too: the interpreter is slow."""
    for number, case in enumerate(listed):
        yield case, torch.float32
        if number % 2 or not interpreted():
            yield case, torch.float16
            yield case, torch.bfloat16


def case_name(value: Any) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value)


DECODE_CASES = [
    # group, head_dim, block_size, rule, max_splits, config
    (1, 8, 16, PLAIN, 3, None),
    (3, 8, 4, AttentionRule(0.3, window=7), 5, DecodeConfig(16, 4, 1, True)),
    (4, 80, 16, AttentionRule(0.1, window=33, softcap=4.0), 4, DecodeConfig(16, 4, 2, True)),
    (16, 128, 32, AttentionRule(0.09, softcap=9.0), 1, None),
    (4, 256, 32, AttentionRule(0.06), 4, None),
    (1, 80, 4, AttentionRule(0.1, window=33, softcap=4.0), 4, DecodeConfig(16, 4, 1, False)),
    (1, 64, 32, AttentionRule(0.1), 2, DecodeConfig(16, 4, 1, True)),  # tiles within a block
]


def decode_rows(scene: Scene, count: int, max_splits: int) -> DecodeRows:
    kv_heads = scene.layer_kv.shape[0] // 2
    counters = torch.zeros(count * kv_heads, dtype=torch.int32, device=scene.q.device)
    return DecodeRows(scene.rows, scene.tables, count, max_splits, counters)


@pytest.mark.parametrize(("case", "dtype"), list(cases(DECODE_CASES)), ids=case_name)
def test_decode(device: torch.device, dtype: torch.dtype, case: tuple[Any, ...]) -> None:
    group, head_dim, block_size, rule, max_splits, config = case
    lengths = [1, 32, 0, 33, 70]
    scene = make_scene(device, dtype, Heads(2, group, head_dim), decode_spans(lengths), block_size)
    out = scene.empty()
    work = decode_rows(scene, len(lengths), max_splits)
    paged_decode(scene.q, scene.layer_kv, work, rule, out, config)
    assert not work.counters.any()
    for row, length in enumerate(lengths):
        if length:
            check_row(scene, out, row, rule)
        else:
            assert out[row].isnan().all()  # as it was: a chunk's token may lie there


def test_decode_of_many_splits_most_of_them_empty(device: torch.device) -> None:
    lengths = [5, 400, 16, 17]
    scene = make_scene(device, torch.float32, Heads(1, 2, 16), decode_spans(lengths), 16)
    out = scene.empty()
    work = decode_rows(scene, len(lengths), 40)
    paged_decode(scene.q, scene.layer_kv, work, PLAIN, out, DecodeConfig(16, 4, 1, True))
    for row in range(len(lengths)):
        check_row(scene, out, row, PLAIN)


def test_decode_of_a_full_card_does_not_split_short_rows(device: torch.device) -> None:
    """From 192 pairs of row and kv head on, a share has 2,048 tokens."""
    lengths = [2, *[0] * 190, 33]
    scene = make_scene(device, torch.float32, Heads(1, 1, 8), decode_spans(lengths), 16)
    out = scene.empty()
    work = decode_rows(scene, len(lengths), 2)
    paged_decode(scene.q, scene.layer_kv, work, PLAIN, out)
    check_row(scene, out, 0, PLAIN)
    check_row(scene, out, len(lengths) - 1, PLAIN)


PREFILL_CASES = [
    # group, head_dim, block_size, rule, tile size, config
    (1, 8, 16, PLAIN, 32, PrefillConfig(16, 4, 1)),
    (3, 8, 4, AttentionRule(0.3, window=7), 32, PrefillConfig(16, 4, 2)),
    (2, 80, 16, AttentionRule(0.1, window=40, softcap=4.0), 16, PrefillConfig(16, 4, 2)),
    (16, 64, 16, PLAIN, 64, None),
    (2, 128, 32, AttentionRule(0.09, softcap=9.0), SHORT_TILE, None),
    (1, 256, 32, AttentionRule(0.06), 32, PrefillConfig(16, 4, 1)),  # tiles within a block
]


@pytest.mark.parametrize(("case", "dtype"), list(cases(PREFILL_CASES)), ids=case_name)
def test_prefill(device: torch.device, dtype: torch.dtype, case: tuple[Any, ...]) -> None:
    group, head_dim, block_size, rule, size, config = case
    spans = [(0, 50), (61, 5), (32, 33), (0, 1)]
    scene = make_scene(device, dtype, Heads(1, group, head_dim), spans, block_size)
    out = scene.empty()
    tiles = make_tiles(scene, [0, 1, 3], size)
    work = PrefillTiles(scene.rows, scene.tables, tiles, len(tiles), size)
    paged_prefill(scene.q, scene.layer_kv, work, rule, out, config)
    for row in (0, 1, 3):
        check_row(scene, out, row, rule)
    first, count = int(scene.rows[2, 3]), int(scene.rows[2, 2])
    assert out[first : first + count].isnan().all()


def test_no_tile_of_a_window_is_left_out(device: torch.device) -> None:
    """Every way in which a window's edge and the diagonal fall into tiles of 16 keys."""
    scene = make_scene(device, torch.float32, Heads(1, 1, 8), [(0, 80), (37, 40)], 16)
    tiles = make_tiles(scene, [0, 1], 16)
    work = PrefillTiles(scene.rows, scene.tables, tiles, len(tiles), 16)
    for window in (1, 2, 16, 17, 33):
        rule = AttentionRule(0.3, window=window)
        out = scene.empty()
        paged_prefill(scene.q, scene.layer_kv, work, rule, out, PrefillConfig(16, 4, 1))
        check_row(scene, out, 0, rule)
        check_row(scene, out, 1, rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_of_decode_rows_and_chunks(device: torch.device, dtype: torch.dtype) -> None:
    spans = [*decode_spans([20, 0, 16]), (0, 20), (16, 3)]
    scene = make_scene(device, dtype, Heads(2, 2, 16), spans, 16)
    slots = [0] * scene.q.shape[0]
    for slot, start, count, token in scene.rows.tolist():
        for index in range(count):
            block, offset = divmod(start + index, 16)
            slots[token + index] = int(scene.tables[slot, block]) * 16 + offset
    # The padding row's token goes where nobody reads: a block that no table names.
    unused = set(range(scene.layer_kv.shape[1])) - set(scene.tables.flatten().tolist())
    slots[1] = unused.pop() * 16
    kv_slots = torch.tensor(slots, dtype=torch.int64, device=device)
    tiles = make_tiles(scene, [3, 4], SHORT_TILE)
    step = PagedStep(
        kv_slots, scene.rows, scene.tables, tiles, 3, 2, len(tiles), SHORT_TILE,
        torch.zeros(3 * 2, dtype=torch.int32, device=device),
    )  # fmt: skip
    step.store(scene.qkv, 4, scene.layer_kv, None)
    memory = scene.layer_kv.view(4, -1, 16)
    torch.testing.assert_close(memory[:, kv_slots], scene.qkv[:, 4:].transpose(0, 1))
    out = step.attend(scene.q, scene.layer_kv, PLAIN)
    assert out.shape == (scene.q.shape[0], 64)
    for row in (0, 2, 3, 4):
        check_row(scene, out, row, PLAIN)


def test_splits_fill_two_waves() -> None:
    assert decode_splits(1, 2, 8192, 132) == 128
    assert decode_splits(1, 2, 512, 132) == 8
    assert decode_splits(8, 2, 2048, 132) == 17
    assert decode_splits(128, 2, 2048, 132) == 1
    assert decode_splits(128, 2, 32768, 132) == 4
    assert decode_splits(0, 2, 0, 132) == 1


@pytest.mark.parametrize("compute", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_tiles_fit_into_shared_memory(
    compute: tuple[int, int], dtype: torch.dtype, head_dim: int
) -> None:
    row_bytes = max(1 << (head_dim - 1).bit_length(), 16) * dtype.itemsize
    for group, many in product((1, 4), (False, True)):
        decode = decode_config(dtype.itemsize, head_dim, group, many, compute)
        assert 2 * decode.tile * row_bytes * decode.num_stages <= shared_bytes(compute)
    size = prefill_tile(head_dim, dtype, compute)
    prefill = prefill_config(dtype.itemsize, head_dim, size, compute)
    stages = 2 * prefill.tile * row_bytes * prefill.num_stages
    assert size * row_bytes + stages <= shared_bytes(compute)
