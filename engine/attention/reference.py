"""Paged attention in plain torch: the CPU's backend and the oracle for every other one.

Owns nothing. Rows that decode are batched across requests (grouped by context length, so that one
long context does not make short ones pay); prompt chunks go one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionInputs, AttentionRule, Chunk, DecodeGroup


class ReferenceAttention:
    """See `engine.attention.base.AttentionBackend`."""

    def attend(
        self, q: Tensor, kv: Tensor, layer_kv: Tensor, inputs: AttentionInputs, rule: AttentionRule
    ) -> Tensor:
        memory = layer_kv.view(layer_kv.shape[0], -1, layer_kv.shape[-1])
        memory.index_copy_(1, inputs.slots, kv.transpose(0, 1))
        if len(inputs.groups) == 1 and not inputs.chunks:
            return _decode(q, layer_kv, inputs.groups[0], rule)
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        for group in inputs.groups:
            rows = q[group.begin : group.end]
            out[group.begin : group.end] = _decode(rows, layer_kv, group, rule)
        for chunk in inputs.chunks:
            rows = q[chunk.begin : chunk.end]
            out[chunk.begin : chunk.end] = _prefill(rows, layer_kv, chunk, rule)
        return out


def _decode(q: Tensor, layer_kv: Tensor, group: DecodeGroup, rule: AttentionRule) -> Tensor:
    """One query per sequence; the queries that share a kv head form one product."""
    num_rows, _, head_dim = q.shape
    kv_heads = layer_kv.shape[0] // 2
    pages = layer_kv.index_select(1, group.blocks)
    pages = pages.view(2, kv_heads * num_rows, -1, head_dim)
    queries = q.view(num_rows, kv_heads, -1, head_dim).transpose(0, 1)
    queries = queries.reshape(kv_heads * num_rows, -1, head_dim)
    mask = group.masks[rule.window]
    if mask is None:
        keys, values = pages[:, :, : group.length]
        scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(rule.scale)
    else:
        keys, values = pages
        mask = mask.repeat(kv_heads, 1, 1)
        if rule.softcap:
            scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(rule.scale)
        else:
            scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=rule.scale)
    if rule.softcap:
        scores = _capped(scores, rule.softcap)
        scores = scores if mask is None else scores.add_(mask)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    out = torch.bmm(weights, values).view(kv_heads, num_rows, -1)
    return out.transpose(0, 1).reshape(num_rows, -1)


def _prefill(q: Tensor, layer_kv: Tensor, chunk: Chunk, rule: AttentionRule) -> Tensor:
    """Causal attention of one chunk over its sequence's pages, later positions cut off."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = layer_kv.shape[0] // 2
    length = chunk.start + num_tokens
    shape = (2, kv_heads, num_heads // kv_heads, length, head_dim)
    pages = layer_kv.index_select(1, chunk.blocks).view(2, kv_heads, 1, -1, head_dim)
    keys, values = pages[..., :length, :].expand(shape)
    queries = q.view(num_tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    mask = chunk.masks[rule.window]
    if rule.softcap:
        scores = _capped((queries @ keys.transpose(-1, -2)).mul_(rule.scale), rule.softcap)
        if mask is None:
            hidden = torch.ones(num_tokens, length, dtype=torch.bool, device=q.device).triu_(1)
            scores.masked_fill_(hidden, float("-inf"))
        else:
            scores.add_(mask)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, values)
    else:
        out = F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, scale=rule.scale
        )
    return out.permute(2, 0, 1, 3).reshape(num_tokens, -1)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    scores.div_(softcap).tanh_().mul_(softcap)
    return scores
