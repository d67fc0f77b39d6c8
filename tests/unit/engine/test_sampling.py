"""Sampling against straightforward definitions, and its independence of company."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.device.sampling import (
    SlotSampling,
    edit_logits,
    exponentials,
    mask_logits,
    noise_key,
    sample,
    score,
)
from engine.plan import Admit
from engine.protocol import Sampling

VOCAB = 50
CPU = torch.device("cpu")


def slot(num_prompt: int = 2, stop_ids: tuple[int, ...] = (), **params: object) -> SlotSampling:
    sampling = Sampling(**params)  # type: ignore[arg-type]
    return SlotSampling.of(Admit(0, [], num_prompt, [], sampling, stop_ids), CPU)


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draws(params: SlotSampling, count: int, scores: torch.Tensor) -> list[int]:
    """Tokens at `count` successive positions, all from the same scores."""
    return [
        int(sample(scores.clone(), [params], [torch.zeros(position, dtype=torch.int64)])[0])
        for position in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-9}]
)
def test_greedy(params: dict[str, float]) -> None:
    scores = logits()
    assert set(draws(slot(**params), 5, scores)) == {int(scores.argmax())}


def test_same_seed_and_position_give_the_same_token_whatever_runs_beside() -> None:
    scores = logits(rows=3)
    params = [slot(seed=7), slot(seed=8, temperature=0.5), slot(temperature=0.0)]
    known = [torch.zeros(n, dtype=torch.int64) for n in (5, 9, 4)]
    together = sample(scores.clone(), params, known).tolist()
    alone = [
        int(sample(scores[i : i + 1].clone(), params[i : i + 1], known[i : i + 1])[0])
        for i in range(3)
    ]
    assert together == alone


def test_other_seeds_give_other_texts() -> None:
    scores = logits()
    texts = {tuple(draws(slot(seed=seed, temperature=3.0), 20, scores)) for seed in range(5)}
    assert len(texts) == 5


def test_frequencies_follow_the_softmax() -> None:
    scores = logits()
    expected = torch.softmax(scores[0] / 0.8, -1)
    counts = torch.bincount(
        torch.tensor(draws(slot(temperature=0.8, seed=3), 4000, scores)), minlength=VOCAB
    )
    deviation = (counts / 4000 - expected).abs()
    assert bool((deviation < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all())


def test_top_k_keeps_the_k_best() -> None:
    scores = logits()
    best = set(scores[0].topk(3).indices.tolist())
    assert set(draws(slot(top_k=3, temperature=2.0), 300, scores)) == best


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    scores = logits()
    probabilities, order = torch.softmax(scores[0], -1).sort(descending=True)
    size = int((probabilities.cumsum(0) < 0.7).sum()) + 1
    assert set(draws(slot(top_p=0.7), 800, scores)) == set(order[:size].tolist())


def test_top_p_beyond_the_window_sorts_everything() -> None:
    flat = torch.zeros(1, 4000)
    flat[0, :1000] = 1.0
    taken = draws(slot(top_p=0.3), 200, flat)
    assert max(taken) < 1000
    assert len(set(taken)) > 150


def test_min_p_drops_what_is_unlikely_beside_the_best() -> None:
    scores = logits()
    probabilities = torch.softmax(scores[0], -1)
    allowed = set((probabilities >= 0.2 * probabilities.max()).nonzero().flatten().tolist())
    assert set(draws(slot(min_p=0.2), 500, scores)) == allowed


def test_penalties() -> None:
    scores = torch.tensor([1.0, -1.0, 2.0, 0.5, 0.0])
    known = torch.tensor([0, 1, 2, 2])  # prompt 0 1, generated 2 2
    edited = scores.clone()
    edit_logits(edited, slot(presence_penalty=0.5, frequency_penalty=0.25), known)
    assert edited.tolist() == [1.0, -1.0, 1.0, 0.5, 0.0]
    edited = scores.clone()
    edit_logits(edited, slot(repetition_penalty=2.0), known)
    assert edited.tolist() == [0.5, -2.0, 1.0, 0.5, 0.0]


def test_logit_bias_can_force_and_forbid() -> None:
    scores = logits()
    best = int(scores.argmax())
    assert set(draws(slot(temperature=0.0, logit_bias=((7, 100.0),)), 3, scores)) == {7}
    assert best not in draws(slot(logit_bias=((best, -100.0),)), 200, scores)


def test_minimum_length_masks_the_stop_ids() -> None:
    scores = logits()
    best = int(scores.argmax())
    params = slot(num_prompt=1, stop_ids=(best,), temperature=0.0, min_new=2)
    tokens = draws(params, 4, scores)
    assert tokens[0] != best
    assert tokens[1] != best
    assert tokens[2:] == [best, best]


def test_noise_is_exponential_and_differs_by_key_and_token() -> None:
    keys = [noise_key(seed, position) for seed in (5, -(2**63)) for position in (0, 1)]
    assert len(set(keys)) == 4
    noise = exponentials(torch.tensor(keys), 20_000)
    assert bool((noise > 0).all())
    assert bool(((noise.mean(-1) - 1).abs() < 0.03).all())
    assert bool(((noise < math.log(2)).float().mean(-1) - 0.5).abs().max() < 0.02)
    assert noise.unique().numel() > 0.99 * noise.numel()
    correlation = torch.corrcoef(noise)
    assert float((correlation - torch.eye(4)).abs().max()) < 0.03


def splitmix64(key: int, index: int) -> float:
    """The published algorithm, in integers without sign."""
    mask = (1 << 64) - 1
    z = (key + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return -math.log1p(-((z ^ (z >> 31)) & ((1 << 63) - 1)) / 2**63)


def test_noise_is_the_published_generator() -> None:
    key = noise_key(42, 7)
    got = exponentials(torch.tensor([key]), 50)[0].tolist()
    want = [splitmix64(key, index) for index in range(50)]
    assert got == pytest.approx(want, rel=1e-5)


def test_rounding_errors_of_the_logits_change_no_seeded_text() -> None:
    """A flat distribution over a large vocabulary, where any change of a cumulative sum shows.

    Errors of real logits come from the same hidden state, so they do not cancel: here, a slope.
    """
    flat = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(1))
    rounded = flat + torch.linspace(-1e-5, 1e-5, 40_000)
    params = slot(seed=11, temperature=1.2)
    assert draws(params, 200, flat) == draws(params, 200, rounded)


def test_logprobs_are_of_the_raw_logits() -> None:
    scores = logits(rows=2)
    tokens = torch.tensor([3, 4])
    got = score(scores, tokens, 2).read()
    want = torch.log_softmax(scores, -1)
    assert torch.allclose(torch.tensor(got.chosen), want[[0, 1], tokens], atol=1e-6)
    assert [[token for token, _ in row] for row in got.top] == scores.topk(2).indices.tolist()
    assert score(scores, tokens, 0).read().top == [[], []]


def test_masks_come_before_bias_and_top_k() -> None:
    """Nothing brings a forbidden id back, and top-k counts what is allowed."""
    scores = torch.arange(40, dtype=torch.float32).repeat(3, 1)
    bits = np.zeros((2, 2), dtype=np.uint32)
    bits[0, 0] = 1 << 3 | 1 << 31
    bits[1, 1] = 1 << 1
    mask_logits(scores, [0, 2], bits.view(np.int32))
    assert scores[0].isfinite().nonzero().flatten().tolist() == [3, 31]
    assert scores[1].isfinite().all()
    assert scores[2].isfinite().nonzero().flatten().tolist() == [33]
    params = Sampling(temperature=1.0, top_k=5, logit_bias=((20, 100.0), (3, 1.0)))
    slots = [SlotSampling.of(Admit(0, [], 1, [], params, ()), CPU)] * 3
    known = [torch.zeros(position, dtype=torch.int64) for position in (4, 5, 6)]
    tokens = sample(scores, slots, known).tolist()
    assert tokens[0] in (3, 31)
    assert tokens[1] == 20
    assert tokens[2] == 33
