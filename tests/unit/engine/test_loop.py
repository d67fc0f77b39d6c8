"""EngineLoop with the true scheduler and a fake device, `run` with a scripted link."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.inbox import EXIT_PARENT_GONE, Item, ParentGone, Skipped, Terminate
from engine.loop import EngineLoop, StepClock, run
from engine.plan import OutOfMemory, Pending, Sampled, StepPlan
from engine.protocol import (
    NO_MEMORY,
    Abort,
    Busy,
    Drain,
    Finish,
    Limits,
    Ping,
    Pong,
    Pooling,
    StepOutput,
    Submit,
    ToRouter,
    unpack_tokens,
)
from engine.scheduler import Scheduler
from tests.fakes import (
    FakeRunner,
    Ready,
    embedding,
    generate,
    make_limits,
    make_pool,
    make_submit,
)

EPOCH = 1


@dataclass
class Recorded:
    """A runner that notes the order of launches and results, and what a launch costs."""

    runner: FakeRunner
    log: list[str] = field(default_factory=list)
    now_s: float = 0.0
    step_s: float = 0.0
    s_per_token: float = 0.0
    result_s: float = 0.0  # spent when a result is waited for
    pieces: int = 0  # of work for quiet moments
    no_memory_from: int = 10**9  # tokens in a step
    is_late: bool = False  # no memory is found when a result is read

    def idle(self) -> bool:
        self.pieces = max(0, self.pieces - 1)
        return self.pieces > 0

    def launch(self, plan: StepPlan) -> Pending:
        self.log.append(f"launch {plan.step}")
        lacks_memory = sum(row.count for row in plan.rows) >= self.no_memory_from
        if lacks_memory and not self.is_late:
            self.runner.last_step = plan.step
            raise OutOfMemory
        self.now_s += self.step_s + self.s_per_token * sum(row.count for row in plan.rows)
        return RecordedStep(self, plan.step, self.runner.launch(plan), lacks_memory)


@dataclass
class RecordedStep:
    device: Recorded
    step: int
    ready: Ready
    lacks_memory: bool = False

    def result(self) -> Sampled:
        if self.lacks_memory:
            raise OutOfMemory
        self.device.log.append(f"result {self.step}")
        self.device.now_s += self.device.result_s
        return self.ready.sampled


class Engine:
    """A loop, its parts, and everything it has said."""

    def __init__(
        self, limits: Limits | None = None, *, overlap: int = 0, step_tokens: int = 8
    ) -> None:
        self.limits = limits or make_limits()
        self.scheduler = Scheduler(
            make_pool(self.limits), self.limits, step_tokens=step_tokens, epoch=EPOCH
        )
        self.runner = Recorded(FakeRunner(self.limits))
        self.loop = EngineLoop(
            self.scheduler,
            self.runner,
            epoch=EPOCH,
            overlap=overlap,
            clock=lambda: self.runner.now_s,
        )
        self.said: list[ToRouter] = []

    def step(self, *inbox: Item) -> list[ToRouter]:
        messages = list(self.loop.step(inbox))
        self.said += messages
        return messages

    def finish(self) -> None:
        while self.loop.busy:
            self.step()

    @property
    def outputs(self) -> list[StepOutput]:
        return [message for message in self.said if isinstance(message, StepOutput)]

    def tokens(self, id_: int) -> list[int]:
        return [
            token
            for output in self.outputs
            for who, token in zip(output.ids, unpack_tokens(output.tokens), strict=True)
            if who == id_
        ]

    def ends(self, id_: int) -> list[Finish]:
        return [end for output in self.outputs for end in output.finished if end.id == id_]


@pytest.mark.parametrize("overlap", [0, 1])
def test_answers_are_those_of_the_model(overlap: int) -> None:
    engine = Engine(overlap=overlap)
    submits = [make_submit(n, [n % 3, 1, 2, 0, 1], max_new=4 + n) for n in range(6)]
    engine.step(*submits[:3])
    engine.step(*submits[3:])
    engine.finish()
    for submit in submits:
        assert (engine.tokens(submit.id), "length") == generate(submit, engine.limits)
        assert [end.reason for end in engine.ends(submit.id)] == ["length"]
    assert engine.loop.exit_code is None


def test_without_overlap_each_step_is_committed_before_the_next_is_planned() -> None:
    engine = Engine(overlap=0)
    engine.step(make_submit(1, [1, 2], max_new=3))
    engine.finish()
    assert engine.runner.log == [f"{what} {n}" for n in (1, 2, 3) for what in ("launch", "result")]


def test_with_overlap_the_device_has_the_next_step_before_the_host_reads_one() -> None:
    engine = Engine(overlap=1)
    engine.step(make_submit(1, [1, 2], max_new=3))
    assert engine.tokens(1) == []
    engine.finish()
    assert engine.runner.log == [
        *("launch 1", "launch 2", "result 1", "launch 3", "result 2", "result 3")
    ]


def test_an_idle_step_says_nothing() -> None:
    engine = Engine()
    assert engine.step() == []
    assert not engine.loop.busy


def test_ping_is_answered_before_the_step_and_with_current_numbers() -> None:
    engine = Engine()
    first, second = engine.step(make_submit(1, [1, 2]), Ping(EPOCH, 7))
    assert first == Pong(EPOCH, 7, first.stats if isinstance(first, Pong) else None)
    assert isinstance(first, Pong)
    assert (first.stats.waiting, first.stats.running) == (1, 0)
    assert isinstance(second, StepOutput)
    assert (second.stats.waiting, second.stats.running) == (0, 1)


def test_skipped_frames_are_counted() -> None:
    engine = Engine()
    engine.step(Skipped(10), Skipped(0))
    (pong,) = engine.step(Ping(EPOCH, 1))
    assert isinstance(pong, Pong)
    assert pong.stats.bad_frames == 2


def test_a_senseless_submit_costs_only_itself() -> None:
    engine = Engine()
    torn = Submit(EPOCH, 1, b"12345", make_submit(1, [1]).sampling, 4)
    engine.step(torn, make_submit(2, [1, 2]), make_submit(3, [99]))
    engine.finish()
    assert [end.reason for end in engine.ends(1)] == ["error"]
    assert [end.reason for end in engine.ends(3)] == ["error"]
    assert [end.reason for end in engine.ends(2)] == ["length"]


def test_a_failed_row_costs_only_its_sequence() -> None:
    engine = Engine()
    engine.runner.runner.fails = lambda row: "no finite scores" if row.id == 1 else None
    engine.step(make_submit(1, [1, 2]), make_submit(2, [1, 2, 0]))
    engine.finish()
    assert engine.ends(1) == [Finish(1, "error", "no finite scores")]
    assert [end.reason for end in engine.ends(2)] == ["length"]


@pytest.mark.parametrize("overlap", [0, 1])
def test_abort_ends_running_and_waiting_at_the_next_step(overlap: int) -> None:
    engine = Engine(make_limits(max_batch=1), overlap=overlap)
    engine.step(make_submit(1, [1, 2], max_new=20), make_submit(2, [2, 1], max_new=20))
    engine.step()
    before = len(engine.said)
    engine.step(Abort(EPOCH, (1, 2, 77)))
    engine.finish()
    assert [end.reason for end in engine.ends(1) + engine.ends(2)] == ["abort", "abort"]
    assert all(not output.ids for output in engine.outputs[before:])


@pytest.mark.parametrize("order", [Drain(EPOCH), Terminate(signal.SIGTERM)])
@pytest.mark.parametrize("overlap", [0, 1])
def test_drain_finishes_what_is_there_and_refuses_what_comes(order: Item, overlap: int) -> None:
    engine = Engine(make_limits(max_batch=1), overlap=overlap)
    engine.step(make_submit(1, [1, 2], max_new=5), make_submit(2, [2, 1], max_new=5))
    engine.step(make_submit(3, [1], max_new=5), order, make_submit(4, [1]))
    while engine.loop.exit_code is None:
        assert engine.loop.busy
        engine.step(make_submit(5, [1])) if not engine.ends(5) else engine.step()
    assert engine.loop.exit_code == 0
    for id_ in (1, 2, 3):
        assert (len(engine.tokens(id_)), engine.ends(id_)) == (5, [Finish(id_, "length")])
    for id_ in (4, 5):
        assert [end.reason for end in engine.ends(id_)] == ["abort"]


@pytest.mark.parametrize("order", [Drain(EPOCH), Terminate(signal.SIGTERM)])
def test_drain_of_an_idle_engine_is_immediate(order: Item) -> None:
    engine = Engine()
    assert engine.step(order) == []
    assert engine.loop.exit_code == 0


def test_a_signal_after_a_drain_is_still_the_first_one() -> None:
    engine = Engine()
    engine.step(make_submit(1, [1, 2], max_new=20), Drain(EPOCH))
    engine.step(Terminate(signal.SIGTERM))
    assert engine.loop.exit_code is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(number: signal.Signals) -> None:
    engine = Engine()
    engine.step(make_submit(1, [1, 2], max_new=20))
    engine.step(Terminate(signal.SIGTERM))
    launched = len(engine.runner.log)
    assert engine.step(Terminate(number)) == []
    assert engine.loop.exit_code == 128 + number
    assert len(engine.runner.log) == launched


def test_without_its_parent_an_engine_computes_nothing_more() -> None:
    engine = Engine()
    engine.step(make_submit(1, [1, 2], max_new=20))
    launched = len(engine.runner.log)
    assert engine.step(ParentGone()) == []
    assert engine.loop.exit_code == EXIT_PARENT_GONE
    assert len(engine.runner.log) == launched


def test_work_that_cannot_be_planned_is_loud() -> None:
    """A loop that turns without computing would look alive for ever."""
    engine = Engine()
    engine.step(make_submit(1, [1, 2], max_new=20))
    engine.scheduler.plan = lambda _tokens: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no step can be planned"):
        engine.step()


def test_a_long_step_announces_itself_before_it_is_launched() -> None:
    limits = make_limits(max_len=512, num_blocks=256)
    engine = Engine(limits, step_tokens=128)
    engine.runner.step_s = 40.0
    messages = engine.loop.step([make_submit(1, [n % 3 for n in range(300)])])
    assert next(messages) == Busy(EPOCH, "step", 12.8)  # the guess before anything was measured
    assert engine.runner.log == []
    engine.said += messages
    assert engine.step()[0] == Busy(EPOCH, "step", 40.0)
    assert isinstance(engine.step()[0], StepOutput)  # 44 tokens left: too few to be predicted


def test_a_step_launched_ahead_begins_when_the_one_before_it_is_done() -> None:
    engine = Engine(make_limits(max_len=512, num_blocks=256), overlap=1, step_tokens=100)
    engine.runner.result_s = 40.0
    engine.step(make_submit(1, [n % 3 for n in range(500)]))
    told = [message for _ in range(4) for message in engine.step() if isinstance(message, Busy)]
    assert [busy.expected_s for busy in told] == [10.0, 40.0, 40.0, 40.0]


def test_step_clock_learns_from_large_steps_only() -> None:
    clock = StepClock(s_per_token=1.0)
    assert clock.expected_s(StepClock.LARGE - 1) == 0.0
    clock.learn(1, 100.0)
    assert clock.expected_s(100) == 100.0
    clock.learn(200, 4.0)
    assert clock.expected_s(100) == 2.0


@pytest.mark.parametrize(
    ("step_s", "s_per_token", "fitting"),
    [
        (0.017, 0.0008, 41),  # a small model on a CPU
        (0.008, 0.00004, 1050),  # a GPU: the step's budget is less
        (0.3, 0.05, 9),  # a large model on a CPU, too slow for anything but the least
    ],
)
def test_texts_to_embed_leave_a_stream_its_pace(
    step_s: float, s_per_token: float, fitting: int
) -> None:
    """FastChat#3833: one embedding call stopped a running stream for 15 s."""
    budget = 256
    limits = make_limits(max_len=4000, num_blocks=4000, block_size=8, max_batch=16)
    engine = Engine(limits, step_tokens=budget)
    engine.runner.step_s, engine.runner.s_per_token = step_s, s_per_token
    engine.step(make_submit(1, [1, 2], max_new=900))
    texts = [make_submit(n, [n % 3] * 600, 0, pooling=Pooling()) for n in range(2, 40)]
    engine.step(*texts)
    for _ in range(20):
        engine.step()
    sizes: list[int] = []
    for _ in range(30):
        began_s, computed = engine.runner.now_s, engine.runner.runner.num_positions
        assert engine.loop.busy
        before = len(engine.tokens(1))
        engine.step()
        sizes.append(engine.runner.runner.num_positions - computed)
        assert len(engine.tokens(1)) == before + 1, "the stream goes on in every step"
        took_s = engine.runner.now_s - began_s
        assert took_s <= max(0.055, step_s + 9 * s_per_token)
    wanted = min(fitting, budget)
    assert wanted * 0.85 <= sum(sizes) / len(sizes) <= wanted * 1.1
    engine.step(Abort(EPOCH, (1,)))
    computed = engine.runner.runner.num_positions
    engine.step()
    assert engine.runner.runner.num_positions == computed + budget, "alone, the whole step"
    engine.step(Abort(EPOCH, tuple(range(2, 40))))


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_chat_does_not_queue_behind_texts_to_embed(overlap: int) -> None:
    limits = make_limits(max_len=64, num_blocks=64, max_batch=4)
    engine = Engine(limits, overlap=overlap, step_tokens=16)
    texts = [make_submit(n, [n % 3] * 40, 0, pooling=Pooling(), priority=-1) for n in range(2048)]
    engine.step(*texts)
    engine.step()
    engine.step(make_submit(5000, [1, 2, 0], max_new=3, priority=5))
    engine.step()
    engine.step()
    assert len(engine.tokens(5000)) >= 2
    engine.finish()
    assert [end.reason for n in range(2048) for end in engine.ends(n)] == ["stop"] * 2048
    vectors = {v.id: v.values for output in engine.outputs for v in output.embeddings}
    assert vectors == {text.id: embedding(unpack_tokens(text.tokens), Pooling()) for text in texts}


def test_step_clock_comes_to_rest_at_a_smooth_step() -> None:
    clock, size = StepClock(), 0
    for _ in range(20):
        size = clock.smooth_tokens
        clock.learn(size, 0.01 + 0.001 * size)
    assert 38 <= size <= 40
    clock.learn(5, 0.015)  # a small step shows nothing against larger ones
    assert clock.smooth_tokens >= size
    clock.learn(30, 0.1)  # the machine has less to give
    assert clock.smooth_tokens == 15
    clock.learn(1, 0.0)  # a clock too coarse
    assert clock.smooth_tokens == 5000


class ScriptedLink:
    """Gives one inbox after the other, and notes how it was waited for and what was sent."""

    def __init__(self, inboxes: Iterable[list[Item]]) -> None:
        self.inboxes = list(inboxes)
        self.timeouts: list[float | None] = []
        self.sent: list[ToRouter] = []
        self.collecting: list[bool] = []

    def receive(self, timeout_s: float | None) -> list[Item]:
        self.timeouts.append(timeout_s)
        self.collecting.append(gc.isenabled())
        if self.inboxes:
            return self.inboxes.pop(0)
        return [] if timeout_s == 0 else [Drain(EPOCH)]

    def send(self, message: ToRouter) -> None:
        self.sent.append(message)


def test_run_waits_without_limit_when_idle_and_not_at_all_when_busy() -> None:
    engine = Engine()
    link = ScriptedLink([[Ping(EPOCH, 1)], [make_submit(1, [1, 2], max_new=3)]])
    assert run(engine.loop, link) == 0
    # 0.25 s of silence come before what waits for a quiet moment, of which there is nothing here.
    assert link.timeouts == [0.25, 0.25, 0, 0, 0.25]
    assert [type(message) for message in link.sent] == [Pong, *[StepOutput] * 3]


def test_run_uses_quiet_moments_piece_by_piece_and_then_waits_without_limit() -> None:
    engine = Engine()
    engine.runner.pieces = 3
    link = ScriptedLink([[], [], [Ping(EPOCH, 1)], [], []])
    assert run(engine.loop, link) == 0
    # Two pieces, a message, silence again, the last piece; then nothing but messages matters.
    assert link.timeouts == [0.25, 0, 0, 0.25, None, None]
    assert engine.runner.pieces == 0


def test_run_collects_no_garbage_within_steps_and_leaves_the_process_as_it_was() -> None:
    assert gc.isenabled()
    link = ScriptedLink([])
    run(Engine().loop, link)
    assert link.collecting == [False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_run_lets_an_error_of_a_step_out() -> None:
    engine = Engine()
    link = ScriptedLink([[make_submit(1, [1, 2])]])
    engine.runner.runner.last_step = 5  # the fake device now finds the plan impossible
    with pytest.raises(AssertionError):
        run(engine.loop, link)
    assert gc.isenabled()


ORDERS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "abort", "ping", "skip", "step"]),
        st.integers(0, 5),
    ),
    max_size=30,
)


@given(ORDERS, st.integers(0, 1), st.integers(1, 9))
def test_every_submit_ends_exactly_once_and_every_ping_is_answered(
    orders: list[tuple[str, int]], overlap: int, step_tokens: int
) -> None:
    engine = Engine(make_limits(num_blocks=6, max_len=20), overlap=overlap, step_tokens=step_tokens)
    submitted: list[int] = []
    for place, (what, n) in enumerate(orders):
        match what:
            case "submit":
                submitted.append(place)
                engine.step(make_submit(place, [n % 3, *[1] * n], max_new=2 * n))
            case "abort":
                engine.step(Abort(EPOCH, tuple(submitted[-n:])))
            case "ping":
                engine.step(Ping(EPOCH, place))
            case "skip":
                engine.step(Skipped(n))
            case _:
                engine.step()
    engine.step(Drain(EPOCH))
    for _ in range(2000):
        if engine.loop.exit_code is not None:
            break
        engine.step()
    assert engine.loop.exit_code == 0
    ends = [end.id for output in engine.outputs for end in output.finished]
    assert sorted(ends) == submitted
    pongs = [message.n for message in engine.said if isinstance(message, Pong)]
    assert pongs == [place for place, (what, _n) in enumerate(orders) if what == "ping"]
    assert engine.scheduler.stats.blocks_held == engine.scheduler.stats.blocks_leaked == 0


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("late", [False, True], ids=["launch", "result"])
def test_r25_a_request_that_finds_no_memory_fails_alone(overlap: int, late: bool) -> None:
    """The largest prompt does not fit; who runs beside it is computed again and ends as usual."""
    engine = Engine(make_limits(max_len=64, num_blocks=64), overlap=overlap, step_tokens=32)
    engine.runner.no_memory_from = 20  # tokens in a step
    engine.runner.is_late = late
    others = [make_submit(n, [n % 3, 1, 2], max_new=6) for n in range(1, 4)]
    engine.step(*others)
    engine.step()
    engine.step(make_submit(9, [1] * 25, max_new=4))
    engine.finish()
    assert [(end.reason, end.detail) for end in engine.ends(9)] == [("error", NO_MEMORY)]
    for submit in others:
        assert (engine.tokens(submit.id), "length") == generate(submit, engine.limits)
    for n in range(100, 200):
        engine.step(make_submit(n, [n % 3, 2], max_new=2))
    engine.finish()
    assert all(engine.ends(n)[0].reason == "length" for n in range(100, 200))
    assert engine.loop.exit_code is None
    assert engine.scheduler.stats.blocks_held == engine.scheduler.stats.blocks_leaked == 0
