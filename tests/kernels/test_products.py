"""Products of few tokens with weights, and what is fused into them, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from engine.kernels.gemv import Epilogue, GemvConfig, gemv, gemv_gated
from engine.kernels.skinny import SkinnyConfig, skinny, skinny_gated

pytestmark = pytest.mark.slow  # interpreted, where there is no card

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Parts of the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SHAPES = [(10, 64), (7, 208), (33, 144)]  # no multiples of the tiles


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert float(error) < roundings * TOLERANCE[dtype]


def skip_where_dots_are_wrong(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16 and rows > 1:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16, not the values")


def randn(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def act(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=approximate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", [GemvConfig(), GemvConfig(64, 1), GemvConfig(128, 4, 2)])
def test_gemv(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], config: GemvConfig
) -> None:
    size, inner = shape
    x = randn(1, inner, device=device, dtype=dtype)
    weight = randn(size, inner, device=device, dtype=dtype)
    bias = randn(size, device=device, dtype=dtype)
    residual = randn(1, size, device=device, dtype=dtype)
    plain = x.double() @ weight.double().T
    close(gemv(x, weight, config=config), plain, dtype)
    epilogue = Epilogue(bias)
    close(gemv(x, weight, epilogue, config), plain + bias.double(), dtype)
    added = residual.clone()
    assert gemv(x, weight, Epilogue(bias, added), config) is added
    close(added, residual.double() + plain + bias.double(), dtype)
    assert torch.equal(gemv(x, weight, epilogue, config), gemv(x, weight, epilogue, config))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_gated(
    device: torch.device, dtype: torch.dtype, activation: Any, with_bias: bool, rows: int
) -> None:
    skip_where_dots_are_wrong(device, dtype, rows)
    size, inner = 20, 144
    x = randn(rows, inner, device=device, dtype=dtype) / 4
    weight = randn(2 * size, inner, device=device, dtype=dtype) / 4
    bias = randn(2 * size, device=device, dtype=dtype) if with_bias else None
    epilogue = Epilogue(bias)
    gate, up = (x.double() @ weight.double().T + (0 if bias is None else bias.double())).chunk(
        2, -1
    )
    if rows > 1:
        got = skinny_gated(x, weight, activation, epilogue, SkinnyConfig(16, 64))
    else:
        got = gemv_gated(x, weight, activation, epilogue)
    # Rounded three times: gate, up and the activation.
    close(got, act(gate, activation) * up, dtype, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [2, 3, 16, 20, 64])
@pytest.mark.parametrize("flipped", [True, False])
def test_skinny(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rows: int, flipped: bool
) -> None:
    skip_where_dots_are_wrong(device, dtype, rows)
    size, inner = shape
    x = randn(rows, inner, device=device, dtype=dtype)
    weight = randn(size, inner, device=device, dtype=dtype)
    bias = randn(size, device=device, dtype=dtype)
    residual = randn(rows, size, device=device, dtype=dtype)
    config = SkinnyConfig(16, 64, 4, 2, flipped)
    plain = x.double() @ weight.double().T
    close(skinny(x, weight, config=config), plain, dtype)
    close(skinny(x, weight, Epilogue(bias), config), plain + bias.double(), dtype)
    added = residual.clone()
    assert skinny(x, weight, Epilogue(None, added), config) is added
    close(added, residual.double() + plain, dtype)
