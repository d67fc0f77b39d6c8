"""config.json -> a frozen `ModelSpec`: everything the generic decoder needs to know of a model.

Owns nothing, imports no torch. A value that the decoder does not implement raises `ModelError` with
the key, the value and what would be accepted: never a silently wrong model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from engine.config import ModelError

RopeScaling = Literal["none", "linear", "llama3"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding on the first `dim` values of a head.

    `interleaved` pairs values (0, 1), (2, 3), …; otherwise value i is paired with i + dim / 2.
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 0


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer with pre-norm blocks; sizes in values, not bytes."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    norm_eps: float
    rope: RopeSpec
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    dtype: str = "float32"

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """KV cache memory of one position over all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * bytes_per_value


def llama_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Llama-shaped models (`LlamaForCausalLM`), original keys of config.json."""
    read = _Keys(config)
    read.expect("hidden_act", "silu")
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    kv_heads = read.size("num_key_value_heads", heads)
    head_dim = read.size("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(
            f"config.json: num_key_value_heads {kv_heads} does not divide {heads} heads"
        )
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim {head_dim} is odd, rotary embedding needs pairs")
    max_len = read.size("max_position_embeddings", 2048)
    bias = read.flag("attention_bias")
    return ModelSpec(
        family="llama",
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden,
        ffn_size=read.size("intermediate_size"),
        num_layers=read.size("num_hidden_layers"),
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_len=max_len,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rope=_rope(read, head_dim, max_len),
        attention_scale=head_dim**-0.5,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=read.flag("mlp_bias"),
        tied_head=read.flag("tie_word_embeddings"),
        dtype=read.text("dtype", read.text("torch_dtype", "float32")),
    )


def _rope(read: _Keys, head_dim: int, max_len: int) -> RopeSpec:
    """Reads both spellings: `rope_scaling` with `rope_theta`, and the newer `rope_parameters`."""
    newer = read.section("rope_parameters")
    scaling = _Keys(newer or read.section("rope_scaling"), "rope_scaling.")
    theta = _Keys(newer, "rope_parameters.").number(
        "rope_theta", read.number("rope_theta", 10000.0)
    )
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    plain = RopeSpec(theta=theta, dim=head_dim, interleaved=read.flag("rope_interleaved"))
    if kind in ("default", "none"):
        return plain
    factor = scaling.number("factor")
    if kind == "linear":
        return replace(plain, scaling="linear", factor=factor)
    if kind == "llama3":
        return replace(
            plain,
            scaling="llama3",
            factor=factor,
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
            original_max_len=scaling.size("original_max_position_embeddings", max_len),
        )
    raise ModelError(
        f"config.json: rope type {kind!r} is not supported (default, linear, llama3 are)"
    )


class _Keys:
    """Typed reads from a JSON object; a missing or wrong value raises `ModelError` with its key."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"config.json: {self._prefix}{key} must be a number, it is {value!r}")
        return float(value)

    def size(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelError(
                f"config.json: {self._prefix}{key} must be a positive integer, it is {value!r}"
            )
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise ModelError(
                f"config.json: {self._prefix}{key} must be true or false, it is {value!r}"
            )
        return value

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ModelError(f"config.json: {self._prefix}{key} must be a string, it is {value!r}")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        value = self._values.get(key) or {}
        if not isinstance(value, Mapping):
            raise ModelError(f"config.json: {self._prefix}{key} must be an object, it is {value!r}")
        return value

    def expect(self, key: str, wanted: str) -> None:
        value = self._get(key, wanted)
        if value != wanted:
            raise ModelError(
                f"config.json: {self._prefix}{key} {value!r} is not supported ({wanted!r} is)"
            )

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"config.json: {self._prefix}{key} is missing")
        return default
