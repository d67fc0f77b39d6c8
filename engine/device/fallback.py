"""The fallback's start: loaded, compared with the class's own forward, announced.

Owns nothing. The comparison is what makes it safe to serve classes that nobody here has read:
whatever paged attention would miss shows up as other scores.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelError
from engine.device.batch import Batch
from engine.device.kv import KvCache
from engine.models.base import ModelShape
from engine.models.hf import HfModel, build_fallback, refusing
from engine.models.registry import Target, architecture_of
from engine.plan import Admit, Row, StepPlan
from engine.protocol import Sampling

# Two texts; what each step computes of them: chunks, a decode row beside a chunk, decode rows.
_LENGTHS = (14, 9)
_STEPS = ((5, 1), (6, 3), (1, 4), (2, 1))
_BLOCK = 4
# Largest difference in parts of the largest score: of any position in float32 as stored, of most
# positions where rounding may send a token to another expert.
_EXACT, _ROUNDED = 1e-3, 0.05
# Measured on a llama of SmolLM2-135M's shape through both ways, 2 cores, float32: one decode row
# 20.7 against 15.9 ms, 16 rows 38.2 against 33.6 ms, a prompt of 512 tokens the same.
_SLOWER_PERCENT = 30


def load_fallback(
    config: EngineConfig, model_config: Mapping[str, Any], target: Target
) -> tuple[HfModel, ModelShape]:
    """A model through transformers that gave the same scores as transformers alone.

    Raises `ModelError`.
    """
    made_up = config.load_format == "dummy"
    model, shape = build_fallback(Path(config.model), model_config, target, made_up=made_up)
    name = architecture_of(model_config)
    exact = target.dtype == torch.float32 and config.quant == "none"
    with refusing(name):
        error = paged_error(model, shape, target, exact=exact)
    if not error <= (_EXACT if exact else _ROUNDED):  # NaN is an error too
        raise ModelError(
            f"architecture {name} cannot be served: over paged attention its scores differ by "
            f"{error:.2g} of the largest from those of its own forward pass"
        )
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(
            f"engine: {name} runs through transformers' own code with our paged attention: "
            f"a decode step takes about {_SLOWER_PERCENT} % longer than a native model's\n"
        )
    return model, shape


@torch.inference_mode()
def paged_error(model: HfModel, shape: ModelShape, target: Target, *, exact: bool) -> float:
    """Difference to the class's own forward pass over whole texts, in parts of the largest score.

    The largest of all positions if `exact`, else the median position's.
    """
    lengths = [min(length, shape.max_len) for length in _LENGTHS]
    texts = [[(7 * i + 3 * n) % shape.vocab_size for i in range(n)] for n in lengths]
    paged = _paged_logits(model, shape, target, texts)
    errors: list[Tensor] = []
    for text, scores in zip(texts, paged, strict=True):
        own = model.own_logits(torch.tensor(text, device=target.device))
        errors.append((scores - own).abs().amax(-1) / own.abs().max())
    each = torch.cat(errors)
    return float(each.max() if exact else each.median())


def _paged_logits(
    model: HfModel, shape: ModelShape, target: Target, texts: list[list[int]]
) -> list[Tensor]:
    """[length, vocab_size] of each text, computed as served traffic is."""
    device, dtype = target.device, target.dtype
    each = -(-max(map(len, texts)) // _BLOCK)
    cache = KvCache(shape, each * len(texts), _BLOCK, dtype, device)
    batch = Batch(len(texts), max(map(len, texts)), _BLOCK, device, dtype, shape.windows)
    admits = [
        Admit(i, text, len(text), list(range(each * i, each * i + each)), Sampling(), ())
        for i, text in enumerate(texts)
    ]
    batch.apply(StepPlan(0, [], admits, [], []))
    done = [0] * len(texts)
    parts: list[list[Tensor]] = [[] for _ in texts]
    for counts in _STEPS:
        taken = [min(n, len(text) - at) for n, text, at in zip(counts, texts, done, strict=True)]
        rows = [Row(i, i, done[i], n, samples=False) for i, n in enumerate(taken) if n]
        if not rows:
            break
        inputs = batch.inputs(rows)
        step = (inputs.ids, inputs.positions, cache.layers, inputs.attention)
        scores = model.logits(model.forward(*step))
        for index, row in enumerate(rows):
            end = inputs.last[index] + 1
            parts[row.slot].append(scores[end - row.count : end])
            done[row.slot] += row.count
    return [torch.cat(found) for found in parts]
