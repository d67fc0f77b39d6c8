"""The persistent batch of a GPU: per-slot state on the card, and one small upload a step.

Owns token rows, block tables and sampling parameters of all slots, and the buffer into which each
step's description goes. Sampled tokens are written into the token rows by the card itself, so a
step can be launched before the host has seen the one before it. Nothing here waits for the card.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.device.sampling import SlotSampling
from engine.device.step_shape import StepShape, max_tiles, tile_of
from engine.kernels.sampler import SamplerParams
from engine.kernels.step_inputs import apply_grows
from engine.plan import Grow, Row, StepPlan

_ROW_FIELDS, _TILE_FIELDS, _GROW_FIELDS = 4, 2, 3
_ALIGNMENT = 4  # sections begin at multiples of 16 bytes

IntArray = npt.NDArray[np.int32]
ByteArray = npt.NDArray[np.uint8]


class Staged(NamedTuple):
    """A step whose description is on its way to the card.

    `last_tokens[i]` is the index in the step of the last token of plan row i; `sampled` are the
    plan rows that sample, and the order in which their tokens are chosen.
    """

    shape: StepShape
    last_tokens: list[int]
    sampled: list[int]


class GpuBatch:
    """Device state of `max_batch` slots; steps of at most `max_tokens` tokens."""

    def __init__(
        self,
        max_batch: int,
        max_len: int,
        max_tokens: int,
        block_size: int,
        long_tile: int,
        device: torch.device,
    ) -> None:
        """`long_tile`: queries in a tile of prefill attention."""
        self._device = device
        self._long_tile = long_tile
        max_blocks = -(-max_len // block_size)
        self.tokens = torch.zeros((max_batch, max_len + 1), dtype=torch.int32, device=device)
        self.tables = torch.zeros((max_batch, max_blocks), dtype=torch.int32, device=device)
        self.sampling: list[SlotSampling | None] = [None] * max_batch
        self._params = _Params(max_batch, device)
        tiles = max_tiles(max_tokens, long_tile) + max_batch
        self._sections = _Sections(max_batch, tiles)
        self._step = torch.zeros(self._sections.size, dtype=torch.int32, device=device)
        self.rows = self._section("rows").view(-1, _ROW_FIELDS)
        self.tiles = self._section("tiles").view(-1, _TILE_FIELDS)
        self._grows = self._section("grows").view(-1, _GROW_FIELDS)
        self.sample_at = self._section("sample_at")
        self.sample_slots = self._section("sample_slots")
        self.sample_positions = self._section("sample_positions")

    @property
    def params(self) -> SamplerParams:
        """Sampling parameters of all slots, on the card."""
        return self._params.device

    def apply(self, plan: StepPlan) -> None:
        """Takes over the plan's new sequences; its grows go up with `stage`."""
        for admit in plan.admits:
            slot, known = admit.slot, np.array(admit.tokens, dtype=np.int32)
            _upload(self.tokens[slot, : len(known)], known)
            if admit.blocks:
                blocks = np.array(admit.blocks, dtype=np.int32)
                _upload(self.tables[slot, : len(blocks)], blocks)
            slot_sampling = SlotSampling.of(admit, self._device)
            self.sampling[slot] = slot_sampling
            self._params.set(slot, slot_sampling)
        if plan.admits:
            self._params.upload()

    def stage(self, rows: Sequence[Row], grows: Sequence[Grow]) -> Staged:
        """Sends the step's description up: decode rows first, then the chunks.

        A row of one token is a decode row, whatever it computes.
        """
        order = [i for i, row in enumerate(rows) if row.count == 1]
        num_decode = len(order)
        order += [i for i, row in enumerate(rows) if row.count > 1]
        longest = max((rows[i].count for i in order[num_decode:]), default=1)
        tile = tile_of(longest, self._long_tile)
        flat, tiles = array("i"), array("i")
        last_tokens = [0] * len(rows)
        total = 0
        for number, i in enumerate(order):
            row = rows[i]
            count = row.count
            flat.extend((row.slot, row.start, count, total))
            total += count
            last_tokens[i] = total - 1
            if number >= num_decode:
                for first in range(0, count, tile):
                    tiles.extend((number, first))
        sampled = [i for i, row in enumerate(rows) if row.samples]
        chosen = [rows[i] for i in sampled]
        grown = [
            (grow.slot, grow.at + place, block)
            for grow in grows
            for place, block in enumerate(grow.blocks)
        ]
        sections = self._sections
        buffer = sections.empty(total)
        sections.put(buffer, "rows", flat)
        sections.put(buffer, "tiles", tiles)
        sections.put(buffer, "sample_at", [last_tokens[i] for i in sampled])
        sections.put(buffer, "sample_slots", [row.slot for row in chosen])
        sections.put(buffer, "sample_positions", [row.start + row.count for row in chosen])
        sections.put(buffer, "grows", [value for triple in grown for value in triple])
        _upload(self._step, buffer)
        if grown:
            apply_grows(self._grows, len(grown), self.tables)
        shape = StepShape(total, num_decode, len(tiles) // _TILE_FIELDS, tile)
        return Staged(shape, last_tokens, sampled)

    def clear(self) -> None:
        """Leaves a step without rows in the buffer: what runs on it writes nothing that is used."""
        _upload(self._step, self._sections.empty(0))

    def _section(self, name: str) -> Tensor:
        return self._step[self._sections.span(name)]


class _Params:
    """Sampling parameters of all slots: one array on the host, one copy of it on the card."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._host = np.zeros(num_slots * 24, dtype=np.uint8)
        self._buffer = torch.zeros(num_slots * 24, dtype=torch.uint8, device=device)
        self._values = _param_arrays(torch.from_numpy(self._host), num_slots)
        self.device = _param_arrays(self._buffer, num_slots)

    def set(self, slot: int, sampling: SlotSampling) -> None:
        params, values = sampling.params, self._values
        values.seed[slot] = params.seed
        values.temperature[slot] = 0.0 if sampling.greedy else params.temperature
        values.top_p[slot] = params.top_p
        values.min_p[slot] = params.min_p
        values.top_k[slot] = params.top_k

    def upload(self) -> None:
        _upload(self._buffer, self._host)


def _param_arrays(buffer: Tensor, num_slots: int) -> SamplerParams:
    """Views of 24 bytes a slot: the seeds first, for their alignment."""
    words = buffer[8 * num_slots :].view(4, num_slots * 4)
    return SamplerParams(
        seed=buffer[: 8 * num_slots].view(torch.int64),
        temperature=words[0].view(torch.float32),
        top_p=words[1].view(torch.float32),
        min_p=words[2].view(torch.float32),
        top_k=words[3].view(torch.int32),
    )


class _Sections:
    """Where the parts of a step's description lie in its buffer of int32."""

    def __init__(self, max_batch: int, max_tiles: int) -> None:
        lengths = {
            "rows": max_batch * _ROW_FIELDS,
            "tiles": max_tiles * _TILE_FIELDS,
            "sample_at": max_batch,
            "sample_slots": max_batch,
            "sample_positions": max_batch,
            "grows": 2 * max_batch * _GROW_FIELDS,
        }
        self._spans: dict[str, slice] = {}
        at = 0
        for name, length in lengths.items():
            self._spans[name] = slice(at, at + length)
            at += -(-length // _ALIGNMENT) * _ALIGNMENT
        self.size = at

    def span(self, name: str) -> slice:
        return self._spans[name]

    def empty(self, total: int) -> IntArray:
        """A description without rows, of a step of `total` tokens."""
        buffer = np.zeros(self.size, dtype=np.int32)
        buffer[self._spans["rows"]][_ROW_FIELDS - 1 :: _ROW_FIELDS] = total
        for name in ("tiles", "grows", "sample_slots"):
            buffer[self._spans[name]] = -1
        return buffer

    def put(self, buffer: IntArray, name: str, values: Sequence[int]) -> None:
        start = self._spans[name].start
        assert start + len(values) <= self._spans[name].stop, f"too many {name} in one step"
        buffer[start : start + len(values)] = values


def upload_masks(rows: list[int], bits: IntArray, device: torch.device) -> tuple[Tensor, Tensor]:
    """`engine.plan.StepMasks` on their way to the card, for `engine.kernels.masks`."""
    numbers = torch.empty(len(rows), dtype=torch.int32, device=device)
    words = torch.empty(bits.shape, dtype=torch.int32, device=device)
    _upload(numbers, np.array(rows, dtype=np.int32))
    _upload(words, bits)
    return numbers, words


def _upload(target: Tensor, values: IntArray | ByteArray) -> None:
    """Queues a copy from memory that the card reads by itself, which torch keeps until then."""
    source = torch.from_numpy(values)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
