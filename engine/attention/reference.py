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
            return self._decode(q, keys, values, inputs.groups[0]).flatten(1)
        out = torch.empty_like(q)
        for group in inputs.groups:
            rows = q[group.begin : group.end]
            out[group.begin : group.end] = self._decode(rows, keys, values, group)
        for chunk in inputs.chunks:
            rows = q[chunk.begin : chunk.end]
            out[chunk.begin : chunk.end] = self._prefill(rows, keys, values, chunk)
        return out.flatten(1)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup) -> Tensor:
        """One query per sequence; the queries that share a kv head form one product."""
        num_rows, num_heads, head_dim = q.shape
        kv_heads = keys.shape[0]
        context = _gather(keys, group.blocks, kv_heads * num_rows)[:, : group.length]
        queries = q.view(num_rows, kv_heads, -1, head_dim).transpose(0, 1)
        queries = queries.reshape(kv_heads * num_rows, -1, head_dim)
        if group.mask is None:
            scores = torch.bmm(queries, context.transpose(1, 2)).mul_(self._scale)
        else:
            mask = group.mask.repeat(kv_heads, 1, 1)
            scores = torch.baddbmm(mask, queries, context.transpose(1, 2), alpha=self._scale)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        context = _gather(values, group.blocks, kv_heads * num_rows)[:, : group.length]
        out = torch.bmm(weights, context).view(kv_heads, num_rows, -1, head_dim)
        return out.transpose(0, 1).reshape(num_rows, num_heads, head_dim)

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, chunk: Chunk) -> Tensor:
        """Causal attention of one chunk over its sequence's pages, later positions cut off."""
        num_tokens, num_heads, head_dim = q.shape
        kv_heads = keys.shape[0]
        length = chunk.start + num_tokens
        shape = (kv_heads, num_heads // kv_heads, length, head_dim)
        context_k = _gather(keys, chunk.blocks, kv_heads)[:, None, :length].expand(shape)
        context_v = _gather(values, chunk.blocks, kv_heads)[:, None, :length].expand(shape)
        queries = q.view(num_tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            queries,
            context_k,
            context_v,
            chunk.mask,
            is_causal=chunk.mask is None,
            scale=self._scale,
        )
        return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _gather(memory: Tensor, blocks: Tensor, batch: int) -> Tensor:
    """[kv_heads, num_blocks, block_size, head_dim] -> [batch, positions, head_dim]."""
    return memory.index_select(1, blocks).view(batch, -1, memory.shape[-1])
