"""Whoever kills engines is found at the second one, and nobody else pays, whatever the schedule.

A small model of the router: sequences get tokens, engines die of their work or by an outside hand,
and what they worked on is placed again by the rule of `router.blame`, one suspect per engine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from router.blame import CONVICTS, CRASH, NO_SUSPICION, OUTSIDE, TRIAL_TOKENS, Suspicion


@dataclass
class Sequence:
    """`kills_at`: an engine dies that computes its token of that number, -1: never. With `anew`
    that is counted from its placing on: it gets one token from its prompt, and kills behind it."""

    kills_at: int = -1
    anew: bool = False
    num_tokens: int = 0
    num_placed: int = 0
    suspicion: Suspicion = NO_SUSPICION
    engine: int | None = None
    killed: int = 0

    @property
    def kills(self) -> bool:
        return self.kills_at == self.num_tokens - self.num_placed * self.anew

    @property
    def is_suspect(self) -> bool:
        return self.suspicion.lasts(self.num_tokens)


@dataclass
class Cluster:
    sequences: list[Sequence]
    engines: int
    chance: random.Random
    convicted: list[Sequence] = field(default_factory=list)

    def place(self) -> None:
        for sequence in self.chance.sample(self.sequences, len(self.sequences)):
            if sequence.engine is not None or sequence in self.convicted:
                continue
            if sequence.suspicion.convicts:
                self.convicted.append(sequence)
                continue
            free = list(range(self.engines))
            if sequence.is_suspect:
                free = [e for e in free if not any(s.is_suspect for s in self.on(e))]
            if free:
                sequence.engine = self.chance.choice(free)
                sequence.num_placed = sequence.num_tokens

    def on(self, engine: int) -> list[Sequence]:
        return [s for s in self.sequences if s.engine == engine]

    def die(self, engine: int, *, outside: bool) -> None:
        for sequence in self.on(engine):
            sequence.suspicion = sequence.suspicion.after_death(
                sequence.num_tokens, outside=outside
            )
            sequence.engine = None

    def step(self, engine: int) -> None:
        """One step: a token for each sequence, in any order, or a death."""
        batch = self.on(engine)
        killers = [s for s in batch if s.kills]
        self.chance.shuffle(batch)
        told = len(batch)
        if killers:  # what the others got in this step may or may not be told
            told = self.chance.randint(0, len(batch))
        for sequence in batch[:told]:
            if sequence not in killers:
                sequence.num_tokens += 1
        if killers:
            killers[0].killed += 1
            self.die(engine, outside=False)


@given(
    innocents=st.integers(0, 12),
    engines=st.integers(1, 3),
    begun=st.integers(0, 5),
    kills_at=st.integers(0, 8),
    anew=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_r8_the_guilty_one_kills_two_engines_and_nobody_else_is_convicted(
    innocents: int, engines: int, begun: int, kills_at: int, anew: bool, seed: int
) -> None:
    guilty = Sequence(min(kills_at, TRIAL_TOKENS - 1) if anew else kills_at, anew)
    chance = random.Random(seed)
    others = [Sequence(num_tokens=chance.randint(0, begun)) for _ in range(innocents)]
    cluster = Cluster([guilty, *others], engines, chance)
    for _ in range(400):
        cluster.place()
        cluster.step(chance.randrange(engines))
        if guilty in cluster.convicted and not any(s.is_suspect for s in others):
            break
    assert cluster.convicted == [guilty]
    assert guilty.killed == 2


@given(
    innocents=st.integers(1, 12),
    engines=st.integers(1, 3),
    pauses=st.lists(st.integers(0, 40), max_size=60),
    seed=st.integers(0, 2**32),
)
def test_r1_random_kills_from_outside_convict_who_went_on_never(
    innocents: int, engines: int, pauses: list[int], seed: int
) -> None:
    """Any schedule: who is convicted has had four kills in a row without two tokens between."""
    chance = random.Random(seed)
    cluster = Cluster([Sequence() for _ in range(innocents)], engines, chance)
    barren = {id(s): (0, 0) for s in cluster.sequences}  # kills in a row, tokens at the last
    for pause in pauses:
        for _ in range(pause):
            cluster.place()
            cluster.step(chance.randrange(engines))
        cluster.place()
        victim = chance.randrange(engines)
        for sequence in cluster.on(victim):
            count, tokens = barren[id(sequence)]
            progress = sequence.num_tokens - tokens
            barren[id(sequence)] = (
                count + 1 if progress < TRIAL_TOKENS else 1,
                sequence.num_tokens,
            )
        cluster.die(victim, outside=True)
    for sequence in cluster.convicted:
        assert barren[id(sequence)][0] >= CONVICTS // OUTSIDE
    quick = [s for s in cluster.sequences if s.suspicion.weight > CRASH]
    assert all(barren[id(s)][0] > 2 for s in quick)


@given(st.lists(st.tuples(st.integers(TRIAL_TOKENS, 9), st.booleans()), max_size=200))
def test_deaths_with_two_tokens_between_never_convict(lives: list[tuple[int, bool]]) -> None:
    suspicion, tokens = NO_SUSPICION, 0
    for progress, outside in lives:
        tokens += progress
        assert not suspicion.lasts(tokens)
        suspicion = suspicion.after_death(tokens, outside=outside)
        assert not suspicion.convicts
        assert suspicion.lasts(tokens) is not outside  # no trial after one hand from outside
        assert suspicion.lasts(tokens + TRIAL_TOKENS - 1) is not outside


def test_what_kills_in_its_decode_step_is_found_as_soon() -> None:
    """It gets one token from its prompt in each life, and that is no progress."""
    first = NO_SUSPICION.after_death(1)
    assert not first.convicts
    assert first.after_death(2).convicts
    assert not first.after_death(3).convicts


def test_kills_from_outside_count_half() -> None:
    suspicion = NO_SUSPICION
    for _ in range(3):
        suspicion = suspicion.after_death(0, outside=True)
        assert not suspicion.convicts
    assert suspicion.after_death(0, outside=True).convicts
    assert NO_SUSPICION.after_death(0).after_death(0).convicts
