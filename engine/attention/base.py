"""What the decoder asks of attention in each step, and the rules that layers differ in.

Shapes: the packed product is [num_tokens, num_heads + 2 * kv_heads, head_dim]: query heads, key
heads, value heads. The KV memory of one layer is [2 * kv_heads, num_blocks, block_size, head_dim]
in the same order, so that one copy writes both. Query head i reads kv head
i // (num_heads // kv_heads).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class AttentionRule(NamedTuple):
    """What one layer does with its scores: `scale` multiplies them.

    `window` lets a token see itself and the window - 1 positions before it, 0 lets it see all.
    `softcap` bounds scores by softcap * tanh(score / softcap), 0 does not.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0


class Rotation(NamedTuple):
    """Rotary embedding of one step: `turns` is complex64 [num_tokens, dim / 2].

    The first `dim` values of a head are rotated as complex numbers: neighbours if `interleaved`,
    else value i with value i + dim / 2.
    """

    turns: Tensor
    interleaved: bool


class StepAttention(Protocol):
    """Attention over the tokens of one step, bound to their pages. A backend is a file."""

    def store(
        self, qkv: Tensor, num_heads: int, layer_kv: Tensor, rotation: Rotation | None
    ) -> None:
        """Rotates query and key heads of the packed product and writes keys and values to pages.

        In place; afterwards only the first `num_heads` heads of `qkv`, the queries, are of use.
        """
        ...

    def attend(self, q: Tensor, layer_kv: Tensor, rule: AttentionRule) -> Tensor:
        """After `store`: [num_tokens, num_heads, head_dim] -> [num_tokens, heads * head_dim]."""
        ...
