"""engine.device.pooling, and the embeddings of chat models against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.device.build import Device
from engine.device.pooling import SlotPooling
from engine.plan import Admit, Row
from engine.protocol import Pooling, Sampling, unpack_floats
from tests.embedding import embed, embedding_device, largest_difference
from tests.generation import Driver

TOLERANCE = 1e-4
HIDDEN = torch.arange(24, dtype=torch.float32).view(6, 4)


def add(slots: SlotPooling, *step: Any) -> tuple[dict[int, bytes], dict[int, str]]:
    """What one step completes, read at once."""
    pooled = slots.add(*step)
    return ({}, {}) if pooled is None else pooled.read()


def admit(slot: int, length: int, pooling: Pooling | None) -> Admit:
    return Admit(slot, [0] * length, length, [], Sampling(), (), pooling)


def row(slot: int, start: int, count: int) -> Row:
    return Row(slot, 100 + slot, start, count, samples=False)


def double(states: Tensor) -> Tensor:
    return states * 2


# -- the parts


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (Pooling("mean", 0, False), [20.0, 22.0, 24.0, 26.0]),
        (Pooling("cls", 0, False), [0.0, 2.0, 4.0, 6.0]),
        (Pooling("last", 0, False), [40.0, 42.0, 44.0, 46.0]),
        (Pooling("mean", 2, False), [20.0, 22.0]),
        (Pooling("last", 3, True), (np.array([40, 42, 44]) / 5300**0.5).tolist()),
    ],
)
@pytest.mark.parametrize("chunks", [(6,), (1, 5), (2, 3, 1), (1,) * 6])
def test_a_vector_is_gathered_over_chunks(
    pooling: Pooling, expected: list[float], chunks: tuple[int, ...]
) -> None:
    slots = SlotPooling()
    slots.admit([admit(3, 6, pooling)])
    start = 0
    for count in chunks:
        part = HIDDEN[start : start + count]
        done, failed = add(slots, [row(3, start, count)], [count - 1], part, double)
        start += count
        assert (list(done), failed) == ([0] if start == 6 else [], {})
    assert unpack_floats(done[0]) == pytest.approx(expected, rel=1e-6)
    assert add(slots, [row(3, 0, 6)], [5], HIDDEN, double) == ({}, {}), "it is told once"


def test_rows_are_found_by_their_last_token_and_others_are_left_alone() -> None:
    slots = SlotPooling()
    raw = Pooling(normalize=False)
    slots.admit([admit(0, 2, raw), admit(1, 9, None), admit(2, 1, raw)])
    rows = [row(0, 0, 2), row(1, 4, 3), row(2, 0, 1)]
    done, failed = add(slots, rows, [2, 5, 0], HIDDEN, lambda states: states)
    assert (set(done), failed) == ({0, 2}, {})
    assert unpack_floats(done[0]) == [6.0, 7.0, 8.0, 9.0]
    assert unpack_floats(done[2]) == [0.0, 1.0, 2.0, 3.0]


def test_an_admission_begins_anew_and_ends_what_the_slot_had() -> None:
    slots = SlotPooling()
    slots.admit([admit(0, 6, Pooling(normalize=False))])
    assert add(slots, [row(0, 0, 4)], [3], HIDDEN, double) == ({}, {})
    slots.admit([admit(0, 6, Pooling(normalize=False))])
    done, _failed = add(slots, [row(0, 0, 6)], [5], HIDDEN, double)
    assert unpack_floats(done[0]) == [20.0, 22.0, 24.0, 26.0]
    slots.admit([admit(0, 6, Pooling())])
    slots.admit([admit(0, 6, None)])
    assert add(slots, [row(0, 0, 6)], [5], HIDDEN, double) == ({}, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_vector_that_is_not_finite_fails_its_row_alone(value: float, normalize: bool) -> None:
    slots = SlotPooling()
    pooling = Pooling(normalize=normalize)
    slots.admit([admit(0, 3, pooling), admit(1, 3, pooling)])
    hidden = HIDDEN.clone()
    hidden[4, 1] = value
    done, failed = add(slots, [row(0, 0, 3), row(1, 0, 3)], [2, 5], hidden, double)
    assert list(done) == [0]
    assert failed == {1: "the model produced no finite embedding"}


def test_long_vectors_are_scaled_whatever_their_values() -> None:
    slots = SlotPooling()
    slots.admit([admit(0, 1, Pooling()), admit(1, 1, Pooling())])
    hidden = torch.tensor([[3e30, 4e30], [0.0, 0.0]])
    done, _failed = add(slots, [row(0, 0, 1), row(1, 0, 1)], [0, 1], hidden, lambda s: s)
    assert unpack_floats(done[0]) == pytest.approx([0.6, 0.8])
    assert unpack_floats(done[1]) == [0.0, 0.0]


def test_low_precision_states_are_summed_in_float32() -> None:
    slots = SlotPooling()
    slots.admit([admit(0, 4096, Pooling(normalize=False))])
    hidden = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    done, _failed = add(slots, [row(0, 0, 4096)], [4095], hidden, lambda states: states)
    assert unpack_floats(done[0]) == [1.0, 1.0]


# -- chat models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).eval().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def device(folder: Path) -> Device:
    return embedding_device(folder, block_size=4, num_blocks=64, max_batch=8, max_len=128)


TEXTS = [[(31 * n + 17 * i) % 97 for i in range(n)] for n in (5, 1, 40, 6, 5, 23, 128, 30)]


@torch.no_grad()
def reference(folder: Path, pool: Callable[[Tensor], Tensor]) -> list[list[float]]:
    model = LlamaForCausalLM.from_pretrained(folder).eval().model
    found = [pool(model(torch.tensor([text])).last_hidden_state[0]) for text in TEXTS]
    return [(vector / vector.norm()).tolist() for vector in found]


def test_limits_announce_embeddings(device: Device) -> None:
    assert (device.limits.embedding_size, device.limits.generates) == (48, True)


@pytest.mark.parametrize("step_tokens", [512, 7])
def test_chat_models_embed_as_transformers_does(
    folder: Path, device: Device, step_tokens: int
) -> None:
    """`last_hidden_state` is what comes out of the final norm."""
    mean = embed(device, TEXTS, step_tokens=step_tokens)
    assert largest_difference(mean, reference(folder, lambda h: h.mean(0))) < TOLERANCE
    last = embed(device, TEXTS, Pooling("last", 16), step_tokens=step_tokens)
    assert largest_difference(last, reference(folder, lambda h: h[-1, :16])) < TOLERANCE
    cls = embed(device, TEXTS, Pooling("cls"), step_tokens=step_tokens)
    assert largest_difference(cls, reference(folder, lambda h: h[0])) < TOLERANCE


def test_alone_and_in_a_batch_are_the_same(device: Device) -> None:
    together = embed(device, TEXTS)
    alone = [embed(device, [text])[0] for text in TEXTS]
    assert largest_difference(together, alone) < 1e-5
    assert largest_difference(together, embed(device, TEXTS, step_tokens=5)) < 1e-5


def test_a_vector_is_the_same_after_a_preemption(device: Device) -> None:
    """A chat takes the blocks of a text that is half way through."""
    text = TEXTS[6]
    expected = embed(device, [text])[0]
    driver = Driver(device, num_blocks=33, step_tokens=16)
    scheduler = driver.scheduler
    scheduler.add(driver.submit(text, 0, pooling=Pooling()))
    vectors: list[list[float]] = []
    for step in range(200):
        if step == 3:
            assert [sequence.computed for sequence in scheduler.running] == [48]
            scheduler.add(driver.submit(text[:20], 40))
        plan = scheduler.plan()
        if plan is None:
            break
        scheduler.commit(plan, device.runner.launch(plan).result())
        output = scheduler.take_output()
        assert output is not None
        vectors += [unpack_floats(vector.values) for vector in output.embeddings]
    assert (scheduler.busy, scheduler.stats.preemptions) == (False, 1)
    assert largest_difference(vectors, [expected]) < 1e-5


def test_a_prefix_in_the_cache_is_no_shortcut(device: Device) -> None:
    """Its hidden states are not in the cache, and the text leaves nothing there itself."""
    text = TEXTS[5]
    expected = embed(device, [text])[0]
    driver = Driver(device)
    driver.run([driver.submit(text, 4)])
    before = driver.pool.num_cached
    assert before > 0
    (result,) = driver.run([driver.submit(text, 0, pooling=Pooling())])
    assert result.cached == 0
    assert driver.pool.num_cached == before
    assert largest_difference(result.embeddings, [expected]) < 1e-5
