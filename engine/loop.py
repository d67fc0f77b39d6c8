"""The engine's only loop: receive, plan, launch, commit, send.

Owns the order of things within a step, the steps in flight and the drain state. Must not know
torch, sockets, tokens' meaning or scheduling policy: the scheduler decides, the runner computes,
the link carries. Read `EngineLoop.step` and `run`, and you have seen the engine.

Errors: a request that makes no sense, or whose row fails, ends with its own `error`, decided in
scheduler and runner. What is raised through this file means that shared state can no longer be
trusted, and is left to the boundary in `engine.main`.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, assert_never

from engine.compiling import Compiling
from engine.grammar import Matcher
from engine.inbox import EXIT_PARENT_GONE, EngineLink, Item, ParentGone, Skipped, Terminate
from engine.plan import OutOfMemory, Pending, RunnerLike, Sampled, StepPlan
from engine.protocol import (
    Abort,
    Busy,
    Drain,
    Finish,
    Ping,
    Pong,
    Stats,
    StepOutput,
    Submit,
    ToRouter,
    Vocabulary,
)
from engine.stats import Counters

EXIT_DRAINED = 0
# Cyclic garbage is collected in quiet moments; under load that never pauses, after so many steps.
_STEPS_PER_COLLECTION = 10_000
# A step expected to take longer announces itself, well before a router would call it a hang.
_LONG_STEP_S = 5.0
# A step of this length is not felt by running streams: background work may fill it up.
_SMOOTH_STEP_S = 0.05
# After so long without a message or work, what waits for a quiet moment is done.
_QUIET_S = 0.25
_SHORTEST_STEP_S = 1e-5  # what a clock may show as nothing
# While there is nothing to do but to wait for a grammar to be compiled, it is looked for so often.
_COMPILING_POLL_S = 0.001


class SchedulerLike(Protocol):
    """What the loop needs of the scheduler; see `engine.scheduler` for the contracts."""

    @property
    def busy(self) -> bool: ...
    @property
    def stats(self) -> Stats: ...
    @property
    def counters(self) -> Counters: ...
    def add(self, submit: Submit, matcher: Matcher | None = ..., /) -> None: ...
    def abort(self, ids: Sequence[int]) -> None: ...
    def plan(self, smooth_tokens: int = ..., /) -> StepPlan | None: ...
    def commit(self, plan: StepPlan, sampled: Sampled) -> None: ...
    def withdraw(self) -> None: ...
    def take_output(self) -> StepOutput | None: ...


class StepClock:
    """Relates a step's seconds to its tokens, as measured.

    `expected_s` tells a long step from a hang. Only steps of at least `LARGE` tokens count: smaller
    ones are bound by reading the weights, and their seconds per token say nothing about a prompt.

    `smooth_tokens` is the size of a step that running streams do not feel. Whatever part of a step
    is spent on reading weights, scaling the size of a step that took too long by the excess, and
    that of a short one by what is missing, comes to rest where a step takes that long.
    """

    LARGE = 64

    def __init__(self, s_per_token: float = 0.1) -> None:
        self.smooth_tokens = 1
        self._s_per_token = s_per_token  # a slow guess until something was measured

    def expected_s(self, num_tokens: int) -> float:
        """0 for a step too small to be predicted."""
        return num_tokens * self._s_per_token if num_tokens >= self.LARGE else 0.0

    def learn(self, num_tokens: int, took_s: float) -> None:
        """Record a finished step."""
        if num_tokens >= self.LARGE:
            self._s_per_token = took_s / num_tokens
        fitting = int(num_tokens * _SMOOTH_STEP_S / max(took_s, _SHORTEST_STEP_S))
        if took_s > _SMOOTH_STEP_S or fitting > self.smooth_tokens:
            self.smooth_tokens = fitting


class _Launched(NamedTuple):
    plan: StepPlan
    pending: Pending
    num_tokens: int
    at_s: float


class EngineLoop:
    """Applies what arrives, advances the batch by one step, and says what to send.

    `overlap` 1: step N+1 is planned and launched before step N is committed, so that the device
    never waits for the host. `exit_code` is None while the engine should live.
    """

    def __init__(
        self,
        scheduler: SchedulerLike,
        runner: RunnerLike,
        *,
        epoch: int,
        overlap: int = 0,
        compiling: Compiling | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `compiling`, a submit with a grammar ends with an error."""
        self.exit_code: int | None = None
        self._scheduler = scheduler
        self._runner = runner
        self._epoch = epoch
        self._overlap = overlap
        self._compiling = Compiling(0) if compiling is None else compiling
        self._clock = clock
        self._step_clock = StepClock()
        self._launched: deque[_Launched] = deque()
        self._free_s = 0.0  # since when the device works on no earlier step
        self._draining = False
        self._terminations = 0

    @property
    def busy(self) -> bool:
        """Whether another step has work; if not, the caller may wait for the next item."""
        return self._scheduler.busy or bool(self._launched) or self._compiling.busy

    @property
    def wait_s(self) -> float:
        """How long the next item may be waited for while `busy`."""
        return 0.0 if self._scheduler.busy or self._launched else _COMPILING_POLL_S

    def idle(self) -> bool:
        """Use a quiet moment, while not `busy`; False once there is nothing to use it for."""
        return self._runner.idle()

    def step(self, inbox: Sequence[Item]) -> Iterator[ToRouter]:
        """Apply `inbox`, then run one step.

        To be iterated to its end, each message sent before the next one is asked for: a `Busy`
        must be out before the step that it announces.
        """
        counters = self._scheduler.counters
        counters.frames_received += sum(
            not isinstance(item, Terminate | ParentGone) for item in inbox
        )
        for message in self._step(inbox):
            yield message
            counters.frames_sent += 1

    def _step(self, inbox: Sequence[Item]) -> Iterator[ToRouter]:
        yield from self._apply(inbox)
        if self.exit_code is not None:
            return
        yield from self._advance()
        if self._draining and not self.busy:
            self.exit_code = EXIT_DRAINED

    def _apply(self, inbox: Sequence[Item]) -> Iterator[ToRouter]:
        refused: list[Finish] = []
        for item in inbox:
            match item:
                case Submit():
                    refused += self._submit(item)
                case Vocabulary():
                    self._compiling.learn(item)
                case Abort():
                    refused += [Finish(i, "abort") for i in self._compiling.abort(item.ids)]
                    self._scheduler.abort(item.ids)
                case Ping():
                    yield Pong(self._epoch, item.n, self._scheduler.stats)
                case Drain():
                    self._draining = True
                case Terminate():
                    self._terminate(item.signal)
                case ParentGone():
                    self.exit_code = EXIT_PARENT_GONE
                case Skipped():
                    self._scheduler.counters.bad_frames += 1
                case _:
                    assert_never(item)
        refused += self._add_compiled()
        if refused:
            stats = self._scheduler.stats
            yield StepOutput(
                self._epoch, stats.steps, (), (), b"", finished=tuple(refused), stats=stats
            )

    def _submit(self, submit: Submit) -> list[Finish]:
        """To the scheduler, or first to where its grammar is compiled; its end if it has one."""
        if self._draining:
            return [Finish(submit.id, "abort", "the engine is draining")]
        if not submit.grammar:
            self._scheduler.add(submit)
        elif not self._compiling.begin(submit):
            return [Finish(submit.id, "error", "this id is in use")]
        return []

    def _add_compiled(self) -> list[Finish]:
        refused: list[Finish] = []
        for submit, matcher, problem in self._compiling.take():
            if matcher is None:
                refused.append(Finish(submit.id, "error", problem))
            else:
                self._scheduler.add(submit, matcher)
        return refused

    def _terminate(self, signal_number: int) -> None:
        """The first signal drains, the second one leaves with the shell's code for it."""
        self._terminations += 1
        self._draining = True
        if self._terminations > 1:
            self.exit_code = 128 + signal_number

    def _advance(self) -> Iterator[ToRouter]:
        plan = self._scheduler.plan(self._step_clock.smooth_tokens)
        if plan is not None:
            num_tokens = sum(row.count for row in plan.rows)
            expected_s = self._step_clock.expected_s(num_tokens)
            if expected_s > _LONG_STEP_S:
                yield Busy(self._epoch, "step", expected_s)
            self._launch(plan, num_tokens)
        allowed_ahead = 0 if plan is None else self._overlap
        committed = len(self._launched) > allowed_ahead
        if committed:
            self._commit()
        output = self._scheduler.take_output()
        if output is not None:
            yield output
        elif plan is None and not committed and self._scheduler.busy:
            raise RuntimeError("sequences are waiting and no step can be planned")

    def _launch(self, plan: StepPlan, num_tokens: int) -> None:
        started_s = self._clock()
        try:
            pending = self._runner.launch(plan)
        except OutOfMemory:
            while self._launched:  # those before it are sound
                self._commit()
            self._scheduler.withdraw()
            return
        self._launched.append(_Launched(plan, pending, num_tokens, started_s))

    def _commit(self) -> None:
        done = self._launched.popleft()
        try:
            sampled = done.pending.result()
        except OutOfMemory:
            self._launched.clear()  # a step behind it went on from tokens that do not exist
            self._scheduler.withdraw()
            return
        now_s = self._clock()
        # A step launched ahead has begun when the one before it was done.
        self._step_clock.learn(done.num_tokens, now_s - max(done.at_s, self._free_s))
        self._free_s = now_s
        self._scheduler.commit(done.plan, sampled)


def _collect() -> int:
    """Collects garbage, and never looks again at what is left: the number of steps since then.

    A prefix cache of a million tokens is some hundred thousand objects, 20 ms to look through.
    """
    gc.collect()
    gc.freeze()
    return 0


def run(loop: EngineLoop, link: EngineLink) -> int:
    """Step until the loop has an exit code, and return it. Blocks, at no cost, while idle.

    What survives a collection is never looked at again by the garbage collector, and nothing is
    collected within a step.
    """
    steps = _collect()
    gc.disable()
    quiet_s: float | None = _QUIET_S  # None: nothing is left for quiet moments
    try:
        while loop.exit_code is None:
            if steps >= _STEPS_PER_COLLECTION:
                steps = _collect()
            inbox = link.receive(loop.wait_s if loop.busy else quiet_s)
            if not inbox and not loop.busy:
                # A pause between two requests is not quiet: the next one should not have to wait.
                if steps:
                    steps = _collect()
                quiet_s = 0 if loop.idle() else None
                continue
            quiet_s = quiet_s if quiet_s is None else _QUIET_S
            for message in loop.step(inbox):
                link.send(message)
            steps += 1
    finally:
        gc.enable()
        gc.unfreeze()
    return loop.exit_code
