"""The one generic decoder: pre-norm blocks of attention and gated MLP, driven by a `ModelSpec`.

Owns the weights. Must not know requests, scheduling or sampling: token ids, positions and the
step's attention inputs come as arguments, hidden states go out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionInputs
from engine.models.parts import GatedMlp, RmsNorm, Rope
from engine.models.spec import ModelSpec
from engine.quant.base import Linear


class Layer(NamedTuple):
    """Weights of one block. `qkv` is packed: query heads, then key heads, then value heads."""

    input_norm: RmsNorm
    qkv: Linear
    output: Linear
    mlp_norm: RmsNorm
    mlp: GatedMlp

    @property
    def nbytes(self) -> int:
        """Memory held by this block's weights."""
        return sum(part.nbytes for part in self)


class Decoder:
    """[num_tokens] ids -> hidden states -> logits, over a paged KV cache."""

    def __init__(
        self, spec: ModelSpec, embedding: Tensor, layers: list[Layer], norm: RmsNorm, head: Linear
    ) -> None:
        self._spec = spec
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rope = Rope(spec.rope, spec.max_len, embedding.device)

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        parts = [self._embedding.nbytes, self._head.nbytes, self._norm.nbytes]
        parts += [layer.nbytes for layer in self._layers]
        return sum(parts)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        kv: list[Tensor],
        inputs: AttentionInputs,
        attention: AttentionBackend,
    ) -> Tensor:
        """int64 [num_tokens] ids and positions -> hidden states [num_tokens, hidden], not normed.

        Writes the keys and values of all tokens into `kv`, one tensor a layer.
        """
        spec = self._spec
        queries, rotated = spec.num_heads, spec.num_heads + spec.kv_heads
        heads = rotated + spec.kv_heads
        rotations = self._rope.at(positions)
        hidden = F.embedding(ids, self._embedding)
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            qkv = layer.qkv(layer.input_norm(hidden)).view(-1, heads, spec.head_dim)
            self._rope.rotate_(qkv[:, :rotated], rotations)
            mixed = attention.attend(qkv[:, :queries], qkv[:, queries:], layer_kv, inputs)
            hidden = layer.output.add(mixed, hidden)
            hidden = layer.mlp.add(layer.mlp_norm(hidden), hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of the wanted tokens [n, hidden] -> float32 [n, vocab_size]."""
        return self._head(self._norm(hidden)).float()
