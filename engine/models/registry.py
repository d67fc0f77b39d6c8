"""Architecture name -> how to read its config, what its weights are called, how it is built.

Owns the table of architectures. Weights are asked for one at a time and never held twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.config import ModelError, RopeRule
from engine.kernels.base import Fused
from engine.models import families, names
from engine.models.base import ModelShape
from engine.models.decoder import Decoder, Ends, Layer
from engine.models.names import WeightNames
from engine.models.parts import Experts, GatedMlp, RmsNorm
from engine.models.spec import LayerSpec, ModelSpec
from engine.quant.base import DenseLinear, Linear, LinearMethod


class Family(NamedTuple):
    """A family of the generic decoder."""

    read: families.Reader
    names: WeightNames


_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(families.llama, names.LLAMA),
    "MistralForCausalLM": Family(families.mistral, names.LLAMA),
    "MixtralForCausalLM": Family(families.mixtral, names.MIXTRAL),
    "Qwen2ForCausalLM": Family(families.qwen2, names.LLAMA),
    "Qwen3ForCausalLM": Family(families.qwen3, names.LLAMA),
    "Qwen3MoeForCausalLM": Family(families.qwen3_moe, names.LLAMA),
    "Phi3ForCausalLM": Family(families.phi3, names.PHI3),
    "GemmaForCausalLM": Family(families.gemma, names.LLAMA),
    "Gemma2ForCausalLM": Family(families.gemma2, names.GEMMA2),
    "Gemma3ForCausalLM": Family(families.gemma3, names.GEMMA2),
    "Gemma3ForConditionalGeneration": Family(families.gemma3_with_images, names.GEMMA3_WITH_IMAGES),
    "SmolLM3ForCausalLM": Family(families.smollm3, names.LLAMA),
    "GraniteForCausalLM": Family(families.granite, names.LLAMA),
    "Olmo2ForCausalLM": Family(families.olmo2, names.OLMO2),
    "SeedOssForCausalLM": Family(families.seed_oss, names.LLAMA),
    "GlmForCausalLM": Family(families.glm, names.GLM),
    "Glm4ForCausalLM": Family(families.glm4, names.GLM4),
    "ChatGLMModel": Family(families.chatglm, names.CHATGLM),
    "ChatGLMForConditionalGeneration": Family(families.chatglm, names.CHATGLM),
}


class TensorSource(Protocol):
    """Weights by the names of their files, read one at a time."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The stored shape, from headers alone; None if there is no such tensor."""
        ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in its stored type. Raises `ModelError` if missing or shaped otherwise."""
        ...


class Target(NamedTuple):
    """Where and as what weights are put; contexts up to `max_len` (0: the model's own limit).

    `head_method` is the one of the output layer, `method` that of all others (and of it, if None).
    `fused` are the device's own kernels for what lies between the linear layers.
    """

    device: torch.device
    dtype: torch.dtype
    method: LinearMethod
    max_len: int = 0
    head_method: LinearMethod | None = None
    fused: Fused | None = None


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first architecture that config.json names; "" if it names none."""
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""


def is_native(config: Mapping[str, Any]) -> bool:
    """The generic decoder covers this architecture."""
    return architecture_of(config) in _FAMILIES


def native_architectures() -> tuple[str, ...]:
    """All architectures of the generic decoder, sorted."""
    return tuple(sorted(_FAMILIES))


def read_spec(config: Mapping[str, Any], rope_rule: RopeRule = "auto") -> ModelSpec:
    """config.json's object -> spec; a `rope_rule` other than auto overrides the file's.

    Raises `ModelError` naming the architecture or key.
    """
    name = architecture_of(config)
    if name not in _FAMILIES:
        known = ", ".join(native_architectures())
        raise ModelError(f"architecture {name or '(none named)'} is not supported ({known})")
    if rope_rule != "auto":
        config = {**config, "rope_ratio_rule": rope_rule}
    return _FAMILIES[name].read(config)


def shape_of(spec: ModelSpec) -> ModelShape:
    """What memory and batch need to know."""
    return ModelShape(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        max_len=spec.max_len,
        num_layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        windows=spec.windows,
    )


def build_decoder(
    spec: ModelSpec,
    weight_names: WeightNames,
    source: TensorSource,
    target: Target,
    *,
    made_up: bool = False,
) -> Decoder:
    """Checks that all weights are there as the spec asks, then reads them, layer by layer.

    Weights that are `made_up` are not checked. Peak memory is the final size plus one layer.
    Raises `ModelError` before anything is read.
    """
    if not made_up:
        checking = Target(torch.device("meta"), target.dtype, DenseLinear, max_len=1)
        _Builder(spec, weight_names, ShapesOnly(source), checking).decoder()
    return _Builder(spec, weight_names, source, target).decoder()


def weight_names_of(config: Mapping[str, Any]) -> WeightNames:
    """The names of a native architecture."""
    return _FAMILIES[architecture_of(config)].names


class ShapesOnly:
    """A source without data: it checks what would be read."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._source.shape(name)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self._source.shape(name)
        if stored is None:
            raise ModelError(f"weight {name} {list(shape)} is missing from the model's files")
        if stored != shape:
            raise ModelError(
                f"weight {name} has shape {list(stored)}, the config asks for {list(shape)}"
            )
        return torch.empty(shape, device="meta")


class _Builder:
    """Reads one model's weights into place."""

    def __init__(
        self, spec: ModelSpec, weight_names: WeightNames, source: TensorSource, target: Target
    ) -> None:
        self._spec = spec
        self._names = weight_names
        self._source = source
        self._target = target

    def decoder(self) -> Decoder:
        spec, at = self._spec, self._names
        vocabulary = (spec.vocab_size, spec.hidden_size)
        # The largest weights come first: while they are converted, nothing else is there yet.
        own_head = (
            None if spec.tied_head else self._head(self._read(f"{at.head}.weight", *vocabulary))
        )
        embedding = self._read(f"{at.embedding}.weight", *vocabulary)
        head = own_head or self._head(embedding)
        layers = [self._layer(index, layer) for index, layer in enumerate(spec.layers)]
        ends = Ends(embedding, self._norm(at.norm, spec.hidden_size), head)
        max_len = self._target.max_len or spec.max_len
        return Decoder(spec, ends, layers, max_len, self._target.fused)

    def _head(self, weight: Tensor) -> Linear:
        return (self._target.head_method or self._target.method)(weight, None)

    def _layer(self, index: int, layer: LayerSpec) -> Layer:
        spec, at = self._spec, self._names
        prefix = at.layer.format(index)
        q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
        hidden = spec.hidden_size

        def norm(name: str, wanted: bool, size: int = hidden) -> RmsNorm | None:
            return self._norm(prefix + name, size) if wanted else None

        whole = spec.qk_norm == "all"
        has_qk_norm = spec.qk_norm != "none"
        return Layer(
            attention_norm=norm(at.attention_norm, spec.pre_norm),
            qkv=self._packed(prefix, at.qkv, (q_rows, kv_rows, kv_rows), spec.qkv_bias),
            q_norm=norm(at.q_norm, has_qk_norm, q_rows if whole else spec.head_dim),
            k_norm=norm(at.k_norm, has_qk_norm, kv_rows if whole else spec.head_dim),
            output=self._linear(prefix + at.output, (hidden, q_rows), spec.output_bias),
            attention_post_norm=norm(at.attention_post_norm, spec.post_norm),
            mlp_norm=norm(at.mlp_norm, spec.pre_norm),
            mlp=self._experts(prefix) if layer.experts else self._mlp(prefix),
            mlp_post_norm=norm(at.mlp_post_norm, spec.post_norm),
        )

    def _mlp(self, prefix: str) -> GatedMlp:
        spec, at = self._spec, self._names
        ffn, hidden = spec.ffn_size, spec.hidden_size
        gate_up = self._packed(prefix, at.gate_up, (ffn, ffn), spec.mlp_bias)
        down = self._linear(prefix + at.down, (hidden, ffn), spec.mlp_bias)
        return GatedMlp(gate_up, down, spec.activation, self._target.fused)

    def _experts(self, prefix: str) -> Experts:
        spec, at, experts = self._spec, self._names, self._spec.experts
        assert experts is not None, "a layer of experts in a spec without them"
        hidden, ffn = spec.hidden_size, experts.ffn_size
        router = self._read(f"{prefix}{at.router}.weight", experts.num_experts, hidden)
        mlps: list[GatedMlp] = []
        for number in range(experts.num_experts):
            inner = prefix + at.expert.format(number)
            gate_up = self._packed(inner, at.expert_gate_up, (ffn, ffn), spec.mlp_bias)
            down = self._linear(inner + at.expert_down, (hidden, ffn), spec.mlp_bias)
            mlps.append(GatedMlp(gate_up, down, spec.activation, self._target.fused))
        return Experts(router, mlps, experts)

    def _packed(
        self, prefix: str, parts: tuple[str, ...], rows: tuple[int, ...], with_bias: bool
    ) -> Linear:
        """Several projections of the hidden state as one product, rows in the order given."""
        sizes = rows if len(parts) == len(rows) else (sum(rows),)
        placed = [(prefix + part, size) for part, size in zip(parts, sizes, strict=True)]
        hidden = self._spec.hidden_size
        weight = _join([self._read(f"{name}.weight", size, hidden) for name, size in placed])
        bias = None
        if with_bias:
            bias = _join([self._read(f"{name}.bias", size) for name, size in placed])
        return self._target.method(weight, bias)

    def _linear(self, name: str, shape: tuple[int, int], with_bias: bool) -> Linear:
        bias = self._read(f"{name}.bias", shape[0]) if with_bias else None
        return self._target.method(self._read(f"{name}.weight", *shape), bias)

    def _norm(self, name: str, size: int) -> RmsNorm:
        weight = self._read(f"{name}.weight", size)
        return RmsNorm(weight, self._spec.norm_eps, self._spec.norm_offset, self._target.fused)

    def _read(self, name: str, *shape: int) -> Tensor:
        return self._source.get(name, shape).to(self._target.device, self._target.dtype)


def _join(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].is_meta:  # torch.cat of meta tensors imports torch's compiler: 0.9 s and 70 MB
        return parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    return torch.cat(parts)
