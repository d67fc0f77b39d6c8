"""A linear layer on a card, whichever kernel multiplies: up to 16 rows and beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine.quant.base import DenseLinear
from engine.quant.dense_gpu import DenseGpuLinear, dense_gpu_method, fast_products
from engine.quant.fast_products import FastProducts

pytestmark = pytest.mark.slow  # interpreted, where there is no card

ROWS = [1, 2, 8, 16, 17]
SIZE, INNER = 48, 144  # no multiples of the tiles
TOLERANCE = 2e-3  # of the largest value, float16


class Layer:
    """The layer under test, and what it should compute."""

    def __init__(self, device: torch.device, size: int, *, bias: bool) -> None:
        self.weight = made(size, INNER, device=device) / 8
        self.bias = made(size, device=device) if bias else None
        self.linear = DenseGpuLinear(self.weight, self.bias, FastProducts())

    def exact(self, x: Tensor) -> Tensor:
        wide = x.double() @ self.weight.double().T
        return wide if self.bias is None else wide + self.bias.double()


def made(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, torch.float16)


def close(got: Tensor, wanted: Tensor, roundings: int = 1) -> None:
    assert got.dtype == torch.float16
    assert got.shape == wanted.shape
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert float(error) < roundings * TOLERANCE


def silu_gated(linear: DenseGpuLinear) -> Callable[[Tensor], Tensor]:
    def product(x: Tensor) -> Tensor:
        return linear.gated(x, "silu")

    return product


def act(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=approximate)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_sum(device: torch.device, rows: int, bias: bool) -> None:
    layer = Layer(device, SIZE, bias=bias)
    x = made(rows, INNER, device=device)
    close(layer.linear(x), layer.exact(x))
    residual = made(rows, SIZE, device=device)
    added = residual.clone()
    got = layer.linear.add(x, added)
    assert got is added
    close(got, residual.double() + layer.exact(x))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_gated(device: torch.device, rows: int, activation: Any, bias: bool) -> None:
    layer = Layer(device, 2 * SIZE, bias=bias)
    x = made(rows, INNER, device=device)
    gate, up = layer.exact(x).chunk(2, -1)
    # Rounded three times: gate, up and the activation.
    close(layer.linear.gated(x, activation), act(gate, activation) * up, 3)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_the_same_bits_in_every_run_and_beside_any_other_rows(
    device: torch.device, rows: int
) -> None:
    layer = Layer(device, 2 * SIZE, bias=True)
    x = made(rows, INNER, device=device)
    beside = x.clone()
    beside[1:] = 7
    for product in (layer.linear, silu_gated(layer.linear)):
        first = product(x)
        assert torch.equal(first, product(x))
        assert torch.equal(first[:1], product(beside)[:1])


def test_a_row_has_the_same_bits_in_a_batch_of_any_size(device: torch.device) -> None:
    layer = Layer(device, SIZE, bias=True)
    x = made(16, INNER, device=device)
    whole = layer.linear(x)
    for rows in (2, 3, 8):
        assert torch.equal(layer.linear(x[:rows]), whole[:rows])


def test_memory_and_the_choice_of_a_layer() -> None:
    cpu = torch.device("cpu")
    layer = Layer(cpu, SIZE, bias=True)
    assert layer.linear.nbytes == (SIZE * INNER + SIZE) * 2
    for dtype in (torch.float16, torch.float32):
        assert fast_products(cpu, dtype) is None
    assert isinstance(dense_gpu_method(None)(layer.weight, None), DenseLinear)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_our_kernels_take_what_they_can_read_in_whole_vectors() -> None:
    card = torch.device("cuda:0")
    layer = Layer(card, SIZE, bias=True)
    method = dense_gpu_method(fast_products(card, torch.float16))
    assert isinstance(method(layer.weight, layer.bias), DenseGpuLinear)
    assert isinstance(method(layer.weight[:, :90], None), DenseLinear)
