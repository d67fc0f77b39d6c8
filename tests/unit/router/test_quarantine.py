"""Prompts that killed engines: who is refused, for how long, and how many are remembered."""

from __future__ import annotations

from engine.protocol import pack_tokens
from router.quarantine import QUARANTINE_S, Quarantine


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_same_prompt_of_the_same_model_and_key_for_ten_minutes() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    assert not quarantine
    quarantine.add("m", b"key", [1, 2, 3])
    assert quarantine.holds("m", b"key", [1, 2, 3])
    assert quarantine.holds("m", b"key", pack_tokens([1, 2, 3]))
    assert not quarantine.holds("m", b"key", [1, 2])
    assert not quarantine.holds("m", b"key", [1, 2, 4])
    assert not quarantine.holds("m", b"other", [1, 2, 3])
    assert not quarantine.holds("mk", b"ey", [1, 2, 3])
    clock.now += QUARANTINE_S - 1
    assert quarantine.holds("m", b"key", [1, 2, 3])
    clock.now += 1
    assert not quarantine.holds("m", b"key", [1, 2, 3])
    assert len(quarantine) == 0


def test_a_second_conviction_begins_anew() -> None:
    clock = Clock()
    quarantine = Quarantine(clock, ttl_s=10)
    quarantine.add("m", b"", [1])
    quarantine.add("m", b"", [2])
    clock.now += 6
    quarantine.add("m", b"", [1])
    clock.now += 6
    assert quarantine.holds("m", b"", [1])
    assert not quarantine.holds("m", b"", [2])


def test_the_oldest_make_room() -> None:
    quarantine = Quarantine(Clock(), capacity=3)
    for token in range(5):
        quarantine.add("m", b"", [token])
    assert [quarantine.holds("m", b"", [token]) for token in range(5)] == [False] * 2 + [True] * 3
    assert len(quarantine) == 3
