"""Norm, rotation, gate, look-up and step inputs against the same in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.attention.base import Rotation
from engine.attention.reference import rotate_
from engine.models.parts import RmsNorm

pytest.importorskip("triton")

from engine.kernels.gated import embed, gated
from engine.kernels.norm import rms_norm
from engine.kernels.rope import rotate_and_store
from engine.kernels.step_inputs import SlotState, apply_grows, prepare_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=4 * tolerance)


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [576, 64, 100])
def test_rms_norm(device: torch.device, dtype: torch.dtype, offset: float, size: int) -> None:
    norm = RmsNorm(randn(size, device=device, dtype=dtype), 1e-5, offset)
    x = randn(3, size, device=device, dtype=dtype)
    close(rms_norm(x, norm.weight, norm.eps), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_within_the_packed_product(
    device: torch.device, dtype: torch.dtype
) -> None:
    norm = RmsNorm(randn(24, device=device, dtype=dtype), 1e-6)
    heads = randn(5, 8, 24, device=device, dtype=dtype)[:, 2:6]
    close(rms_norm(heads, norm.weight, norm.eps), norm(heads.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(device: torch.device, dtype: torch.dtype, activation: Any) -> None:
    gate_up = randn(3, 2 * 1100, device=device, dtype=dtype)
    gate, up = gate_up.chunk(2, -1)
    if activation == "silu":
        wanted = torch.nn.functional.silu(gate) * up
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        wanted = torch.nn.functional.gelu(gate, approximate=approximate) * up
    close(gated(gate_up, activation), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 5.5])
def test_embed(device: torch.device, dtype: torch.dtype, scale: float) -> None:
    table = randn(50, 1030, device=device, dtype=dtype)
    ids = torch.tensor([3, 49, 0, 3], device=device)
    close(embed(ids, table, scale), table[ids] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("head_dim", "dim"), [(64, 64), (128, 64), (80, 32), (8, 8), (80, 80)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (0, 2)])
def test_rotate_and_store(
    device: torch.device,
    dtype: torch.dtype,
    interleaved: bool,
    head_dim: int,
    dim: int,
    heads: int,
    kv_heads: int,
) -> None:
    qkv = randn(5, heads + 2 * kv_heads, head_dim, device=device, dtype=dtype)
    angles = randn(5, dim // 2, device=device)
    turns = torch.polar(torch.full_like(angles, 1.5), angles)
    pages = torch.full((2 * kv_heads, 4, 4, head_dim), 7.0, device=device, dtype=dtype)
    slots = torch.tensor([9, 2, 15, 0, 6], device=device)
    wanted, before = qkv.clone(), pages.clone()
    rotate_(wanted[:, : heads + kv_heads], Rotation(turns, interleaved))
    before.view(2 * kv_heads, 16, head_dim)[:, slots] = wanted[:, heads:].transpose(0, 1)
    rotate_and_store(qkv, heads, slots, pages, turns, interleaved)
    close(qkv[:, :heads], wanted[:, :heads])
    close(pages, before)


def test_store_without_rotation(device: torch.device) -> None:
    qkv = randn(3, 6, 16, device=device)
    pages = torch.zeros(4, 2, 4, 16, device=device)
    slots = torch.tensor([7, 1, 4], device=device)
    rotate_and_store(qkv.clone(), 2, slots, pages, None, False)
    assert torch.equal(pages.view(4, 8, 16)[:, slots], qkv[:, 2:].transpose(0, 1))
    assert int((pages != 0).any(-1).sum()) == 4 * 3


@pytest.mark.parametrize("num_rows", [4, 5, 8, 31])
def test_prepare_inputs(device: torch.device, num_rows: int) -> None:
    """Decode rows, a chunk, padding behind them; all rows of the buffer in use or not."""
    block_size, pad = 4, 999
    plan = [(2, 5, 1), (0, 0, 1), (1, 3, 7), (3, 8, 2)]
    tokens = torch.arange(4 * 20, dtype=torch.int32).view(4, 20) + 100
    tables = torch.randperm(4 * 5, generator=torch.Generator().manual_seed(1)).int().view(4, 5)
    total = sum(count for _, _, count in plan)
    rows = torch.tensor([(0, 0, 0, total)] * num_rows, dtype=torch.int32)
    wanted: list[tuple[int, int, int]] = []
    for number, (slot, start, count) in enumerate(plan):
        rows[number] = torch.tensor((slot, start, count, len(wanted)))
        for at in range(start, start + count):
            block = int(tables[slot, at // block_size])
            wanted.append((int(tokens[slot, at]), at, block * block_size + at % block_size))
    wanted += [(0, 0, pad)] * 130
    outputs = torch.full((3, len(wanted)), -5, dtype=torch.int64, device=device)
    ids, positions, kv_slots = outputs
    state = SlotState(rows.to(device), tokens.to(device), tables.to(device), block_size)
    prepare_inputs(state, pad, ids, positions, kv_slots)
    assert outputs.T.tolist() == [list(values) for values in wanted]


def test_apply_grows(device: torch.device) -> None:
    tables = torch.zeros(3, 8, dtype=torch.int32, device=device)
    grows = torch.tensor([(1, 3, 44), (0, 7, 5), (-1, 0, 9), (2, 1, 6)], dtype=torch.int32)
    apply_grows(grows.to(device), 3, tables)
    wanted = torch.zeros(3, 8, dtype=torch.int32)
    wanted[1, 3], wanted[0, 7] = 44, 5
    assert torch.equal(tables.cpu(), wanted)
