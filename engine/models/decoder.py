"""The one generic decoder: blocks of attention and MLP, driven by a `ModelSpec`.

Owns the weights. Must not know requests, scheduling or sampling: token ids, positions and the
step's attention inputs come as arguments, hidden states go out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionRule, StepAttention
from engine.kernels.base import Fused
from engine.models.parts import Experts, GatedMlp, RmsNorm, Rope
from engine.models.spec import ModelSpec
from engine.quant.base import Linear


class Layer(NamedTuple):
    """Weights of one block. `qkv` is packed: query heads, then key heads, then value heads."""

    attention_norm: RmsNorm | None
    qkv: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    output: Linear
    attention_post_norm: RmsNorm | None
    mlp_norm: RmsNorm | None
    mlp: GatedMlp | Experts
    mlp_post_norm: RmsNorm | None

    @property
    def nbytes(self) -> int:
        """Memory held by this block's weights."""
        return sum(part.nbytes for part in self if part is not None)


class Ends(NamedTuple):
    """What stands before and behind the blocks. The head of a tied model shares the embedding."""

    embedding: Tensor
    norm: RmsNorm
    head: Linear


class Decoder:
    """See `engine.models.base.Model`."""

    def __init__(
        self,
        spec: ModelSpec,
        ends: Ends,
        layers: list[Layer],
        max_len: int,
        fused: Fused | None = None,
    ) -> None:
        """`max_len` is the longest context that will be served."""
        self._spec = spec
        self._fused = fused
        self._ends = ends
        self._layers = layers
        self._ropes = [Rope(rope, max_len, ends.embedding.device) for rope in spec.ropes]
        self._rules = [
            AttentionRule(spec.attention_scale, layer.window, spec.attention_softcap)
            for layer in spec.layers
        ]
        # Gemma's own code rounds the scale to the model's type.
        scale = torch.tensor(spec.embedding_scale, dtype=ends.embedding.dtype)
        self._embedding_scale = float(scale)

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        return sum(part.nbytes for part in self._ends) + sum(layer.nbytes for layer in self._layers)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        kv: list[Tensor],
        attention: StepAttention,
    ) -> Tensor:
        """See `engine.models.base.Model`: hidden states before the final norm."""
        spec = self._spec
        rotations = [rope.at(positions) for rope in self._ropes]
        hidden = self._embed(ids)
        steps = zip(self._layers, spec.layers, self._rules, kv, strict=True)
        for layer, layer_spec, rule, layer_kv in steps:
            rotation = None if layer_spec.rope < 0 else rotations[layer_spec.rope]
            qkv = self._project(layer, hidden)
            attention.store(qkv, spec.num_heads, layer_kv, rotation)
            mixed = attention.attend(qkv[:, : spec.num_heads], layer_kv, rule)
            if layer.attention_post_norm is None and spec.residual_scale == 1.0:
                hidden = layer.output.add(mixed, hidden)
            else:
                mixed = layer.output(mixed)
                hidden = self._added(mixed, hidden, layer.attention_post_norm)
            if layer.mlp_post_norm is None and spec.residual_scale == 1.0:
                hidden = layer.mlp.add(hidden, hidden, layer.mlp_norm)
            else:
                mixed = layer.mlp(hidden, layer.mlp_norm)
                hidden = self._added(mixed, hidden, layer.mlp_post_norm)
        return hidden

    def last_hidden(self, hidden: Tensor) -> Tensor:
        """See `engine.models.base.Model`."""
        return self._ends.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `engine.models.base.Model`."""
        logits = self._ends.head(self._ends.norm(hidden)).float()
        if self._spec.logit_scale != 1.0:
            logits = logits.mul_(self._spec.logit_scale)
        cap = self._spec.logit_softcap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def _project(self, layer: Layer, hidden: Tensor) -> Tensor:
        """Packed queries, keys and values [n, num_heads + 2 * kv_heads, head_dim]."""
        spec = self._spec
        queries, rotated = spec.num_heads, spec.num_heads + spec.kv_heads
        qkv = layer.qkv(hidden if layer.attention_norm is None else layer.attention_norm(hidden))
        qkv = qkv.view(-1, rotated + spec.kv_heads, spec.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            self._norm_(qkv[:, :queries], layer.q_norm)
            self._norm_(qkv[:, queries:rotated], layer.k_norm)
        return qkv

    def _norm_(self, heads: Tensor, norm: RmsNorm) -> None:
        if self._spec.qk_norm == "all":
            heads.copy_(norm(heads.flatten(1)).view(heads.shape))
        else:
            heads.copy_(norm(heads))

    def _embed(self, ids: Tensor) -> Tensor:
        if self._fused is not None:
            return self._fused.embed(ids, self._ends.embedding, self._embedding_scale)
        hidden = F.embedding(ids, self._ends.embedding)
        return hidden if self._embedding_scale == 1.0 else hidden.mul_(self._embedding_scale)

    def _added(self, y: Tensor, residual: Tensor, norm: RmsNorm | None) -> Tensor:
        """residual + y, which is normed and scaled first where the model does so."""
        y = y if norm is None else norm(y)
        return residual.add_(y, alpha=self._spec.residual_scale)
