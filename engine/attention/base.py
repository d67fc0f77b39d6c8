"""What one step tells every attention layer, and the protocol that a backend fulfils.

Shapes: `q` is [num_tokens, num_heads, head_dim]; `kv` is [num_tokens, 2 * kv_heads, head_dim]: all
key heads, then all value heads, as the packed projection leaves them. The KV memory of one layer is
[2 * kv_heads, num_blocks, block_size, head_dim] in the same order, so that one copy writes both.
Query head i reads kv head i // (num_heads // kv_heads).
"""

from __future__ import annotations

from collections.abc import Mapping
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


class DecodeGroup(NamedTuple):
    """Tokens [begin, end) of the step, one per sequence, whose contexts are of similar length.

    `blocks` is int64 [(end - begin) * blocks_per_row], row by row, padded with any valid block.
    `masks[window]` is float [end - begin, 1, blocks_per_row * block_size], 0 or -inf, and None
    where one row sees exactly all of `length` positions.
    """

    begin: int
    end: int
    length: int
    blocks: Tensor
    masks: Mapping[int, Tensor | None]


class Chunk(NamedTuple):
    """Tokens [begin, end) of the step: consecutive positions from `start` on of one sequence.

    `blocks` is int64 [ceil((start + end - begin) / block_size)]; `masks[window]` is float
    [end - begin, start + end - begin], 0 or -inf, and None where it would be plain causal
    (`start` is 0 and no position is outside of the window).
    """

    begin: int
    end: int
    start: int
    blocks: Tensor
    masks: Mapping[int, Tensor | None]


class AttentionInputs(NamedTuple):
    """One step. `slots` is int64 [num_tokens]: block * block_size + offset of each token's KV."""

    slots: Tensor
    groups: list[DecodeGroup]
    chunks: list[Chunk]


class AttentionBackend(Protocol):
    """Chosen once in the device's builder; a backend is a file."""

    def attend(
        self, q: Tensor, kv: Tensor, layer_kv: Tensor, inputs: AttentionInputs, rule: AttentionRule
    ) -> Tensor:
        """Writes kv to `inputs.slots`, attends; returns [num_tokens, num_heads * head_dim].

        `inputs` hold a mask for each window that any layer's rule asks for.
        """
        ...
