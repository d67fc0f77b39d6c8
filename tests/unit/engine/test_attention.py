"""Paged attention and the batch's inputs against dense attention over the same tokens."""

from __future__ import annotations

import pytest
import torch

from engine.attention.base import AttentionRule
from engine.device.batch import Batch
from engine.plan import Admit, Row, StepPlan
from engine.protocol import Sampling

KV_HEADS, GROUP, HEAD, BLOCK = 2, 3, 8, 4
HEADS = KV_HEADS * GROUP
RULE = AttentionRule(HEAD**-0.5)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
    """The last len(q) positions attend causally to all of k and v; [tokens, heads, head_dim]."""
    length, start = len(k), len(k) - len(q)
    k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    distances = (start + torch.arange(len(q)))[:, None] - torch.arange(length)
    allowed = (distances >= 0) & (distances < (rule.window or length))
    weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@pytest.mark.parametrize(
    "steps",
    [
        [[(0, 0, 5)], [(0, 5, 1)], [(0, 6, 1)]],
        [[(0, 0, 3), (1, 0, 9)], [(0, 3, 1), (1, 9, 1)], [(0, 4, 1), (1, 10, 6)]],
        [
            [(0, 0, 1), (1, 0, 40), (2, 0, 7)],
            [(0, 1, 1), (1, 40, 1), (2, 7, 1)],
            [(2, 8, 2), (0, 2, 1)],
        ],
        [[(0, 0, 2)], [(0, 2, 3)], [(0, 5, 4)], [(0, 9, 1)]],
    ],
    ids=["alone", "mixed", "very different lengths", "chunks"],
)
@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        RULE._replace(window=3),
        RULE._replace(window=12),
        RULE._replace(softcap=0.5),
        RULE._replace(window=5, softcap=0.5),
    ],
    ids=["plain", "window", "wide window", "softcap", "both"],
)
def test_equals_dense_attention(
    steps: list[list[tuple[int, int, int]]], rule: AttentionRule
) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = Batch(3, 64, BLOCK, torch.device("cpu"), torch.float32, (0, 3, 5, 12))
    memory = torch.zeros(2 * KV_HEADS, 64, BLOCK, HEAD)
    # Block numbers are shuffled, so that no test passes by accident of order.
    blocks = torch.randperm(64, generator=generator).view(4, 16).tolist()
    admits = [Admit(slot, [1], 1, blocks[slot], Sampling(), ()) for slot in range(3)]
    batch.apply(StepPlan(0, [], admits, [], []))
    past: dict[int, list[torch.Tensor]] = {slot: [] for slot in range(3)}
    for step in steps:
        rows = [Row(slot, slot, start, count, True) for slot, start, count in step]
        inputs = batch.inputs(rows)
        total = sum(row.count for row in rows)
        q = torch.randn(total, HEADS, HEAD, generator=generator)
        k, v = torch.randn(2, total, KV_HEADS, HEAD, generator=generator)
        inputs.attention.store(torch.cat((q, k, v), 1), HEADS, memory, None)
        out = inputs.attention.attend(q, memory, rule)
        for index, row in enumerate(rows):
            end = inputs.last[index] + 1
            span = slice(end - row.count, end)
            assert inputs.positions[span].tolist() == list(range(row.start, row.start + row.count))
            past[row.slot].append(torch.stack((k[span], v[span])))
            keys, values = torch.cat(past[row.slot], 1)
            torch.testing.assert_close(
                out[span], dense(q[span], keys, values, rule), atol=1e-5, rtol=1e-5
            )


def test_stale_table_entries_are_harmless() -> None:
    """A slot's table keeps entries of its former owner behind the new ones."""
    batch = Batch(2, 64, BLOCK, torch.device("cpu"), torch.float32)
    admits = [
        Admit(0, [1], 1, list(range(16)), Sampling(), ()),
        Admit(1, [1], 1, [20], Sampling(), ()),
    ]
    batch.apply(StepPlan(0, [], admits, [], []))
    batch.apply(StepPlan(1, [], [Admit(0, [1], 1, [30], Sampling(), ())], [], []))
    [group] = batch.inputs([Row(0, 0, 0, 1, True), Row(1, 1, 3, 1, True)]).attention.groups
    assert set(group.blocks.tolist()) == {30, 20}
