"""engine.policy: each judgement by its table."""

from __future__ import annotations

import pytest

from engine import policy
from engine.policy import StepSizes
from engine.protocol import Pooling
from engine.request import Sequence
from tests.fakes import make_submit


def sequence(
    number: int,
    *,
    priority: int = 0,
    tokens: list[int] | None = None,
    pooling: Pooling | None = None,
) -> Sequence:
    tokens = tokens or [1, 2, 3]
    submit = make_submit(number, tokens, priority=priority, pooling=pooling)
    return Sequence(submit, list(tokens), len(tokens) + 4, number, b"root")


def test_order_is_priority_then_arrival() -> None:
    late, early, urgent = sequence(2), sequence(1), sequence(3, priority=-1)
    assert sorted([late, early, urgent], key=policy.admission_order) == [urgent, early, late]


def test_texts_to_embed_come_last_whatever_their_priority() -> None:
    text, lazy = sequence(1, priority=-5, pooling=Pooling()), sequence(2, priority=5)
    assert sorted([text, lazy], key=policy.admission_order) == [lazy, text]
    assert policy.pick_victim([text, lazy]) is text


@pytest.mark.parametrize(("max_batch", "slots"), [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (64, 48)])
def test_texts_to_embed_leave_a_quarter_of_the_slots(max_batch: int, slots: int) -> None:
    assert policy.pooled_slots(max_batch) == slots


@pytest.mark.parametrize(
    ("left", "used", "smooth", "tokens"),
    [(500, 12, 60, 48), (20, 12, 60, 20), (500, 12, 9, 8), (500, 100, 60, 8), (3, 100, 60, 3)],
)
def test_texts_to_embed_keep_a_step_smooth(left: int, used: int, smooth: int, tokens: int) -> None:
    assert policy.pooled_budget(left, used, smooth) == tokens


def test_the_victim_is_the_last_in_that_order() -> None:
    late, early, lazy = sequence(2), sequence(1), sequence(0, priority=1)
    assert policy.pick_victim([early, lazy, late]) is lazy
    assert policy.pick_victim([late, early]) is late
    assert policy.pick_victim([early]) is early
    with pytest.raises(ValueError, match="empty"):
        policy.pick_victim([])


@pytest.mark.parametrize(("left", "budget", "chunk"), [(5, 8, 5), (8, 8, 8), (9, 8, 8), (9, 1, 1)])
def test_a_chunk_fills_what_is_left(left: int, budget: int, chunk: int) -> None:
    assert policy.split_chunk(left, budget) == chunk


@pytest.mark.parametrize(("blocks", "reserve"), [(1, 1), (100, 1), (101, 2), (5000, 50)])
def test_the_reserve_is_small_and_never_zero(blocks: int, reserve: int) -> None:
    assert policy.admission_reserve(blocks) == reserve


@pytest.mark.parametrize(
    ("count", "size", "worth"), [(0, 4, False), (1, 4, True), (3, 32, False), (4, 32, True)]
)
def test_tiny_copies_are_not_worth_a_launch(count: int, size: int, worth: bool) -> None:
    assert policy.worth_copying(count, size) is worth


@pytest.mark.parametrize(
    ("other_tokens", "computed", "number", "soon"),
    [
        ([1, 2, 3, 4, 5], 0, 0, True),
        ([1, 2, 3, 4], 3, 0, True),
        ([1, 2, 3, 4, 5], 4, 0, False),  # it is there already
        ([1, 2, 3, 9, 5], 0, 0, False),  # it is another one
        ([1, 2, 3], 0, 0, False),  # it will not be full
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, 1, True),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0, 1, False),  # it does not share the block before
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 8, 2, False),  # the last block wanted is not full
    ],
)
def test_a_block_that_another_one_computes_comes_soon(
    other_tokens: list[int], computed: int, number: int, soon: bool
) -> None:
    wanting = sequence(1, tokens=[1, 2, 3, 4, 5, 6, 7, 8, 9])
    wanting.chain = [b"root", b"one", b"two"][: number + 1]
    other = sequence(0, tokens=other_tokens)
    other.chain = [b"root", b"one", b"two"][: computed // 4 + 1]
    other.computed = computed
    assert policy.comes_soon(wanting, number, 4, [other]) is soon


def test_a_block_of_another_tenant_never_comes() -> None:
    wanting, other = sequence(1, tokens=[1] * 9), sequence(0, tokens=[1] * 9)
    other.chain = [b"another root"]
    assert not policy.comes_soon(wanting, 0, 4, [other])
    other.chain = [b"root"]
    assert policy.comes_soon(wanting, 0, 4, [other])


def test_steps_beside_decode_rows_grow_with_what_waits() -> None:
    sizes = StepSizes.of(2048, 640)
    assert sizes.limit(0, 10) == sizes.limit(0, 10**6) == 2048
    assert sizes.limit(8, 512) == 256
    assert sizes.limit(32, 1000) == 384
    assert sizes.limit(64, 3000) == 640
    assert sizes.limit(250, 512) == 512  # what little is left beside so many rows would take long
    assert sizes.limit(64, 60_000) == 1024
    limits = [sizes.limit(16, waiting) for waiting in range(0, 60_000, 100)]
    assert limits == sorted(limits)


def test_without_a_mixed_size_all_steps_are_alike() -> None:
    sizes = StepSizes.of(512, 0)
    assert {sizes.limit(rows, tokens) for rows in (0, 5) for tokens in (1, 10**6)} == {512}
    assert StepSizes.of(100, 512) == (100, (100,), 100)  # never more than the largest
    assert StepSizes.of(2048, 300).beside == (256, 300)
