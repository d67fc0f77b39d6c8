"""Paged attention on a CUDA card: `python -m bench.micro.gpu_attention [--sweep] [--dtype NAME]`.

Checks each shape against dense attention in float32, then prints µs a layer within a CUDA graph of
up to 28 layers with keys and values of their own (so that L2 hides no reads), with GB/s and % of
the H100's read bandwidth for decode, TFLOP/s for prefill. `--sweep` tries program shapes and splits
as well, for about two minutes. Exits 1 if a check fails.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from engine.attention.base import AttentionRule
from engine.attention.paged_decode import (
    FEW_PAIRS,
    DecodeConfig,
    DecodeRows,
    decode_config,
    decode_splits,
    paged_decode,
)
from engine.attention.paged_prefill import (
    SHORT_TILE,
    PrefillConfig,
    PrefillTiles,
    paged_prefill,
    prefill_config,
    prefill_tile,
)

READ_GB_S = 3070.0
HEAD_DIM = 128
HEADS = 32
BLOCK_SIZE = 32
LAYERS = 28
KV_BYTES = 24e9
REPLAYS = 5
SWEEP_S = 140.0
# The longest context that the engine would have to allow for, in any shape.
MAX_LEN = 8192
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
RULE = AttentionRule(HEAD_DIM**-0.5)


class Shape(NamedTuple):
    """`rows` sequences that hold `start` tokens and compute `queries` more."""

    kv_heads: int
    rows: int
    start: int
    queries: int

    @property
    def name(self) -> str:
        length = self.start + self.queries
        kind = f"decode B{self.rows}" if self.queries == 1 else f"prefill {self.queries} of"
        return f"{kind} ctx{length} kv{self.kv_heads}x{HEADS // self.kv_heads}"


DECODES = [
    *(Shape(2, rows, length - 1, 1) for rows, length in
      ((1, 512), (1, 2048), (8, 2048), (32, 2048), (128, 2048), (256, 512))),
    *(Shape(32, rows, length - 1, 1) for rows, length in
      ((1, 2048), (8, 2048), (32, 512), (64, 1024))),
]  # fmt: skip
PREFILLS = [
    *(Shape(kv_heads, 1, 0, count) for kv_heads in (2, 32) for count in (512, 2048, 8192)),
    Shape(2, 1, 2040, 8),
    Shape(32, 1, 2040, 8),
]


class Scene(NamedTuple):
    """Inputs of one shape: `layers` of KV memory that share rows and tables."""

    shape: Shape
    q: Tensor
    layers: Tensor
    rows: Tensor
    tables: Tensor
    out: Tensor


def make_scene(shape: Shape, dtype: torch.dtype) -> Scene:
    """Random queries as a view of the packed product, random keys and values, shuffled blocks."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    per_row = -(-(shape.start + shape.queries) // BLOCK_SIZE)
    blocks = shape.rows * per_row
    layer_bytes = 2 * shape.kv_heads * blocks * BLOCK_SIZE * HEAD_DIM * dtype.itemsize
    layers = max(1, min(LAYERS, int(KV_BYTES / layer_bytes)))
    kv = torch.empty(
        (layers, 2 * shape.kv_heads, blocks, BLOCK_SIZE, HEAD_DIM), dtype=dtype, device=device
    )
    for layer in kv:
        layer.normal_()
    tables = torch.zeros((shape.rows, -(-MAX_LEN // BLOCK_SIZE)), dtype=torch.int32, device=device)
    order = torch.randperm(blocks, device=device).to(torch.int32)
    tables[:, :per_row] = order.view(shape.rows, per_row)
    rows = [(row, shape.start, shape.queries, row * shape.queries) for row in range(shape.rows)]
    tokens = shape.rows * shape.queries
    packed = torch.randn(tokens, HEADS + 2 * shape.kv_heads, HEAD_DIM, device=device, dtype=dtype)
    out = torch.empty((tokens, HEADS * HEAD_DIM), dtype=dtype, device=device)
    table = torch.tensor(rows, dtype=torch.int32, device=device)
    return Scene(shape, packed[:, :HEADS], kv, table, tables, out)


def decode_call(scene: Scene, splits: int, config: DecodeConfig | None) -> Callable[[], None]:
    """One step's decode attention, all layers."""
    pairs = scene.shape.rows * scene.shape.kv_heads
    counters = torch.zeros(pairs, dtype=torch.int32, device=scene.q.device)
    work = DecodeRows(scene.rows, scene.tables, scene.shape.rows, splits, counters)

    def call() -> None:
        for layer in scene.layers:
            paged_decode(scene.q, layer, work, RULE, scene.out, config)

    return call


def prefill_call(scene: Scene, size: int, config: PrefillConfig | None) -> Callable[[], None]:
    """One step's prefill attention, all layers."""
    shape = scene.shape
    tiles = [(row, first) for row in range(shape.rows) for first in range(0, shape.queries, size)]
    on_card = torch.tensor(tiles, dtype=torch.int32, device=scene.q.device)
    work = PrefillTiles(scene.rows, scene.tables, on_card, len(tiles), size)

    def call() -> None:
        for layer in scene.layers:
            paged_prefill(scene.q, layer, work, RULE, scene.out, config)

    return call


def largest_error(scene: Scene) -> float:
    """Of `out` after the last layer, as a part of the largest value of some rows and queries."""
    shape = scene.shape
    group = HEADS // shape.kv_heads
    length = shape.start + shape.queries
    worst = 0.0
    for row in sorted({0, shape.rows // 2, shape.rows - 1}):
        blocks = scene.tables[row, : -(-length // BLOCK_SIZE)].long()
        pages = scene.layers[-1][:, blocks].float().reshape(2, shape.kv_heads, -1, HEAD_DIM)
        keys, values = pages[:, :, :length].repeat_interleave(group, 1)
        for first in sorted({0, shape.queries // 2, max(shape.queries - 130, 0)}):
            last = min(first + 130, shape.queries)
            token = row * shape.queries
            queries = scene.q[token + first : token + last].float()
            scores = torch.einsum("qhd,hld->hql", queries, keys) * RULE.scale
            places = torch.arange(length, device=scores.device)
            hidden = places[None] > places[shape.start + first : shape.start + last, None]
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            wanted = torch.einsum("hql,hld->qhd", weights, values).flatten(1)
            got = scene.out[token + first : token + last].float()
            error = (got - wanted).abs().max() / wanted.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=math.inf)))
    return worst


def layer_us(scene: Scene, call: Callable[[], None]) -> float:
    """µs a layer, the median of replays of one CUDA graph. The first call compiles."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(scene.layers))
    return sorted(times)[len(times) // 2]


def rate(shape: Shape, dtype: torch.dtype, micros: float) -> str:
    """What the time means for the card."""
    tokens = shape.start + shape.queries
    read = 2 * shape.rows * tokens * shape.kv_heads * HEAD_DIM * dtype.itemsize / micros / 1e3
    if shape.queries <= SHORT_TILE:
        return f"{read:7.0f} GB/s {100 * read / READ_GB_S:5.1f} %"
    pairs = shape.queries * (shape.start + shape.queries / 2)
    return f"{4 * HEADS * HEAD_DIM * shape.rows * pairs / micros / 1e6:7.0f} TFLOP/s"


def tile_of(shape: Shape, dtype: torch.dtype) -> int:
    """What the host would choose."""
    if shape.queries <= SHORT_TILE:
        return SHORT_TILE
    return prefill_tile(HEAD_DIM, dtype, torch.cuda.get_device_capability())


def splits_of(shape: Shape) -> int:
    """What the host would choose."""
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    return decode_splits(shape.rows, shape.kv_heads, MAX_LEN, sm_count)


def defaults(dtype: torch.dtype) -> bool:
    """The table of the defaults; whether each check passed."""
    fine = True
    compute = torch.cuda.get_device_capability()
    for shape in (*DECODES, *PREFILLS):
        scene = make_scene(shape, dtype)
        if shape.queries == 1:
            splits = splits_of(shape)
            group = HEADS // shape.kv_heads
            many = shape.rows * shape.kv_heads > FEW_PAIRS
            chosen: object = (
                splits,
                *decode_config(dtype.itemsize, HEAD_DIM, group, many, compute),
            )
            call = decode_call(scene, splits, None)
        else:
            size = tile_of(shape, dtype)
            chosen = (size, *prefill_config(dtype.itemsize, HEAD_DIM, size, compute))
            call = prefill_call(scene, size, None)
        scene.out.fill_(float("nan"))
        call()
        error = largest_error(scene)
        right = error < TOLERANCE[dtype]
        fine = fine and right
        micros = layer_us(scene, call)
        print(
            f"{shape.name:32} {micros:9.1f} µs {rate(shape, dtype, micros):22}"
            f" error {error:.1e}{'' if right else ' WRONG'}  {chosen}",
            flush=True,
        )
        del scene, call
        torch.cuda.empty_cache()
    return fine


def decode_choices(shape: Shape) -> Iterator[tuple[int, DecodeConfig]]:
    """(splits, config): program shapes at the default number of splits, then other splits."""
    splits = splits_of(shape)
    configs = [
        DecodeConfig(tile, warps, stages, True)
        for tile, warps, stages in (
            (64, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 3), (32, 4, 4), (32, 2, 4), (128, 4, 2),
            (128, 8, 3),
        )
    ]  # fmt: skip
    if shape.kv_heads == HEADS:
        configs += [DecodeConfig(*one, False) for one in ((64, 4, 1), (32, 4, 1), (16, 4, 1))]
        configs.append(DecodeConfig(32, 2, 1, False))
    yield from product([splits], configs)
    usual = DecodeConfig(64, 4, 3, True)
    yield from product(sorted({max(splits // 2, 1), 2 * splits, 4 * splits}), [usual])


PREFILL_CHOICES = [
    (128, PrefillConfig(64, 8, 3)),
    (128, PrefillConfig(64, 8, 2)),
    (128, PrefillConfig(128, 8, 2)),
    (128, PrefillConfig(32, 8, 3)),
    (128, PrefillConfig(32, 4, 3)),
    (128, PrefillConfig(64, 4, 2)),
    (64, PrefillConfig(64, 4, 3)),
    (64, PrefillConfig(64, 4, 2)),
    (64, PrefillConfig(32, 4, 4)),
    (64, PrefillConfig(128, 4, 2)),
]
SHORT_CHOICES = [
    (16, PrefillConfig(64, 4, 3)),
    (16, PrefillConfig(64, 4, 4)),
    (16, PrefillConfig(128, 4, 3)),
    (16, PrefillConfig(128, 8, 3)),
    (16, PrefillConfig(32, 2, 4)),
]
# Decode first, and the shapes in which configurations differ most: time may run out.
SWEPT = [
    *(DECODES[place] for place in (4, 3, 1, 9, 6, 7)),
    *(PREFILLS[place] for place in (1, 0, 6, 2)),
]


def sweep(dtype: torch.dtype) -> None:
    """The table of alternatives, best first for each shape, until the time is over."""
    ends = time.monotonic() + SWEEP_S
    for shape in SWEPT:
        scene = make_scene(shape, dtype)
        calls: list[tuple[str, Callable[[], None]]] = []
        if shape.queries == 1:
            for splits, decode in decode_choices(shape):
                calls.append((f"splits {splits} {decode}", decode_call(scene, splits, decode)))
        else:
            choices = SHORT_CHOICES if shape.queries <= SHORT_TILE else PREFILL_CHOICES
            for size, prefill in choices:
                calls.append((f"queries {size} {prefill}", prefill_call(scene, size, prefill)))
        found: list[tuple[float, str]] = []
        for name, call in calls:
            if time.monotonic() > ends:
                print("sweep: out of time", flush=True)
                break
            try:
                found.append((layer_us(scene, call), name))
            except (RuntimeError, TritonError) as error:  # OutOfResources: too much shared memory
                print(f"{shape.name}: {name}: {type(error).__name__}", flush=True)
                continue
        for micros, name in sorted(found):
            rated = rate(shape, dtype, micros)
            print(f"{shape.name:32} {micros:9.1f} µs {rated:22} {name}", flush=True)
        del scene, calls
        torch.cuda.empty_cache()


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description="Times paged attention on a CUDA card.")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)
    if not torch.cuda.is_available():
        print("gpu_attention: no CUDA device")
        return 1
    print(f"{torch.cuda.get_device_name()}, {args.dtype}", flush=True)
    fine = defaults(dtype)
    if args.sweep:
        sweep(dtype)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
