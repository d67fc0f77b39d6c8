"""Products of few tokens on a card: cuBLAS against our kernels, by shape and number of tokens.

    python -m bench.micro.gpu_linear [--sweep] [--quick] [--rows 1,2,4,8,16,32]

Timed inside a CUDA graph over enough copies of the weights that none is found in the cache: shape
by shape, then all products of a model in their order. Prints as it goes; needs a CUDA device.
`--sweep` tries the configurations beside the defaults, `--quick` leaves the single shapes out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.gated import gated
from engine.kernels.gemv import GemvConfig, gemv, gemv_gated
from engine.kernels.skinny import MAX_ROWS, SkinnyConfig, skinny, skinny_gated
from engine.quant.dense_gpu import DenseGpuLinear
from engine.quant.fast_products import FastProducts

READ_BYTES_PER_S = 3.07e12  # an H100's, measured
CACHE_BYTES = 150e6
SHAPES = {
    "chatglm2-6b": {"qkv": (4608, 4096), "o": (4096, 4096), "up": (27392, 4096)}
    | {"down": (4096, 13696), "head": (65024, 4096)},
    "vicuna-7b": {"qkv": (12288, 4096), "o": (4096, 4096), "up": (22016, 4096)}
    | {"down": (4096, 11008), "head": (32000, 4096)},
}
LAYERS = {"chatglm2-6b": 28, "vicuna-7b": 32}
BIASED = {"chatglm2-6b"}  # whose queries, keys and values have a bias
GEMV = [
    GemvConfig(1024, 4),
    GemvConfig(2048, 4),
    GemvConfig(4096, 4),
    GemvConfig(4096, 8),
    GemvConfig(2048, 4, 2),
    GemvConfig(1024, 4, 2),
]
SKINNY = [
    SkinnyConfig(16, 256, 4, 4, False),
    SkinnyConfig(16, 512, 4, 3, False),
    SkinnyConfig(32, 128, 4, 5, False),
    SkinnyConfig(32, 256, 4, 4, False),
    SkinnyConfig(32, 256, 8, 4, False),
    SkinnyConfig(32, 256, 4, 4, True),
    SkinnyConfig(64, 128, 4, 5, True),
    SkinnyConfig(64, 256, 4, 3, True),
    SkinnyConfig(64, 256, 8, 4, False),
]
LARGE = (256, 320, 384, 448, 512, 576, 640, 704, 768, 896, 1024, 1280, 1536, 2048)

Product = Callable[[Tensor, Tensor], Tensor]


def seconds(product: Product, x: Tensor, weights: list[Tensor], repeats: int = 10) -> float:
    """Median of one product, in a graph over all of the weights."""
    launches = [partial(product, x, weight) for weight in weights]
    return graph_seconds(launches, repeats) / len(weights)


def graph_seconds(launches: Sequence[Callable[[], object]], repeats: int = 10) -> float:
    """Median of all launches one after the other, in a graph."""
    for launch in launches:  # compiles, and initialises libraries
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def products(name: str, rows: int, *, sweep: bool) -> dict[str, Product]:
    """What is compared for a layer of this name."""
    found: dict[str, Product] = {"cublas": F.linear}
    if rows == 1:
        for config in GEMV if sweep else GEMV[1:2]:
            if name != "up":
                found[f"gemv{tuple(config)}"] = partial(gemv, config=config)
            elif config.rows == 1:
                found[f"gemv{tuple(config)}"] = partial(
                    gemv_gated, activation="silu", config=config
                )
    elif rows <= MAX_ROWS:
        for tile in SKINNY if sweep else SKINNY[3:4]:
            found[f"skinny{tuple(tile)}"] = (
                partial(skinny_gated, activation="silu", config=tile)
                if name == "up"
                else partial(skinny, config=tile)
            )
    return found


def main() -> int:
    """Prints a line for each shape, number of tokens and kernel; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--quick", action="store_true", help="only whole models")
    parser.add_argument("--rows", default="1,2,4,8,16,32")
    parser.add_argument("--models", default="chatglm2-6b,vicuna-7b")
    options = parser.parse_args()
    rows = [int(count) for count in options.rows.split(",")]
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        for model in options.models.split(","):
            if not options.quick:
                shapes(model, rows, sweep=options.sweep)
            chain(model, rows)
    return 0


def shapes(model: str, counts: Sequence[int], *, sweep: bool) -> None:
    """The layers of a model, one after the other."""
    for name, (size, inner) in SHAPES[model].items():
        copies = max(2, int(CACHE_BYTES // (size * inner * 2)) + 1)
        weights = [made(size, inner).div_(64) for _ in range(copies)]
        for rows in counts:
            few(f"{model} {name} {rows}", made(rows, inner), weights, sweep=sweep)
        many(f"{model} {name}", weights)


def made(*shape: int, device: str = "cuda") -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float16)


def few(title: str, x: Tensor, weights: list[Tensor], *, sweep: bool) -> None:
    """One line: microseconds of each kernel, the share of the read bandwidth of the best."""
    name = title.split()[1]
    parts: list[tuple[float, str]] = []
    for label, product in products(name, len(x), sweep=sweep).items():
        try:
            parts.append((seconds(product, x, weights), label))
        except Exception as error:  # noqa: BLE001 - a configuration that does not fit the card
            print(f"{title}: {label}: {type(error).__name__}: {str(error)[:80]}")
    parts.sort()
    share = weights[0].nbytes / READ_BYTES_PER_S / parts[0][0]
    text = "  ".join(f"{label} {took * 1e6:.1f}" for took, label in parts)
    print(f"{title}: {share:.0%}  {text}", flush=True)


def many(title: str, weights: list[Tensor]) -> None:
    """cuBLAS at the sizes of prompts and mixed steps, microseconds."""
    inner = weights[0].shape[1]
    parts: list[str] = []
    for rows in LARGE:
        x = made(rows, inner)
        took = seconds(F.linear, x, weights[:4], repeats=5)
        parts.append(f"{rows}:{took * 1e6:.0f}")
    print(f"{title} cublas: {' '.join(parts)}", flush=True)


class Chain:
    """All products of a model's step but those of attention, in their order, made-up weights."""

    def __init__(self, model: str, layers: int, device: str = "cuda") -> None:
        sizes = SHAPES[model]
        names = [*(["qkv", "o", "up", "down"] * layers), "head"]
        self._layers = [(name, made(*sizes[name], device=device).div_(64)) for name in names]
        self._biased = model in BIASED
        self._device = device
        self.nbytes = sum(weight.nbytes for _, weight in self._layers)

    def launches(self, rows: int, *, ours: bool, head: bool = True) -> list[Callable[[], object]]:
        """Ours as the engine multiplies; else cuBLAS, which adds residuals but not activations."""
        products = FastProducts()
        found: list[Callable[[], object]] = []
        for name, weight in self._layers[: None if head else -1]:
            size, inner = weight.shape
            x = made(rows, inner, device=self._device)
            bias = made(size, device=self._device) if name == "qkv" and self._biased else None
            layer = DenseGpuLinear(weight, bias, products)
            if name in ("o", "down"):
                residual = made(rows, size, device=self._device)
                added = partial(residual.addmm_, x, weight.t())
                found.append(partial(layer.add, x, residual) if ours else added)
            elif name == "up":
                found.append(partial(layer.gated, x, "silu") if ours else partial(up, x, weight))
            else:
                found.append(partial(layer, x) if ours else partial(F.linear, x, weight, bias))
        return found


def up(x: Tensor, weight: Tensor) -> Tensor:
    """Gate and up by cuBLAS, then the activation."""
    return gated(F.linear(x, weight), "silu")


def chain(model: str, counts: Sequence[int]) -> None:
    """Milliseconds of a model's products: cuBLAS and ours, and ours without dependent launch."""
    whole = Chain(model, LAYERS[model])
    for rows in counts:
        cublas = graph_seconds(whole.launches(rows, ours=False))
        ours = graph_seconds(whole.launches(rows, ours=True))
        with without_pdl():
            alone = graph_seconds(whole.launches(rows, ours=True))
        share = whole.nbytes / READ_BYTES_PER_S / min(cublas, ours, alone)
        print(
            f"{model} whole {rows}: {share:.0%}  cublas {cublas * 1e3:.2f} ms  "
            f"ours {ours * 1e3:.2f}  without PDL {alone * 1e3:.2f}",
            flush=True,
        )
    parts: list[str] = []
    for rows in LARGE:
        took = graph_seconds(whole.launches(rows, ours=False, head=False), repeats=3)
        parts.append(f"{rows}:{took * 1e3:.2f}")
    print(f"{model} layers cublas, ms: {' '.join(parts)}", flush=True)


@contextmanager
def without_pdl() -> Generator[None]:
    """Kernels of ours wait for the one before, as others do; some always do."""
    with ExitStack() as stack:
        for module in ("gemv", "skinny", "gated"):
            name = f"engine.kernels.{module}.pdl_options"
            stack.enter_context(patch(name, create=True, return_value={"PDL": False}))
        yield


if __name__ == "__main__":
    sys.exit(main())
