"""What the device needs of any model: its shape, and token ids to hidden states to logits.

Owns nothing. The generic decoder, the encoder and the fallback are files beside this one.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
from torch import Tensor

from engine.attention.base import StepAttention


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes that memory, batch and limits depend on. `windows` are those of all layers, 0: full."""

    vocab_size: int
    hidden_size: int
    max_len: int
    num_layers: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...] = (0,)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """KV cache memory of one position over all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * bytes_per_value


class Model(Protocol):
    """A causal language model over a paged KV cache."""

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        ...

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        kv: list[Tensor],
        attention: StepAttention,
    ) -> Tensor:
        """int64 [num_tokens] ids and positions -> hidden states [num_tokens, hidden_size].

        Writes the keys and values of all tokens into `kv`, one tensor a layer (see
        `engine.attention.base` for its shape).
        """
        ...

    def last_hidden(self, hidden: Tensor) -> Tensor:
        """What embeddings are made of, from rows of `forward`: after the final norm."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `forward` [n, hidden_size] -> float32 [n, vocab_size]."""
        ...
