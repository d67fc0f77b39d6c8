"""The rotary part of config.json, in its two spellings, -> `RopeSpec`.

Owns nothing. `rope_scaling` with `rope_theta` beside it is what checkpoints carry,
`rope_parameters` is what newer libraries write.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from engine.config import ModelError
from engine.models.config_keys import ConfigKeys
from engine.models.spec import RopeSpec


def read_rope(
    keys: ConfigKeys, head_dim: int, max_len: int, theta: float, *, partial: float = 1.0
) -> RopeSpec:
    """`theta` and `partial` (the rotated share of a head) are the family's defaults.

    Raises `ModelError` for a kind of scaling that is not known.
    """
    newer = keys.section("rope_parameters")
    if newer.section("full_attention").values:
        newer = newer.section("full_attention")
    scaling = newer if newer.values else keys.section("rope_scaling")
    share = newer.number("partial_rotary_factor", keys.number("partial_rotary_factor", partial))
    dim = int(head_dim * share)
    if dim % 2 or dim <= 0:
        raise ModelError(
            f"config.json: rotary embedding needs pairs, head_dim {head_dim} with "
            f"partial_rotary_factor {share:g} has {dim} values to rotate"
        )
    divisors = keys.numbers("rope_freq_factors", dim // 2)
    plain = RopeSpec(
        theta=newer.number("rope_theta", keys.number("rope_theta", theta)),
        dim=dim,
        interleaved=keys.flag("rope_interleaved"),
        divisors=divisors,
    )
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind in ("default", "none", "mrope"):
        return plain
    original = scaling.size("original_max_position_embeddings", max_len)
    original = keys.size("original_max_position_embeddings", original)
    if kind in ("longrope", "su"):
        return _longrope(plain, scaling, max_len, original)
    plain = replace(plain, factor=scaling.number("factor"), original_max_len=original)
    if plain.factor <= 0:
        raise scaling.wrong("factor", "a positive number")
    match kind:
        case "linear":
            return replace(plain, scaling="linear")
        case "llama3":
            return replace(
                plain,
                scaling="llama3",
                low_freq_factor=scaling.number("low_freq_factor"),
                high_freq_factor=scaling.number("high_freq_factor"),
            )
        case "yarn":
            return _yarn(plain, scaling)
        case _:
            raise ModelError(
                f"config.json: rope type {kind!r} is not supported (default, linear, llama3, yarn, "
                "longrope are)"
            )


def _yarn(plain: RopeSpec, scaling: ConfigKeys) -> RopeSpec:
    """Source of the magnitude: YaRN (arXiv 2309.00071), 0.1 ln(factor) + 1."""

    def sharpness(scale: float) -> float:
        return 0.1 * scale * math.log(plain.factor) + 1.0 if plain.factor > 1 else 1.0

    scale, scale_all = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    own = sharpness(scale) / sharpness(scale_all) if scale and scale_all else sharpness(1.0)
    return replace(
        plain,
        scaling="yarn",
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        magnitude=scaling.number("attention_factor", own),
    )


def _longrope(plain: RopeSpec, scaling: ConfigKeys, max_len: int, original: int) -> RopeSpec:
    """Source: LongRoPE (arXiv 2402.13753), magnitude as in the published Phi-3 models."""
    factor = scaling.number("factor", max_len / original)
    own = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    for key in ("short_factor", "long_factor"):
        if not scaling.has(key):
            raise scaling.wrong(key, f"a list of {plain.dim // 2} numbers")
    return replace(
        plain,
        scaling="longrope",
        original_max_len=original,
        magnitude=scaling.number("attention_factor", own),
        divisors=scaling.numbers("short_factor", plain.dim // 2),
        long_divisors=scaling.numbers("long_factor", plain.dim // 2),
    )
