"""What lies between the linear layers, on a card: `python -m bench.micro.gpu_elementwise`.

Timed in a CUDA graph of many calls on the same tensors, so those of few tokens lie in the card's
cache, as they do in a forward pass. Prints microseconds of a call and the GB/s that it would need
without a cache. Needs a CUDA device; takes about a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.gated import embed, gated
from engine.kernels.norm import rms_norm
from engine.kernels.rope import rotate_and_store
from engine.kernels.sampler import SampledRows, SamplerParams, sample_rows
from engine.kernels.step_inputs import SlotState, prepare_inputs

TOKENS = (1, 8, 64, 256, 640, 2048)
SAMPLED = (1, 32, 256)
CALLS = 20  # in one graph
BLOCK_SIZE = 32
SLOTS, MAX_LEN = 256, 8192
DTYPE = torch.float16

Call = Callable[[], object]
# temperature, top_p, min_p, top_k
KINDS = {
    "greedy": (0.0, 1.0, 0.0, 0),
    "temperature": (0.8, 1.0, 0.0, 0),
    "min-p": (0.8, 1.0, 0.05, 0),
    "top-p": (0.8, 0.95, 0.0, 0),
    "top-k": (0.8, 1.0, 0.0, 50),
    "top-k+top-p": (0.8, 0.95, 0.0, 50),
}


class Sizes(NamedTuple):
    """Of one model; `turned` values of a head are rotated."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    turned: int
    interleaved: bool


MODELS = {
    "chatglm2-6b": Sizes(4096, 13696, 32, 2, 65024, 64, True),
    "vicuna-7b": Sizes(4096, 11008, 32, 32, 32000, 128, False),
}


def microseconds(call: Call, repeats: int = 15) -> float:
    """Median of one call, inside of a graph."""
    call()
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return sorted(times)[len(times) // 2]


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Normally distributed, on the card."""
    return torch.randn(shape, dtype=dtype, device="cuda")


def layer_calls(sizes: Sizes, count: int) -> Iterator[tuple[str, float, Call]]:
    """(name, bytes read and written, call) of each kernel for `count` tokens."""
    x, weight = random(count, sizes.hidden), random(sizes.hidden)
    yield "norm", 2 * x.nbytes, lambda: rms_norm(x, weight, 1e-5)
    gate_up = random(count, 2 * sizes.inner)
    yield "gated", 1.5 * gate_up.nbytes, lambda: gated(gate_up, "silu")
    heads = sizes.heads + 2 * sizes.kv_heads
    qkv = random(count, heads, 128)
    pages = random(2 * sizes.kv_heads, 2 * count // BLOCK_SIZE + 2, BLOCK_SIZE, 128)
    kv_slots = torch.randperm(count, device="cuda")
    turns = torch.polar(
        torch.ones(count, sizes.turned // 2), torch.randn(count, sizes.turned // 2)
    ).cuda()
    moved = (heads + 2 * sizes.kv_heads + sizes.heads * (2 * sizes.turned / 128 - 1)) / heads
    yield (
        "rope+store",
        moved * qkv.nbytes,
        lambda: rotate_and_store(qkv, sizes.heads, kv_slots, pages, turns, sizes.interleaved),
    )
    table = random(sizes.vocab, sizes.hidden)
    ids = torch.randint(sizes.vocab, (count,), device="cuda")
    yield "embed", 2 * x.nbytes, lambda: embed(ids, table, 1.0)


def step_calls(count: int) -> Iterator[tuple[str, float, Call]]:
    """The same for what is done once a step: up to `SLOTS` rows that share `count` tokens."""
    rows = torch.zeros((SLOTS, 4), dtype=torch.int32)
    used = min(SLOTS, count)
    each = count // used
    rows[:, 3] = used * each
    rows[:used, 0] = torch.arange(used)
    rows[:used, 2] = each
    rows[:used, 3] = torch.arange(used) * each
    state = SlotState(
        rows.cuda(),
        torch.zeros((SLOTS, MAX_LEN + 1), dtype=torch.int32, device="cuda"),
        torch.zeros((SLOTS, MAX_LEN // BLOCK_SIZE), dtype=torch.int32, device="cuda"),
        BLOCK_SIZE,
    )
    outputs = torch.empty((3, count), dtype=torch.int64, device="cuda")
    ids, positions, kv_slots = outputs.unbind()
    size = 32.0 * count
    yield "inputs", size, lambda: prepare_inputs(state, 0, ids, positions, kv_slots)


def sampler_calls(vocab: int, count: int) -> Iterator[tuple[str, float, Call]]:
    """The same for each kind of sampling: some likely tokens above a flat tail."""
    logits = random(count, vocab, dtype=torch.float32) * 2
    logits[:, torch.randperm(vocab, device="cuda")[:200]] += 8
    tokens = torch.zeros((count, 64), dtype=torch.int32, device="cuda")
    out = torch.zeros(count, dtype=torch.int32, device="cuda")
    rows = SampledRows(torch.arange(count, dtype=torch.int32, device="cuda"), out + 5)
    for name, (temperature, top_p, min_p, top_k) in KINDS.items():
        ones = torch.ones(count, device="cuda")
        params = SamplerParams(
            seed=torch.arange(count, device="cuda"),
            temperature=ones * temperature,
            top_p=ones * top_p,
            min_p=ones * min_p,
            top_k=(ones * top_k).int(),
        )
        yield name, logits.nbytes, partial(sample_rows, logits, params, rows, tokens, out, 0)


def line(title: str, calls: Iterator[tuple[str, float, Call]]) -> None:
    """Prints all calls of a title, as they are measured."""
    print(f"{title}:", end="", flush=True)
    for name, size, call in calls:
        took = microseconds(call)
        print(f"  {name} {took:.1f} us {size / took / 1e3:.0f} GB/s", end="", flush=True)
    print(flush=True)


def main() -> int:
    """Prints a line for each model and number of tokens or rows; returns an exit code."""
    torch.cuda.set_stream(torch.cuda.Stream())
    with torch.inference_mode():
        for count in TOKENS:
            line(f"step, {count} tokens", step_calls(count))
        for name, sizes in MODELS.items():
            for count in TOKENS:
                line(f"{name}, {count} tokens", layer_calls(sizes, count))
            for count in SAMPLED:
                line(f"{name}, {count} rows sampled", sampler_calls(sizes.vocab, count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
