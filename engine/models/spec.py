"""What the generic decoder needs to know of a model, as frozen values.

Owns nothing, imports no torch. How a family's config.json becomes a spec is in
`engine.models.families`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.kernels.base import Activation

RopeScaling = Literal["none", "linear", "llama3", "yarn", "longrope"]
QkNorm = Literal["none", "head", "all"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding on the first `dim` values of a head.

    `interleaved` pairs values (0, 1), (2, 3), …; otherwise value i is paired with i + dim / 2.
    `magnitude` multiplies the rotations (yarn and longrope sharpen attention by it).
    `divisors` divide the frequencies one by one, `long_divisors` do where the engine serves
    contexts beyond `original_max_len`.
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()


class LayerSpec(msgspec.Struct, frozen=True):
    """What differs between the layers of one model. `rope` is an index into its ropes, -1: none."""

    rope: int = 0
    window: int = 0  # positions a token sees, itself included; 0: all
    experts: bool = False


class ExpertsSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of gated MLPs; each token goes through the `top_k` that its router prefers.

    Shares are the softmax over all experts; `renormalize` makes those of the chosen sum to 1.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    renormalize: bool


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer; sizes in values, not bytes.

    `pre_norm` norms what goes into attention and MLP, `post_norm` what comes out, before it is
    added to the residual. A norm multiplies by `norm_offset` + weight. `qk_norm` norms queries and
    keys before the rotation: per head, or all heads as one vector.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    norm_eps: float
    ropes: tuple[RopeSpec, ...]
    layers: tuple[LayerSpec, ...]
    attention_scale: float
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    qk_norm: QkNorm = "none"
    activation: Activation = "silu"
    experts: ExpertsSpec | None = None
    tied_head: bool = False

    @property
    def windows(self) -> tuple[int, ...]:
        """Each window that some layer has, once."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))
