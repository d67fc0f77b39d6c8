"""Linear layers in oneDNN's layout: any number of rows, and few different ones below."""

from __future__ import annotations

import pytest
import torch

from engine.quant.base import DenseLinear
from engine.quant.packed import PackedLinear, cpu_method, extra_rows


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("count", [1, 16, 17, 63, 65, 129, 300])
def test_products_are_those_of_plain_layers(count: int, with_bias: bool) -> None:
    if cpu_method(torch.float32) is not PackedLinear:
        pytest.skip("this build of torch has no packed linears")
    rows = torch.Generator().manual_seed(count)
    weight, bias = torch.randn(24, 40, generator=rows), torch.randn(24, generator=rows)
    x, residual = torch.randn(count, 40, generator=rows), torch.randn(count, 24, generator=rows)
    packed = PackedLinear(weight, bias if with_bias else None)
    plain = DenseLinear(weight, bias if with_bias else None)
    torch.testing.assert_close(packed(x), plain(x))
    torch.testing.assert_close(packed.add(x, residual), plain.add(x, residual))


def test_few_numbers_of_rows_occur() -> None:
    """oneDNN keeps kernels for each: memory that no plan has counted."""
    met = {count + extra_rows(count) for count in range(1, 513)}
    assert len(met) < 60
    assert all(extra_rows(count) == 0 for count in range(17))
    assert all(extra_rows(count) <= max(3, count // 8) for count in range(1, 513))
