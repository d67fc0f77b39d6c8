"""engine.stats: each counter reaches its own field of the wire."""

from __future__ import annotations

from engine.protocol import Stats
from engine.stats import Counters


def test_every_number_reaches_its_field() -> None:
    counters = Counters()
    counters.started(10, 12, 8)
    counters.started(1, 0, 0)
    counters.steps = 1
    counters.generated_tokens = 2
    counters.preemptions = 3
    counters.bad_frames = 4
    counters.blocks_leaked = 5
    assert counters.snapshot((6, 7), (8, 9, 10)) == Stats(
        waiting=6,
        running=7,
        blocks_total=8,
        blocks_held=9,
        blocks_cached=10,
        steps=1,
        prompt_tokens=11,
        generated_tokens=2,
        prefix_query_tokens=12,
        prefix_hit_tokens=8,
        preemptions=3,
        bad_frames=4,
        blocks_leaked=5,
    )


def test_a_fresh_engine_has_counted_nothing() -> None:
    assert Counters().snapshot((0, 0), (0, 0, 0)) == Stats()
