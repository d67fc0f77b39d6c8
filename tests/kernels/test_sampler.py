"""The sampler kernel against sampling in plain torch."""

from __future__ import annotations

import pytest
import torch

from engine.device.sampling import SlotSampling, sample
from engine.plan import Admit
from engine.protocol import Sampling

pytest.importorskip("triton")

from engine.kernels.sampler import SampledRows, SamplerParams, sample_rows

pytestmark = pytest.mark.slow  # interpreted, where there is no card

VOCAB = 5000


def params_of(samplings: list[Sampling], device: torch.device) -> SamplerParams:
    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return SamplerParams(
        seed=column([s.seed for s in samplings], torch.int64),
        temperature=column([s.temperature for s in samplings], torch.float32),
        top_p=column([s.top_p for s in samplings], torch.float32),
        min_p=column([s.min_p for s in samplings], torch.float32),
        top_k=column([s.top_k for s in samplings], torch.int32),
    )


def logits_of(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, VOCAB, generator=generator) * 3


def kernel_tokens(
    logits: torch.Tensor, samplings: list[Sampling], device: torch.device, text_ids: int = 0
) -> list[int]:
    count = len(samplings)
    tokens = torch.full((count, 64), -7, dtype=torch.int32, device=device)
    out = torch.full((count,), -9, dtype=torch.int32, device=device)
    slots = torch.arange(count, dtype=torch.int32, device=device)
    positions = (slots * 7) % 50 + 3
    logits = logits.to(device)
    rows = SampledRows(slots, positions)
    sample_rows(logits, params_of(samplings, device), rows, tokens, out, text_ids)
    written = tokens[slots.long(), positions.long()]
    assert torch.equal(written, out.clamp(min=0))
    assert int((tokens != -7).sum()) == count
    return out.tolist()


def torch_tokens(logits: torch.Tensor, samplings: list[Sampling]) -> list[int]:
    slots = [
        SlotSampling.of(Admit(i, [], 1, [], s, ()), torch.device("cpu"))
        for i, s in enumerate(samplings)
    ]
    known = [torch.zeros((i * 7) % 50 + 3, dtype=torch.int64) for i in range(len(slots))]
    return sample(logits.clone(), slots, known).tolist()


@pytest.mark.parametrize(
    "kind",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=1),
        Sampling(temperature=0.7, top_k=20),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.05),
        Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01),
        Sampling(temperature=1.0, top_p=0.0),
        Sampling(temperature=2.0, top_k=VOCAB + 1),
    ],
    ids=["greedy", "all", "top-1", "top-k", "top-p", "min-p", "together", "top-p 0", "k too large"],
)
def test_equals_torch(device: torch.device, kind: Sampling) -> None:
    """The same noise and thresholds: the same token, but where rounding decides a near tie."""
    import msgspec

    samplings = [msgspec.structs.replace(kind, seed=seed * 977 - 5) for seed in range(12)]
    logits = logits_of(len(samplings))
    got, wanted = kernel_tokens(logits, samplings, device), torch_tokens(logits, samplings)
    different = [i for i, pair in enumerate(zip(got, wanted, strict=True)) if pair[0] != pair[1]]
    assert len(different) <= (0 if kind.temperature == 0.0 else 1)


def test_mixed_rows_ties_and_ids_without_text(device: torch.device) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[0, [40, 4100]] = 5.0  # a tie: the first one
    logits[1, 4900] = 9.0  # has no text
    logits[1, 17] = 1.0
    logits[2, 3] = 50.0
    logits[3] = -1e30
    logits[3, 4097] = -1e29
    samplings = [Sampling(temperature=0.0)] * 2 + [Sampling(temperature=1.0, seed=3)] * 2
    assert kernel_tokens(logits, samplings, device, text_ids=4800) == [40, 17, 3, 4097]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 4500])
def test_broken_rows(device: torch.device, value: float, at: int) -> None:
    """Not a number or infinity anywhere; of minus infinity only a whole row is broken."""
    logits = logits_of(3)
    logits[1, at] = value
    if value == float("-inf"):
        logits[1] = value
    samplings = [Sampling(temperature=0.0), Sampling(temperature=1.0), Sampling(temperature=0.0)]
    got = kernel_tokens(logits, samplings, device)
    assert got[1] == -1
    assert got[0] == int(logits[0].argmax())
    assert got[2] == int(logits[2].argmax())


def test_padding_rows_are_left_alone(device: torch.device) -> None:
    tokens = torch.zeros((2, 8), dtype=torch.int32, device=device)
    out = torch.full((2,), -9, dtype=torch.int32, device=device)
    slots = torch.tensor([-1, 1], dtype=torch.int32, device=device)
    positions = torch.tensor([4, 5], dtype=torch.int32, device=device)
    params = params_of([Sampling(temperature=0.0)] * 2, device)
    logits = logits_of(2)
    sample_rows(logits.to(device), params, SampledRows(slots, positions), tokens, out, 0)
    best = int(logits[1].argmax())
    assert out.tolist() == [-9, best]
    assert tokens.nonzero().tolist() == [[1, 5]]
    assert int(tokens[1, 5]) == best
