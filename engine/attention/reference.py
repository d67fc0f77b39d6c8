"""Paged attention in plain torch: the CPU's backend and the oracle for every other one.

Owns nothing. Rows that decode are batched across requests (grouped by context length, so that one
long context does not make short ones pay); prompt chunks go one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionRule, Rotation


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


class ReferenceStep(NamedTuple):
    """See `engine.attention.base.StepAttention`.

    `slots` is int64 [num_tokens]: block * block_size + offset of each token's keys and values. The
    groups and chunks hold a mask for each window that any layer's rule asks for.
    """

    slots: Tensor
    groups: list[DecodeGroup]
    chunks: list[Chunk]

    def store(
        self, qkv: Tensor, num_heads: int, layer_kv: Tensor, rotation: Rotation | None
    ) -> None:
        if rotation is not None:
            rotate_(qkv[:, : num_heads + layer_kv.shape[0] // 2], rotation)
        memory = layer_kv.view(layer_kv.shape[0], -1, layer_kv.shape[-1])
        memory.index_copy_(1, self.slots, qkv[:, num_heads:].transpose(0, 1))

    def attend(self, q: Tensor, layer_kv: Tensor, rule: AttentionRule) -> Tensor:
        if len(self.groups) == 1 and not self.chunks:
            return _decode(q, layer_kv, self.groups[0], rule)
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        for group in self.groups:
            rows = q[group.begin : group.end]
            out[group.begin : group.end] = _decode(rows, layer_kv, group, rule)
        for chunk in self.chunks:
            rows = q[chunk.begin : chunk.end]
            out[chunk.begin : chunk.end] = _prefill(rows, layer_kv, chunk, rule)
        return out


def rotate_(x: Tensor, rotation: Rotation) -> None:
    """Rotates heads [num_tokens, num_heads, head_dim] in place, in float32.

    Source: RoFormer (arXiv 2104.09864), section 3.2.2, said with complex numbers.
    """
    turns = rotation.turns.unsqueeze(1)
    dim = 2 * turns.shape[-1]
    if dim < x.shape[-1]:
        x = x[..., :dim]
    wide = x.float()
    if rotation.interleaved:
        torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2)).mul_(turns)
        if wide is not x:
            x.copy_(wide)
        return
    half = dim // 2
    turned = torch.complex(wide[..., :half], wide[..., half:]).mul_(turns)
    x[..., :half] = turned.real
    x[..., half:] = turned.imag


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
