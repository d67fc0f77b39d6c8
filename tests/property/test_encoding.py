"""engine.encoding: whole texts, batched by their tokens; any arrival, any abort, any overlap."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.encoding import EncoderScheduler
from engine.loop import EngineLoop
from engine.plan import Row, Sampled, StepPlan
from engine.protocol import (
    NO_MEMORY,
    Abort,
    Finish,
    Limits,
    Pooling,
    StepOutput,
    Submit,
    unpack_tokens,
)
from tests.fakes import EMBEDDING_SIZE, Ready, embedding, make_submit

MAX_LEN, VOCAB_SIZE = 20, 3
POOLING = Pooling()


def encoder_limits(max_batch: int = 8) -> Limits:
    return Limits(
        MAX_LEN, VOCAB_SIZE, 32, 0, max_batch, embedding_size=EMBEDDING_SIZE, generates=False
    )


@dataclass
class FakeEncoder:
    """A runner that keeps nothing from one step to the next."""

    failing: set[int] = field(default_factory=set)
    plans: list[StepPlan] = field(default_factory=list)

    def idle(self) -> bool:
        return False

    def launch(self, plan: StepPlan) -> Ready:
        assert plan.step == len(self.plans) + 1
        self.plans.append(plan)
        assert (plan.grows, plan.copies) == ([], [])
        assert [admit.slot for admit in plan.admits] == list(range(len(plan.admits)))
        sampled = Sampled([], {}, {}, {}, embeddings := {})
        for index, (row, admit) in enumerate(zip(plan.rows, plan.admits, strict=True)):
            assert row == Row(admit.slot, row.id, 0, len(admit.tokens), samples=False)
            assert admit.pooling is not None
            if row.id in self.failing:
                sampled.failed[index] = "failed"
            else:
                embeddings[index] = embedding(admit.tokens, admit.pooling)
        return Ready(sampled)


class EncoderDriver:
    """Loop, scheduler, fake device, and all that came out."""

    def __init__(self, *, step_tokens: int = 16, max_batch: int = 8, overlap: int = 0) -> None:
        self.step_tokens = step_tokens
        self.max_batch = max_batch
        self.scheduler = EncoderScheduler(encoder_limits(max_batch), step_tokens=step_tokens)
        self.runner = FakeEncoder()
        self.loop = EngineLoop(self.scheduler, self.runner, epoch=0, overlap=overlap)
        self.ends: dict[int, Finish] = {}
        self.vectors: dict[int, bytes] = {}
        self.started: list[int] = []

    def step(self, *inbox: Submit | Abort) -> None:
        """One step, its plan and its output checked."""
        planned = len(self.runner.plans)
        for message in self.loop.step(inbox):
            assert isinstance(message, StepOutput)
            assert (message.ids, message.tokens) == ((), b"")
            self.started += [started.id for started in message.started]
            for vector in message.embeddings:
                assert vector.id not in self.vectors
                self.vectors[vector.id] = vector.values
            for finish in message.finished:
                assert finish.id not in self.ends, "ended twice"
                self.ends[finish.id] = finish
        for plan in self.runner.plans[planned:]:
            counts = [row.count for row in plan.rows]
            assert len(counts) <= self.max_batch
            assert len(counts) == 1 or sum(counts) <= self.step_tokens

    def run(self) -> None:
        """Until nothing is left to do."""
        for _ in range(1000):
            if not self.loop.busy:
                return
            self.step()
        raise AssertionError("the work never ended")

    def sizes(self) -> list[list[int]]:
        """Ids of every step."""
        return [[row.id for row in plan.rows] for plan in self.runner.plans]


class EncodingMachine(RuleBasedStateMachine):
    """Submits, aborts, failing texts and steps, with or without running ahead."""

    @initialize(
        step_tokens=st.integers(1, 30), max_batch=st.integers(1, 6), overlap=st.integers(0, 1)
    )
    def start(self, step_tokens: int, max_batch: int, overlap: int) -> None:
        self.driver = EncoderDriver(step_tokens=step_tokens, max_batch=max_batch, overlap=overlap)
        self.submits: dict[int, Submit] = {}
        self.bad: set[int] = set()
        self.aborted: set[int] = set()
        self.inbox: deque[Submit | Abort] = deque()

    @rule(
        tokens=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_LEN),
        priority=st.sampled_from([0, 0, 1, -1]),
        dimensions=st.sampled_from([0, 2]),
        count=st.integers(1, 5),
    )
    def submit(self, tokens: list[int], priority: int, dimensions: int, count: int) -> None:
        for _ in range(count):
            number = len(self.submits)
            pooling = Pooling(dimensions=dimensions)
            self.submits[number] = make_submit(
                number, tokens, 0, priority=priority, pooling=pooling
            )
            self.inbox.append(self.submits[number])

    @rule(
        tokens=st.sampled_from([[], [7], [1] * (MAX_LEN + 1), [1]]), dimensions=st.sampled_from([9])
    )
    def submit_bad(self, tokens: list[int], dimensions: int) -> None:
        number = len(self.submits)
        pooling = Pooling(dimensions=dimensions)
        self.submits[number] = make_submit(number, tokens, 0, pooling=pooling)
        self.bad.add(number)
        self.inbox.append(self.submits[number])

    @precondition(lambda self: self.submits)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.submits)))
        self.aborted.add(number)
        self.inbox.append(Abort(0, (number, number)))

    @precondition(lambda self: self.submits)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.submits)))
        self.driver.runner.failing.add(number)

    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        for _ in range(count):
            inbox = list(self.inbox)
            self.inbox.clear()
            self.driver.step(*inbox)

    @invariant()
    def the_gauges_are_true(self) -> None:
        if self.inbox:
            return
        stats = self.driver.scheduler.stats
        open_ends = set(self.submits) - set(self.driver.ends)
        assert stats.waiting + stats.running == len(open_ends)
        assert stats.running == len(open_ends & set(self.driver.started))

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.step(1)
        self.driver.run()
        failing = self.driver.runner.failing
        assert set(self.driver.ends) == set(self.submits), "each submit ends"
        for number, submit in self.submits.items():
            reason = self.driver.ends[number].reason
            if number in self.bad:
                assert reason == "error"
            elif reason == "stop":
                assert submit.pooling is not None
                expected = embedding(unpack_tokens(submit.tokens), submit.pooling)
                assert self.driver.vectors[number] == expected
            else:
                assert number in (self.aborted if reason == "abort" else failing)
                assert number not in self.driver.vectors
        stats = self.driver.scheduler.stats
        assert (stats.waiting, stats.running) == (0, 0)


TestEncoding = EncodingMachine.TestCase


def texts(*lengths: int) -> list[Submit]:
    return [make_submit(n, [1] * length, 0, pooling=POOLING) for n, length in enumerate(lengths)]


def test_steps_are_filled_in_order_and_gaps_with_what_fits() -> None:
    driver = EncoderDriver(step_tokens=16)
    driver.step(*texts(6, 6, 6, 4, 16, 3, 20, 1))
    driver.run()
    assert driver.sizes() == [[0, 1, 3], [2, 5, 7], [4], [6]]
    assert driver.scheduler.stats.prompt_tokens == 62
    assert driver.scheduler.stats.steps == 4


def test_a_text_longer_than_a_step_goes_alone() -> None:
    driver = EncoderDriver(step_tokens=4)
    driver.step(*texts(20, 2, 2, 5))
    driver.run()
    assert driver.sizes() == [[0], [1, 2], [3]]


def test_a_step_has_no_more_texts_than_slots() -> None:
    driver = EncoderDriver(step_tokens=100, max_batch=3)
    driver.step(*texts(*[1] * 7))
    driver.run()
    assert driver.sizes() == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_long_queue_is_worked_off() -> None:
    driver = EncoderDriver(step_tokens=7)
    driver.step(*texts(*[1 + n % 5 for n in range(700)]))
    driver.run()
    assert sorted(id_ for step in driver.sizes() for id_ in step) == list(range(700))
    assert {finish.reason for finish in driver.ends.values()} == {"stop"}


def test_a_vector_in_flight_is_not_that_of_a_later_text_with_its_id() -> None:
    scheduler = EncoderScheduler(encoder_limits(), step_tokens=1)
    scheduler.add(texts(1)[0])
    plan = scheduler.plan()
    assert plan is not None
    scheduler.abort([0])
    scheduler.add(texts(1)[0])
    scheduler.commit(plan, FakeEncoder().launch(plan).sampled)
    output = scheduler.take_output()
    assert output is not None
    assert ([finish.reason for finish in output.finished], output.embeddings) == (["abort"], ())
    assert scheduler.stats.waiting == 1


def test_r25_a_batch_of_texts_that_finds_no_memory_costs_the_largest() -> None:
    driver = EncoderDriver(step_tokens=12)
    for text in texts(3, 5, 4, 6):
        driver.scheduler.add(text)
    plan = driver.scheduler.plan()
    assert plan is not None
    driver.runner.launch(plan)  # and its result is lost
    driver.scheduler.abort([0])
    driver.scheduler.withdraw()
    assert driver.scheduler.stats.waiting == 2
    driver.run()
    told = {id_: (finish.reason, finish.detail) for id_, finish in driver.ends.items()}
    lost = ("error", NO_MEMORY)
    assert told == {0: ("abort", ""), 1: lost, 2: ("stop", ""), 3: ("stop", "")}


def test_priority_goes_first() -> None:
    driver = EncoderDriver(step_tokens=1)
    late, urgent = texts(1)[0], make_submit(9, [1], 0, priority=-1, pooling=POOLING)
    driver.step(late, urgent)
    driver.run()
    assert driver.sizes() == [[9], [0]]


@pytest.mark.parametrize(
    ("submit", "told"),
    [
        (make_submit(1, [1], 4), "this model makes embeddings only, it generates no text"),
        (make_submit(1, [1], 0), "this model makes embeddings only"),
        (make_submit(1, [1], 2, pooling=POOLING), "an embedding generates nothing, max_new is 2"),
        (make_submit(1, [], 0, pooling=POOLING), "there are no tokens"),
        (
            make_submit(1, [1] * 21, 0, pooling=POOLING),
            "21 tokens leave no room in a context of 20",
        ),
        (make_submit(1, [3], 0, pooling=POOLING), "outside the vocabulary of 3"),
        (
            make_submit(1, [1], 0, pooling=Pooling(dimensions=4)),
            "4 dimensions of an embedding of 3",
        ),
    ],
)
def test_what_can_never_run_ends_with_the_reason(submit: Submit, told: str) -> None:
    driver = EncoderDriver()
    driver.step(submit)
    assert driver.ends[1].reason == "error"
    assert told in driver.ends[1].detail
    assert not driver.loop.busy


def test_an_id_in_use_and_a_torn_token_list_end_with_the_reason() -> None:
    driver = EncoderDriver()
    first = texts(2)[0]
    scheduler = driver.scheduler
    scheduler.add(first)
    scheduler.add(first)
    scheduler.add(Submit(0, 5, b"12345", first.sampling, 0, pooling=POOLING))
    output = scheduler.take_output()
    assert output is not None
    assert [(finish.id, finish.reason) for finish in output.finished] == [
        (0, "error"),
        (5, "error"),
    ]
    driver.run()


def test_plans_are_committed_in_order_and_two_at_most() -> None:
    scheduler = EncoderScheduler(encoder_limits(), step_tokens=1)
    for submit in texts(1, 1, 1):
        scheduler.add(submit)
    first, second = scheduler.plan(), scheduler.plan()
    assert first is not None
    assert second is not None
    with pytest.raises(RuntimeError, match="third"):
        scheduler.plan()
    with pytest.raises(RuntimeError, match="next"):
        scheduler.commit(second, Sampled([], {}, {}, {}))
    with pytest.raises(ValueError, match="at least 1"):
        EncoderScheduler(encoder_limits(), step_tokens=0)
