"""Quantized linear layers on a GPU, against products in float64."""

from __future__ import annotations

import pytest
import torch

from engine.config import QuantName
from engine.quant.methods import linear_method

pytestmark = pytest.mark.gpu

ERRORS: dict[QuantName, float] = {"none": 0.004, "int8": 0.012, "bnb-int8": 0.02, "nf4": 0.12}


@pytest.mark.parametrize("quant", list(ERRORS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(320, 448), (4608, 4096), (250, 48), (65, 96)])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 600])
def test_products(quant: QuantName, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    if quant in ("bnb-int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, generator=generator).to(dtype)

    weight, bias, x = random(*shape), random(shape[0]), random(rows, shape[1])
    x[:, 3] *= 20.0  # an outlier, as models have them
    linear, residual = linear_method(quant, device, dtype)(weight, bias), random(rows, shape[0])
    want = x.double() @ weight.double().t() + bias.double()
    assert float((linear(x) - want).std()) < ERRORS[quant] * float(want.std())
    added = linear.add(x, residual.clone()).double()
    assert float((added - residual - linear(x)).abs().max()) < 0.02 * float(want.abs().max())


@pytest.mark.parametrize("quant", list(ERRORS))
def test_input_with_strides(quant: QuantName) -> None:
    """As the MLP hands it over: the left half of a wider product."""
    if quant in ("bnb-int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    device = torch.device("cuda")
    weight = torch.randn(256, 512, device=device).half()
    x = torch.randn(40, 1024, device=device).half()[:, :512]
    linear = linear_method(quant, device, torch.float16)(weight, None)
    torch.testing.assert_close(linear(x), linear(x.contiguous()))


def test_int8_in_a_graph() -> None:
    device = torch.device("cuda")
    weight, x = torch.randn(320, 448, device=device), torch.randn(3, 448, device=device)
    linear = linear_method("int8", device, torch.float16)(weight.half(), None)
    inputs = x.half()
    want = linear(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)
