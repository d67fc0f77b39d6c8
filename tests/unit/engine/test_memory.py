"""What counts as a lack of memory, by allocations that truly fail."""

from __future__ import annotations

import pytest
import torch

from engine.device.memory import Guarded, lacks_memory
from engine.plan import OutOfMemory, Pending, Sampled, StepPlan

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
