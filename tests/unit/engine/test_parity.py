"""The generic decoder against transformers on tiny random models: prefill, decode, mixed batches.

The negative controls show that the comparison sees what it should: each flipped flag must fail it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.attention.reference import ReferenceAttention
from engine.device.batch import Batch
from engine.device.kv import KvCache
from engine.device.weights import open_model
from engine.models.registry import Target, build_decoder, read_spec
from engine.models.spec import ModelSpec
from engine.plan import Admit, Row, StepPlan
from engine.protocol import Sampling
from engine.quant.base import DenseLinear
from engine.quant.packed import cpu_method

CPU = torch.device("cpu")
BLOCK, TOLERANCE = 4, 1e-4
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "one kv head": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 6},
    "eps": {"rms_norm_eps": 0.03},
    "theta": {"rope_theta": 333.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def write(folder: Path, variant: dict[str, Any]) -> LlamaForCausalLM:
    """A random model with noisy norms and biases, saved in several shards."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **variant})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size="50KB")
    return model


def our_logits(folder: Path, prompts: list[list[int]], **flips: Any) -> list[torch.Tensor]:
    """Logits of every position: prompts prefilled in uneven chunks, last tokens decoded, mixed."""
    config, source = open_model(folder, "auto")
    spec = msgspec.structs.replace(read_spec(config), **flips)
    decoder = build_decoder(spec, source, Target(CPU, torch.float32, cpu_method(torch.float32)))
    cache = KvCache(spec, 64, BLOCK, torch.float32, CPU)
    batch = Batch(len(prompts), 64, BLOCK, CPU, torch.float32)
    attention = ReferenceAttention(spec.attention_scale)
    blocks = [list(range(16 * i, 16 * i + 16)) for i in range(len(prompts))]
    admits = [Admit(i, p, len(p), blocks[i], Sampling(), ()) for i, p in enumerate(prompts)]
    batch.apply(StepPlan(0, [], admits, [], []))
    done = [0] * len(prompts)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    step = 0
    while any(done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        rows = []
        for i, prompt in enumerate(prompts):
            # Different chunk sizes a sequence, so that steps mix decode rows with chunks.
            count = min((5, 1, 3)[(i + step) % 3], len(prompt) - done[i])
            if count:
                rows.append(Row(i, i, done[i], count, False))
                done[i] += count
        inputs = batch.inputs(rows)
        hidden = decoder.forward(
            inputs.ids, inputs.positions, cache.layers, inputs.attention, attention
        )
        scores = decoder.logits(hidden)
        for index, row in enumerate(rows):
            end = inputs.last[index] + 1
            logits[row.slot].append(scores[end - row.count : end])
        step += 1
    return [torch.cat(parts) for parts in logits]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (23, 9, 40)]


@torch.inference_mode()
def worst(model: LlamaForCausalLM, ours: list[torch.Tensor]) -> float:
    """Largest logit difference over all prompts."""
    theirs = [model(torch.tensor([prompt])).logits[0] for prompt in prompts()]
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_transformers(tmp_path: Path, variant: dict[str, Any]) -> None:
    model = write(tmp_path, variant)
    with torch.inference_mode():
        assert worst(model, our_logits(tmp_path, prompts())) < TOLERANCE


def _flips(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    rope = spec.rope
    replace = msgspec.structs.replace
    return {
        "eps": {"norm_eps": 0.5},
        "scale": {"attention_scale": spec.attention_scale * 1.1},
        "tied": {"tied_head": True},
        "theta": {"rope": replace(rope, theta=5000.0)},
        "interleaved": {"rope": replace(rope, interleaved=True)},
        "linear": {"rope": replace(rope, scaling="linear", factor=2.0)},
        "partial": {"rope": replace(rope, dim=spec.head_dim // 2)},
        "no qkv bias": {"qkv_bias": False},
        "no output bias": {"output_bias": False},
        "no mlp bias": {"mlp_bias": False},
    }


def test_every_flipped_flag_is_seen(tmp_path: Path) -> None:
    model = write(tmp_path, VARIANTS["biases"])
    spec = read_spec(json.loads((tmp_path / "config.json").read_text()))
    with torch.inference_mode():
        for name, flip in _flips(spec).items():
            assert worst(model, our_logits(tmp_path, prompts(), **flip)) > 100 * TOLERANCE, name


@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_equals_the_plain_one(num_tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(37, 29), torch.randn(num_tokens, 29)
    residual = torch.randn(num_tokens, 37)
    offset = torch.randn(37) if bias else None
    packed, plain = cpu_method(torch.float32)(weight, offset), DenseLinear(weight, offset)
    assert packed.nbytes == plain.nbytes
    for got, want in (
        (packed(x), plain(x)),
        (packed.add(x, residual.clone()), plain.add(x, residual.clone())),
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
