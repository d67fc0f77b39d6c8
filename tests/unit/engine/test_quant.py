"""Quantized linear layers against plain products, and the choice between them."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import ModelError, QuantName
from engine.device.heap import giving_back
from engine.protocol import Sampling, unpack_floats
from engine.quant import int8
from engine.quant.base import DenseLinear, LinearMethod
from engine.quant.int8 import Int8Weight, SplitInt8Linear, WidenedInt8Linear, int8_method
from engine.quant.methods import head_method, linear_method
from engine.quant.packed import PackedLinear
from router.checkpoint.facts import read_checkpoint
from router.memory import GIB, Demand, plan
from tests.generation import Driver, device_of
from tests.router_process import ROOT
from tools.tiny_model import TinySpec, encode_text, write_tiny_model

CPU = torch.device("cpu")
WAYS: list[LinearMethod] = [SplitInt8Linear, WidenedInt8Linear]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
needs_int8_product = pytest.mark.skipif(
    int8_method(CPU) is WidenedInt8Linear, reason="this CPU has no fast int8 product"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def method_of(quant: QuantName) -> LinearMethod:
    if quant in ("bnb-int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    return linear_method(quant, CPU, torch.float32)


def test_weights_are_rounded_to_the_nearest_step_of_their_row() -> None:
    weight = random(50, 33) * torch.logspace(-6, 6, 50)[:, None]
    weight[7] = 0.0
    before = weight.clone()
    held = Int8Weight(weight)
    assert torch.equal(weight, before)
    assert held.values.abs().amax(1).tolist() == [127] * 7 + [0] + [127] * 42
    error = (held.values * held.scales[:, None] - weight).abs()
    assert bool((error <= held.scales[:, None] * 0.5001).all())
    assert held.nbytes == 50 * 33 + 50 * 4


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random(50, 33), random(3, 33, seed=1)
    whole, y = Int8Weight(weight), WidenedInt8Linear(weight, None)(x)
    monkeypatch.setattr(int8, "_BLOCK_VALUES", 100)
    parts = Int8Weight(weight)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scales, whole.scales)
    torch.testing.assert_close(WidenedInt8Linear(weight, None)(x), y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 2, 17, 700])
def test_int8_products(way: LinearMethod, rows: int) -> None:
    weight, bias, x = random(40, 65), random(40, seed=1), random(rows, 65, seed=2)
    x *= torch.logspace(-3, 3, rows)[:, None]
    x[:, 3] *= 300.0  # an outlier, as models have them
    if rows > 1:
        x[1] = 0.0
    held = Int8Weight(weight)
    wide = held.values.double() * held.scales.double()[:, None]
    want = x.double() @ wide.t() + bias.double()
    linear, residual = way(weight, bias), random(rows, 40, seed=3)
    # Half a step of the second digit for every value of a row.
    bound = (x.abs().amax(1).double() / 127**2)[:, None] * wide.abs().sum(1) * 0.51 + 1e-5
    assert bool(((linear(x) - want).abs() <= bound).all())
    added = linear.add(x, residual.clone())
    torch.testing.assert_close(added, residual + linear(x))
    assert linear.nbytes == held.nbytes + bias.nbytes


@needs_int8_product
def test_rows_do_not_depend_on_each_other() -> None:
    linear, x = SplitInt8Linear(random(48, 64), None), random(600, 64, seed=1)
    together = linear(x)
    for at in (0, 1, 300, 599):
        assert torch.equal(linear(x[at : at + 1]), together[at : at + 1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_in_16_bits(way: LinearMethod, dtype: torch.dtype) -> None:
    weight, x = random(40, 64).to(dtype), random(5, 64, seed=2).to(dtype)
    y = way(weight, None)(x)
    want = x.double() @ weight.double().t()
    assert y.dtype == dtype
    assert float((y - want).abs().mean()) < 0.02 * float(want.std())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(way: LinearMethod, broken: float) -> None:
    x = random(3, 64)
    x[1, 5] = broken
    finite = torch.isfinite(way(random(8, 64), None)(x)).all(1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("missing", [RuntimeError, NotImplementedError])
def test_int8_without_a_product(missing: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise missing

    monkeypatch.setattr(int8, "_int_product", fail)
    assert int8_method(CPU) is WidenedInt8Linear


def test_int8_with_a_product_that_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: Tensor, b: Tensor) -> Tensor:
        return (a.int() @ b.int()).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(int8, "_int_product", saturating)
    assert int8_method(CPU) is WidenedInt8Linear


@pytest.mark.parametrize(
    ("quant", "share", "error"),
    [("int8", 0.51, 0.01), ("bnb-int8", 0.51, 0.02), ("nf4", 0.29, 0.1)],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_quantized_products_are_close(
    quant: QuantName, share: float, error: float, rows: int
) -> None:
    weight, bias, x = random(300, 448), random(300, seed=1), random(rows, 448, seed=2)
    x[:, 3] *= 20.0  # beyond LLM.int8's threshold
    linear = method_of(quant)(weight, bias)
    want = x @ weight.t() + bias
    assert float((linear(x) - want).std()) < error * float(want.std())
    residual = random(rows, 300, seed=3)
    torch.testing.assert_close(linear.add(x, residual.clone()), residual + linear(x))
    assert weight.numel() * (share - 0.02) * 2 < linear.nbytes < weight.numel() * share * 2 + 1200


@needs_bitsandbytes
@pytest.mark.parametrize("columns", [64, 96, 70])
def test_nf4_blocks_are_those_of_the_whole(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.quant import bnb

    weight, x = random(200, columns), torch.eye(columns)
    method = method_of("nf4")
    whole = method(weight, None)
    monkeypatch.setattr(bnb, "_BLOCK_VALUES", 1)
    parts = method(weight, None)
    torch.testing.assert_close(parts(x), whole(x))
    assert parts.nbytes == whole.nbytes


def test_choices() -> None:
    assert linear_method("none", CPU, torch.float32) in (PackedLinear, DenseLinear)
    assert linear_method("none", torch.device("cuda"), torch.float16) is DenseLinear
    assert head_method("none", torch.device("cuda"), torch.float16) is DenseLinear
    assert method_of("int8") == head_method("nf4", CPU, torch.float32)
    with pytest.raises(ModelError, match=r"'fp8' is not built in yet: take int8"):
        linear_method("fp8", CPU, torch.float32)


@pytest.mark.parametrize("quant", ["nf4", "bnb-int8"])
def test_without_bitsandbytes(quant: QuantName, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    remedy = r"pip install 'llm-router\[bitsandbytes\]'"
    with pytest.raises(ModelError, match=f"'{quant}' needs bitsandbytes.*{remedy}"):
        linear_method(quant, CPU, torch.float32)
    assert method_of("int8") is not None


@needs_bitsandbytes
@pytest.mark.slow
def test_bitsandbytes_fetches_nothing(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch\n"
        "from engine.quant.methods import linear_method\n"
        "linear_method('nf4', torch.device('cpu'), torch.float32)\n"
        "assert 'kernels' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", ["none", "int8", "bnb-int8", "nf4"])
def test_engine_and_memory_plan(tmp_path: Path, quant: QuantName, tied: bool) -> None:
    method_of(quant)
    model = write_tiny_model(tmp_path, TinySpec(tied=tied))
    device = device_of(model, quant=quant, num_blocks=16)
    assert device.limits.quant == quant
    demand = Demand("m", read_checkpoint(model), quant=quant)
    [planned] = plan([demand], {"cpu": 8 * GIB}).engines
    assert device.limits.weights_bytes == pytest.approx(planned.weights_bytes, rel=0.05)
    scores = prompt_scores(Driver(device))
    exact = prompt_scores(Driver(device_of(model, num_blocks=16)))
    off = [abs(a - b) for a, b in zip(scores, exact, strict=True)]
    allowed = {"none": 1e-5, "int8": 0.1, "bnb-int8": 0.2, "nf4": 2.0}[quant]
    assert sum(off) / len(off) < allowed


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


HOLES = """
import torch
from tests.unit.engine.test_quant import anonymous_bytes, giving_back
before_bytes, kept = anonymous_bytes(), []
with giving_back():
    for _ in range(40):
        converted = torch.ones(1_000_000)
        kept.append(converted[:400_000].clone())
        del converted
    held_bytes = anonymous_bytes() - before_bytes
print(held_bytes, sum(tensor.nbytes for tensor in kept))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells RssAnon")
def test_a_load_leaves_no_holes() -> None:
    """In a process of its own: what other tests leave behind is not counted."""
    run = subprocess.run(
        [sys.executable, "-c", HOLES],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    held_bytes, kept_bytes = map(int, run.stdout.split())
    assert held_bytes < 1.1 * kept_bytes + 4e6


def test_a_load_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: None) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with giving_back():
        assert float(torch.ones(3).sum()) == 3.0


def prompt_scores(driver: Driver) -> list[float]:
    sampling = Sampling(temperature=0.0, prompt_logprobs=0)
    text = "Some letters of no great importance, 0123456789."
    [result] = driver.run([driver.submit(encode_text(text), 0, sampling)])
    return [score for entry in result.prompt_logprobs for score in unpack_floats(entry.chosen)]
