"""What counts as a lack of memory, by allocations that truly fail."""

from __future__ import annotations

import pytest
import torch

from engine.config import NotEnoughMemory
from engine.device.memory import MOST_SMALL_FAILURES, SMALL_TOKENS, Guarded, lacks_memory
from engine.plan import OutOfMemory, Pending, Row, Sampled, StepPlan

PLAN = StepPlan(1, [], [], [], [])


class Hungry:
    """A device whose steps do what they are told to."""

    def __init__(self, at_launch: object, at_result: object) -> None:
        self._at_launch = at_launch
        self._at_result = at_result

    def launch(self, plan: StepPlan) -> Pending:
        _do(self._at_launch)
        return self

    def result(self) -> Sampled:
        _do(self._at_result)
        return Sampled([7], {}, {}, {})

    def idle(self) -> bool:
        return True


def _do(what: object) -> None:
    if isinstance(what, Exception):
        raise what
    if isinstance(what, int):
        torch.empty(what, dtype=torch.float32)


@pytest.mark.parametrize(
    "failure", [1 << 58, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")]
)
def test_r25_a_step_without_memory_is_told_as_such(failure: object) -> None:
    with pytest.raises(OutOfMemory):
        Guarded(Hungry(failure, 1)).launch(PLAN)
    pending = Guarded(Hungry(1, failure)).launch(PLAN)
    with pytest.raises(OutOfMemory):
        pending.result()


def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Guarded(Hungry(RuntimeError("CUDA error: an illegal memory access"), 1)).launch(PLAN)
    assert not lacks_memory(ValueError("not enough values to unpack"))
    guarded = Guarded(Hungry(1, 1))
    assert guarded.launch(PLAN).result().tokens == [7]
    assert guarded.idle()


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        ("could not create a primitive", True),  # the code of a kernel found no place
        ("could not execute a primitive", True),
        ("could not create a primitive descriptor for a matmul primitive", False),
    ],
)
def test_r25_what_onednn_says_without_memory(words: str, *, lacks: bool) -> None:
    assert lacks_memory(RuntimeError(words)) is lacks


class Phases:
    """A device that has memory at times."""

    def __init__(self, has: list[bool]) -> None:
        self._has = has

    def launch(self, plan: StepPlan) -> Pending:
        return Hungry(1, 1 if self._has.pop(0) else MemoryError()).launch(plan)

    def idle(self) -> bool:
        return True


def test_r25_an_engine_that_can_do_nothing_any_more_ends() -> None:
    """Three small steps in a row; a step that succeeds, or one that is large, proves nothing."""
    small, large = plan_of(SMALL_TOKENS), plan_of(SMALL_TOKENS + 1)
    plans = [small, small, small, small, large, small, large, small]
    has = [False, False, True, False, False, False, False, False]
    guarded = Guarded(Phases(has))
    outcomes = [outcome(guarded, plan) for plan in plans]
    assert outcomes == ["lacks", "lacks", "has", "lacks", "lacks", "lacks", "lacks", "ends"]
    assert MOST_SMALL_FAILURES == 3


def plan_of(num_tokens: int) -> StepPlan:
    return PLAN._replace(rows=[Row(0, 1, 0, num_tokens - 1, False), Row(1, 2, 5, 1, True)])


def outcome(guarded: Guarded, plan: StepPlan) -> str:
    try:
        guarded.launch(plan).result()
    except OutOfMemory:
        return "lacks"
    except NotEnoughMemory:
        return "ends"
    return "has"
