"""Runs a generic decoder over given prompts as served traffic would: paged, chunked, mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelError
from engine.device.batch import Batch
from engine.device.kv import KvCache
from engine.models.base import Model, ModelShape
from engine.models.registry import Target, build_decoder, shape_of, weight_names_of
from engine.models.spec import ModelSpec
from engine.plan import Admit, Row, StepPlan
from engine.protocol import Sampling
from engine.quant.packed import cpu_method

CPU = torch.device("cpu")
BLOCK, MAX_LEN = 4, 64
# Different chunk sizes a sequence, so that steps mix decode rows with prompt chunks.
_CHUNKS = (5, 1, 3)


class HeldTensors:
    """A `TensorSource` over tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.shape(name) != shape:
            raise ModelError(f"weight {name}: {self.shape(name)}, not {shape}")
        return self._tensors[name]


def float32_target(max_len: int = MAX_LEN) -> Target:
    """The CPU's own linear layers in float32."""
    return Target(CPU, torch.float32, cpu_method(torch.float32), max_len)


def decoder_logits(
    spec: ModelSpec, config: Mapping[str, Any], source: HeldTensors, prompts: list[list[int]]
) -> list[Tensor]:
    """Logits [length, vocab_size] of every position of each prompt, by the generic decoder."""
    decoder = build_decoder(spec, weight_names_of(config), source, float32_target())
    return model_logits(decoder, shape_of(spec), prompts)


@torch.inference_mode()
def model_logits(model: Model, shape: ModelShape, prompts: list[list[int]]) -> list[Tensor]:
    """Logits [length, vocab_size] of every position: uneven chunks, last tokens decoded, mixed."""
    longest = max(map(len, prompts))
    each = -(-longest // BLOCK)  # blocks of a sequence
    cache = KvCache(shape, each * len(prompts), BLOCK, torch.float32, CPU)
    batch = Batch(len(prompts), longest, BLOCK, CPU, torch.float32, shape.windows)
    admits = [
        Admit(i, prompt, len(prompt), list(range(each * i, each * i + each)), Sampling(), ())
        for i, prompt in enumerate(prompts)
    ]
    batch.apply(StepPlan(0, [], admits, [], []))
    done = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    step = 0
    while any(done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        rows: list[Row] = []
        for i, prompt in enumerate(prompts):
            count = min(_CHUNKS[(i + step) % 3], len(prompt) - done[i])
            if count:
                rows.append(Row(i, i, done[i], count, False))
                done[i] += count
        inputs = batch.inputs(rows)
        hidden = model.forward(inputs.ids, inputs.positions, cache.layers, inputs.attention)
        scores = model.logits(hidden)
        for index, row in enumerate(rows):
            end = inputs.last[index] + 1
            logits[row.slot].append(scores[end - row.count : end])
        step += 1
    return [torch.cat(parts) for parts in logits]
