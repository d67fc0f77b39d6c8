"""Paged attention in plain torch: the CPU's backend and the oracle for every other one.

Owns nothing. Rows that decode are batched across requests (grouped by context length, so that one
long context does not make short ones pay); prompt chunks go one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionInputs, Chunk, DecodeGroup


class ReferenceAttention:
    """See `engine.attention.base.AttentionBackend`. `scale` multiplies the scores."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer_kv: Tensor, inputs: AttentionInputs
    ) -> Tensor:
        keys, values = layer_kv[0], layer_kv[1]
        keys.flatten(1, 2).index_copy_(1, inputs.slots, k.transpose(0, 1))
        values.flatten(1, 2).index_copy_(1, inputs.slots, v.transpose(0, 1))
        if len(inputs.groups) == 1 and not inputs.chunks:
            return self._decode(q, layer_kv, inputs.groups[0]).flatten(1)
        out = torch.empty_like(q)
        for group in inputs.groups:
            rows = q[group.begin : group.end]
            out[group.begin : group.end] = self._decode(rows, layer_kv, group)
        for chunk in inputs.chunks:
            rows = q[chunk.begin : chunk.end]
            out[chunk.begin : chunk.end] = self._prefill(rows, layer_kv, chunk)
        return out.flatten(1)

    def _decode(self, q: Tensor, layer_kv: Tensor, group: DecodeGroup) -> Tensor:
        """One query per sequence; the queries that share a kv head form one product."""
        num_rows, num_heads, head_dim = q.shape
        kv_heads = layer_kv.shape[1]
        pages = _gather(layer_kv, group.blocks).view(2, kv_heads * num_rows, -1, head_dim)
        keys, values = pages[:, :, : group.length]
        queries = q.view(num_rows, kv_heads, -1, head_dim).transpose(0, 1)
        queries = queries.reshape(kv_heads * num_rows, -1, head_dim)
        if group.mask is None:
            scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(self._scale)
        else:
            mask = group.mask.repeat(kv_heads, 1, 1)
            scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=self._scale)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        out = torch.bmm(weights, values).view(kv_heads, num_rows, -1, head_dim)
        return out.transpose(0, 1).reshape(num_rows, num_heads, head_dim)

    def _prefill(self, q: Tensor, layer_kv: Tensor, chunk: Chunk) -> Tensor:
        """Causal attention of one chunk over its sequence's pages, later positions cut off."""
        num_tokens, num_heads, head_dim = q.shape
        kv_heads = layer_kv.shape[1]
        length = chunk.start + num_tokens
        shape = (2, kv_heads, num_heads // kv_heads, length, head_dim)
        pages = _gather(layer_kv, chunk.blocks).view(2, kv_heads, 1, -1, head_dim)
        keys, values = pages[..., :length, :].expand(shape)
        queries = q.view(num_tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            queries, keys, values, chunk.mask, is_causal=chunk.mask is None, scale=self._scale
        )
        return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _gather(layer_kv: Tensor, blocks: Tensor) -> Tensor:
    """Keys and values of these blocks: [2 * kv_heads, len(blocks), block_size, head_dim]."""
    return layer_kv.flatten(0, 1).index_select(1, blocks)
