"""The simulation of closed loops: every request is answered, and less work takes less time."""

from __future__ import annotations

from bench.step_sizes import MIXED, Loop, at


def test_curves_are_read_between_and_beyond_their_points() -> None:
    assert at(MIXED, 256) == 6.7
    assert 6.7 < at(MIXED, 300) < 8.8
    assert at(MIXED, 1) == MIXED[0][1]
    assert at(MIXED, 10_000) == MIXED[-1][1]


def test_products_alone_are_faster_than_whole_steps() -> None:
    whole = Loop(8, 16, 640, products=False).run()
    bare = Loop(8, 16, 640, products=True).run()
    assert 0 < whole.tok_s < bare.tok_s
    assert whole.itl_p99_ms < 15
    assert Loop(8, 16, 640, products=False).run() == whole
