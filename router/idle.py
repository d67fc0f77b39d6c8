"""When a model gives up its engines, and when it gets them back (pure).

Owns the rule and nothing else. It looks at those who wait, not at calls to wake up: whoever waits
while no engine is there is seen at the next look, so nobody can be forgotten between two events.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from router.streams import ReplicaState

Step = Literal["wake", "sleep", "stay"]


class Use(NamedTuple):
    """One model at one moment. Times are of the monotonic clock.

    `idle_since_s` is when its last request ended, or its engines became ready if that was later;
    None while a request runs or waits.
    """

    states: tuple[ReplicaState, ...]
    waiting: int
    idle_since_s: float | None


def next_step(use: Use, idle_unload_s: float, now: float) -> Step:
    """What to do with a model that nobody unloaded by hand; `idle_unload_s` 0: it never sleeps.

    A model whose engines load, drain or are being restarted is left alone until that is over.
    """
    if "asleep" in use.states and use.waiting:
        return "wake"
    settled = all(state in ("serving", "parked", "asleep") for state in use.states)
    if (
        idle_unload_s
        and settled
        and "serving" in use.states
        and use.idle_since_s is not None
        and now - use.idle_since_s >= idle_unload_s
    ):
        return "sleep"
    return "stay"
