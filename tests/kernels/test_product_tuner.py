"""Measuring ways to multiply: every candidate is run, the fastest one serves, and it is kept.

With scripted times, and kernels that are interpreted where there is no card.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine.quant.dense_gpu import DenseGpuLinear
from engine.quant.fast_products import FastProducts
from engine.quant.product_choice import CUBLAS, SIZES, Form, Product, entry_name
from engine.quant.product_file import ProductFile
from engine.quant.product_tuner import CardTimer, ProductTuner

pytestmark = pytest.mark.slow  # interpreted, where there is no card

OUTPUTS, INPUTS = 48, 64
PLAIN = Product("plain", OUTPUTS, INPUTS, biased=True, dtype="float16")
LABEL = "card"
FEW = 3  # sizes that are measured: 1, 8 and 16 tokens


class ScriptedTimer:
    """Runs what it is given, and says what the test wants; `failing` runs have no time."""

    def __init__(self, times_s: Callable[[int], float], failing: frozenset[int] = frozenset()):
        self.runs = 0
        self._times_s = times_s
        self._failing = failing

    def __call__(self, run: Callable[[int], object]) -> float:
        number, self.runs = self.runs, self.runs + 1
        if number in self._failing:
            raise RuntimeError("out of resources")
        run(number)
        return self._times_s(number)


def made(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, torch.float16)


def known_of(form: Form = "plain") -> dict[str, str]:
    """The choices of all but few tokens: interpreted, many take long."""
    return {entry_name(PLAIN._replace(form=form), size): "cublas" for size in SIZES[FEW:]}


def products_of(form: Form = "plain") -> FastProducts:
    return FastProducts(known=known_of(form))


def layer(device: torch.device, products: FastProducts) -> DenseGpuLinear:
    weight, bias = made(OUTPUTS, INPUTS, device=device), made(OUTPUTS, device=device)
    return DenseGpuLinear(weight, bias, products)


def measure_all(tuner: ProductTuner) -> list[int]:
    changed: list[int] = []
    while tuner.pending:
        changed.append(tuner.measure_next())
    return [size for size in changed if size]


def file_in(folder: Path) -> ProductFile:
    return ProductFile(folder / "products.json", LABEL, print)


@pytest.mark.parametrize("form", ["plain", "add", "gated"])
def test_every_candidate_runs_and_results_stay_right(
    tmp_path: Path, device: torch.device, form: Form
) -> None:
    products = products_of(form)
    linear = layer(device, products)
    x = made(3, INPUTS, device=device)

    def result() -> Tensor:
        if form == "add":
            return linear.add(x, torch.ones(3, OUTPUTS, dtype=x.dtype, device=device))
        return linear.gated(x, "silu") if form == "gated" else linear(x)

    before = result()
    # The last candidate of each size is by far the fastest.
    timer = ScriptedTimer(lambda number: 1.0 / (number + 1) ** 2)
    changed = measure_all(ProductTuner(products, timer, file_in(tmp_path)))
    assert changed == list(SIZES[:FEW])
    product = PLAIN._replace(form=form)
    ways = {size: products.candidates(product, size) for size in SIZES[:FEW]}
    assert timer.runs == sum(map(len, ways.values()))
    chosen = products.chosen(product)
    assert {size: chosen[size] for size in ways} == {size: ways[size][-1] for size in ways}
    torch.testing.assert_close(result(), before, rtol=1e-2, atol=2e-2)


def test_nothing_is_measured_before_something_is_asked_for(tmp_path: Path) -> None:
    tuner = ProductTuner(FastProducts(), ScriptedTimer(lambda _: 1.0), file_in(tmp_path))
    assert not tuner.pending


def test_equal_times_change_nothing(tmp_path: Path, device: torch.device) -> None:
    products = products_of()
    layer(device, products)(made(1, INPUTS, device=device))
    tuner = ProductTuner(products, ScriptedTimer(lambda _: 1e-5), file_in(tmp_path))
    assert tuner.pending
    assert measure_all(tuner) == []


def test_a_way_that_cannot_run_is_never_chosen(tmp_path: Path, device: torch.device) -> None:
    products = products_of()
    layer(device, products)(made(1, INPUTS, device=device))
    number = len(products.candidates(PLAIN, 1))
    timer = ScriptedTimer(lambda _: 1e-5, failing=frozenset(range(number - 1)))
    tuner = ProductTuner(products, timer, file_in(tmp_path))
    for _ in range(number):
        tuner.measure_next()
    assert products.chosen(PLAIN)[1] == products.candidates(PLAIN, 1)[-1]


def test_what_could_not_be_measured_is_not_kept(tmp_path: Path, device: torch.device) -> None:
    products = products_of()
    layer(device, products)(made(1, INPUTS, device=device))
    timer = ScriptedTimer(lambda _: 1e-5, failing=frozenset(range(1000)))
    assert measure_all(ProductTuner(products, timer, file_in(tmp_path))) == []
    assert file_in(tmp_path).load() == {}
    assert not products.unmeasured


def test_the_next_engine_measures_nothing(tmp_path: Path, device: torch.device) -> None:
    first = products_of()
    layer(device, first)(made(1, INPUTS, device=device))
    measure_all(
        ProductTuner(first, ScriptedTimer(lambda number: 1 / (number + 1)), file_in(tmp_path))
    )
    kept = file_in(tmp_path).load()
    assert len(kept) == FEW
    second = FastProducts(known=known_of() | kept)
    layer(device, second)(made(2, INPUTS, device=device))
    assert not second.unmeasured
    assert second.chosen(PLAIN) == first.chosen(PLAIN)


def test_unknown_entries_are_measured_again(tmp_path: Path, device: torch.device) -> None:
    known = {f"plain+bias {OUTPUTS}x{INPUTS} float16 {size}": "cublas" for size in SIZES[1:]}
    products = FastProducts(known=known | {f"plain+bias {OUTPUTS}x{INPUTS} float16 1": "magic"})
    layer(device, products)(made(1, INPUTS, device=device))
    assert products.missing(PLAIN) == [1]
    assert products.chosen(PLAIN)[8] == CUBLAS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_times_are_real(tmp_path: Path) -> None:
    device = torch.device("cuda:0")
    with torch.cuda.stream(torch.cuda.Stream(device)), torch.inference_mode():
        products = FastProducts(torch.cuda.get_device_capability(device))
        linear = layer(device, products)
        x = made(5, INPUTS, device=device)
        before = linear(x)
        measure_all(ProductTuner(products, CardTimer(), file_in(tmp_path)))
        assert set(products.chosen(PLAIN)) == set(SIZES)
        torch.testing.assert_close(linear(x), before, rtol=1e-2, atol=2e-2)
        timer = CardTimer()
        small, large = (made(size, size, device=device) for size in (64, 4096))
        assert 0 < timer(lambda _: small @ small) < timer(lambda _: large @ large) < 0.1
