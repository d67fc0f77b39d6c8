"""The rule of idle models, as a table and as a property: whoever waits is seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.idle import Use, next_step
from router.metrics import ENGINE_STATES
from router.streams import ReplicaState


@pytest.mark.parametrize(
    ("states", "waiting", "idle_since_s", "expected"),
    [
        (("serving",), 0, 0.0, "sleep"),
        (("serving", "serving"), 0, 0.0, "sleep"),
        (("serving", "parked"), 0, 0.0, "sleep"),
        (("serving",), 0, 0.1, "stay"),  # not long enough
        (("serving",), 0, None, "stay"),  # in use
        (("serving", "starting"), 0, 0.0, "stay"),  # let it load
        (("serving", "dead"), 0, 0.0, "stay"),
        (("parked",), 0, 0.0, "stay"),
        (("starting",), 1, None, "stay"),  # it is on its way
        (("asleep",), 0, 0.0, "stay"),
        (("asleep",), 1, None, "wake"),
        (("asleep", "serving"), 1, None, "wake"),
    ],
)
def test_the_rule(
    states: tuple[ReplicaState, ...], waiting: int, idle_since_s: float | None, expected: str
) -> None:
    assert next_step(Use(states, waiting, idle_since_s), 1.0, 1.0) == expected


def test_without_a_limit_nothing_sleeps() -> None:
    assert next_step(Use(("serving",), 0, 0.0), 0.0, 1e9) == "stay"


states = st.lists(st.sampled_from(ENGINE_STATES), min_size=1, max_size=4).map(tuple)


@given(states=states, waiting=st.integers(0, 3), limit_s=st.floats(0, 5), now=st.floats(0, 10))
def test_a13_nobody_waits_for_a_sleeper_and_nobody_in_use_is_put_to_sleep(
    states: tuple[ReplicaState, ...], waiting: int, limit_s: float, now: float
) -> None:
    step = next_step(Use(states, waiting, None if waiting else 0.0), limit_s, now)
    assert (step == "wake") == (waiting > 0 and "asleep" in states)
    assert step != "sleep" or not waiting
