"""Products of few tokens on a card: cuBLAS against our kernels, by shape and number of tokens.

    python -m bench.micro.gpu_linear [--sweep]

Timed inside a CUDA graph over enough copies of the weights that none is found in the cache.
Prints as it goes; needs a CUDA device. `--sweep` tries the configurations beside the defaults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.gemv import Epilogue, GemvConfig, gemv, gemv_gated
from engine.kernels.skinny import SkinnyConfig, skinny, skinny_gated

READ_BYTES_PER_S = 3.07e12  # an H100's, measured
CACHE_BYTES = 150e6
SHAPES = {
    "chatglm2-6b": {"qkv": (4608, 4096), "o": (4096, 4096), "up": (27392, 4096)}
    | {"down": (4096, 13696), "head": (65024, 4096)},
    "vicuna-7b": {"qkv": (12288, 4096), "up": (22016, 4096)}
    | {"down": (4096, 11008), "head": (32000, 4096)},
}
GEMV = [GemvConfig(1024, 4), GemvConfig(2048, 4), GemvConfig(4096, 4), GemvConfig(4096, 8)]
GEMV += [GemvConfig(2048, 4, 2), GemvConfig(1024, 4, 2)]
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
LARGE = (256, 320, 384, 448, 512, 576, 640, 768, 1024, 1536, 2048)

Product = Callable[[Tensor, Tensor], Tensor]


def seconds(product: Product, x: Tensor, weights: list[Tensor], repeats: int = 10) -> float:
    """Median of one product, in a graph over all of the weights."""
    for weight in weights[:2]:
        product(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            product(x, weight)
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(weights))
    return sorted(times)[len(times) // 2]


def products(name: str, rows: int, *, sweep: bool) -> dict[str, Product]:
    """What is compared for a layer of this name."""
    found: dict[str, Product] = {"cublas": lambda x, w: F.linear(x, w)}
    gated = name == "up"
    if rows == 1:
        for config in GEMV if sweep else GEMV[1:2]:
            label = f"gemv{tuple(config)}"
            if gated and config.rows == 1:
                found[label] = lambda x, w, c=config: gemv_gated(x, w, "silu", Epilogue(), c)
            elif not gated:
                found[label] = lambda x, w, c=config: gemv(x, w, Epilogue(), c)
        return found
    for config in SKINNY if sweep else SKINNY[3:4]:
        label = f"skinny{tuple(config)}"
        if gated:
            found[label] = lambda x, w, c=config: skinny_gated(x, w, "silu", Epilogue(), c)
        else:
            found[label] = lambda x, w, c=config: skinny(x, w, Epilogue(), c)
    return found


def main() -> int:
    """Prints a line for each shape, number of tokens and kernel; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rows", default="1,2,8,16")
    parser.add_argument("--models", default="chatglm2-6b,vicuna-7b")
    options = parser.parse_args()
    torch.cuda.set_stream(torch.cuda.Stream())
    with torch.inference_mode():
        for model in options.models.split(","):
            for name, (size, inner) in SHAPES[model].items():
                copies = max(2, int(CACHE_BYTES // (size * inner * 2)) + 1)
                weights = [
                    torch.randn(size, inner, device="cuda", dtype=torch.float16) / 64
                    for _ in range(copies)
                ]
                for rows in map(int, options.rows.split(",")):
                    x = torch.randn(rows, inner, device="cuda", dtype=torch.float16)
                    few(f"{model} {name} {rows}", x, weights, sweep=options.sweep)
                many(f"{model} {name}", weights)
    return 0


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
        x = torch.randn(rows, inner, device="cuda", dtype=torch.float16)
        took = seconds(lambda x, w: F.linear(x, w), x, weights[:4], repeats=5)
        parts.append(f"{rows}:{took * 1e6:.0f}")
    print(f"{title} cublas: {' '.join(parts)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
