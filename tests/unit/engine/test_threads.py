"""The thread governor against made-up machines."""

from __future__ import annotations

from itertools import pairwise

from engine.device.threads import ThreadGovernor


def run(governor: ThreadGovernor, from_s: float, to_s: float, cores: float) -> list[int]:
    """Steps of 20 ms while the machine gives us `cores`; the threads of each step."""
    used: list[int] = []
    now_s = from_s
    while now_s < to_s:
        used.append(governor.threads)
        now_s += 0.02
        governor.observe(now_s, 0.02, 0.02 * min(governor.threads, cores))
    return used


def test_a_quiet_machine_keeps_all_threads() -> None:
    assert set(run(ThreadGovernor(4), 0, 20, 3.7)) == {4}


def test_a_contended_one_gets_fewer_and_asks_again_ever_later() -> None:
    used = run(ThreadGovernor(2), 0, 120, 1.5)
    assert set(used) == {1, 2}
    probes = [i for i in range(1, len(used)) if used[i] == 2 and used[i - 1] == 1]
    gaps = [(b - a) * 0.02 for a, b in pairwise(probes)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 25
    assert used[1000:].count(2) < 0.05 * len(used[1000:])


def test_full_speed_returns_when_the_machine_does() -> None:
    governor = ThreadGovernor(8)
    assert run(governor, 0, 1, 5.0)[-1] == 5
    assert run(governor, 1, 40, 8.0)[-1] == 8
    assert set(run(governor, 40, 50, 8.0)) == {8}


def test_one_thread_stays_one() -> None:
    assert set(run(ThreadGovernor(1), 0, 5, 0.3)) == {1}
