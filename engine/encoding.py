"""Which texts a model that only makes embeddings computes in the next step.

Owns the sequences and their queue; fulfils `engine.loop.SchedulerLike` as `engine.scheduler` does,
without blocks, chunks and preemption: a text is computed whole in one step, or not at all. Must not
know torch, the clock, the socket or the log.

* Exactly one `Finish` per `Submit`; nothing raises for a bad one.
* The first of the queue is in the next step, so each text waits for a finite number of steps.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from engine.grammar import Matcher
from engine.outbox import Outbox
from engine.plan import Admit, Row, Sampled, StepPlan
from engine.protocol import (
    NO_MEMORY,
    BadFrame,
    Embedding,
    Limits,
    Pooling,
    Sampling,
    Stats,
    StepOutput,
    Submit,
    unpack_tokens,
)
from engine.refusal import refusal
from engine.stats import Counters

_MAX_LAUNCHED = 2  # plans without a commit: the one on the device and the one queued behind it
# So many texts behind the first one are looked at to fill a step up.
_LOOK_AHEAD = 256
_SAMPLING = Sampling()


class Text(NamedTuple):
    """One submit. `rank` is unique: the lowest is computed first."""

    rank: tuple[int, int]  # priority, arrival
    id: int
    tokens: list[int]
    pooling: Pooling


class EncoderScheduler:
    """Batches of whole texts, by their number of tokens."""

    def __init__(self, limits: Limits, *, step_tokens: int, epoch: int = 0) -> None:
        """`step_tokens`: most tokens in one step, unless a single text is longer.

        Raises ValueError if nothing could ever run.
        """
        if step_tokens < 1 or limits.max_batch < 1:
            raise ValueError("step_tokens and max_batch must be at least 1")
        self.counters = Counters()
        self._limits = limits
        self._epoch = epoch
        self._step_tokens = step_tokens
        self._waiting: list[Text] = []
        self._texts: dict[int, Text] = {}  # all that have not ended
        self._launched: deque[tuple[StepPlan, list[Text]]] = deque()
        self._arrivals = 0
        self._step = 0
        self._outbox = Outbox()

    @property
    def busy(self) -> bool:
        """Is there a text that has not ended, or a step that is not committed?"""
        return bool(self._texts or self._launched)

    def add(self, submit: Submit, matcher: Matcher | None = None) -> None:
        """Take a text; one that can never run ends at once with an `error`, as does a grammar."""
        del matcher
        try:
            tokens = unpack_tokens(submit.tokens)
        except BadFrame as error:
            self._outbox.finish(submit.id, "error", f"bad token list: {error}")
            return
        problem = refusal(submit, tokens, self._limits)
        if submit.id in self._texts:
            problem = "this id is in use"
        if problem is not None or submit.pooling is None:
            self._outbox.finish(submit.id, "error", problem or "")
            return
        text = Text((submit.priority, self._arrivals), submit.id, tokens, submit.pooling)
        self._arrivals += 1
        self._texts[text.id] = text
        insort(self._waiting, text)

    def abort(self, ids: Iterable[int]) -> None:
        """End these texts now; what the device still computes for them is thrown away."""
        for text_id in ids:
            text = self._texts.pop(text_id, None)
            if text is None:
                continue
            at = bisect_left(self._waiting, text)
            if at < len(self._waiting) and self._waiting[at] is text:
                del self._waiting[at]
            self._outbox.finish(text_id, "abort")

    def plan(self, _smooth_tokens: int = 0) -> StepPlan | None:
        """The first texts of the queue, and others behind them that still fit in.

        There are no streams here that a long step could disturb. None if nothing waits. Raises
        RuntimeError if two plans are not committed yet.
        """
        if len(self._launched) >= _MAX_LAUNCHED:
            raise RuntimeError("a third step must not be planned before the first is committed")
        texts = self._take()
        if not texts:
            return None
        admits: list[Admit] = []
        rows: list[Row] = []
        for slot, text in enumerate(texts):
            length = len(text.tokens)
            admits.append(Admit(slot, text.tokens, length, [], _SAMPLING, (), text.pooling))
            rows.append(Row(slot, text.id, 0, length, samples=False))
            self.counters.started(length, 0, 0)
            self._outbox.start(text.id, 0)
        self._step += 1
        plan = StepPlan(self._step, rows, admits, [], [])
        self._launched.append((plan, texts))
        return plan

    def _take(self) -> list[Text]:
        """Removes the texts of the next step from the queue."""
        budget, taken, passed = self._step_tokens, list[Text](), list[Text]()
        for text in self._waiting[:_LOOK_AHEAD]:
            fits = len(text.tokens) <= budget and len(taken) < self._limits.max_batch
            if fits or not taken:
                taken.append(text)
                budget -= len(text.tokens)
            else:
                passed.append(text)
        self._waiting[:_LOOK_AHEAD] = passed
        return taken

    def commit(self, plan: StepPlan, sampled: Sampled) -> None:
        """Apply the results of the oldest plan that has none yet.

        Rows of texts that ended meanwhile are void. Raises RuntimeError for any other plan.
        """
        if not self._launched or self._launched[0][0] is not plan:
            raise RuntimeError(f"step {plan.step} is not the one to be committed next")
        _plan, texts = self._launched.popleft()
        for index, text in enumerate(texts):
            if self._texts.get(text.id) is not text:
                continue
            del self._texts[text.id]
            if index in sampled.failed:
                self._outbox.finish(text.id, "error", sampled.failed[index])
                continue
            self._outbox.embeddings.append(Embedding(text.id, sampled.embeddings[index]))
            self._outbox.finish(text.id, "stop")
        self.counters.steps += 1
        self._outbox.news = True

    def withdraw(self) -> None:
        """See `Scheduler.withdraw`: the largest text ends, the others wait again."""
        launched, self._launched = self._launched, deque()
        texts = [
            text for _, group in launched for text in group if self._texts.get(text.id) is text
        ]
        if texts:
            largest = max(texts, key=lambda text: len(text.tokens))
            texts.remove(largest)
            del self._texts[largest.id]
            self._outbox.finish(largest.id, "error", NO_MEMORY)
        for text in texts:
            insort(self._waiting, text)

    @property
    def stats(self) -> Stats:
        """Gauges and totals of now."""
        waiting = len(self._waiting)
        return self.counters.snapshot((waiting, len(self._texts) - waiting), (0, 0, 0))

    def take_output(self) -> StepOutput | None:
        """All that happened since the last call as one message; None if nothing did."""
        outbox = self._outbox
        if not outbox.news:
            return None
        self._outbox = Outbox()
        return outbox.message(self._epoch, self.counters.steps, self.stats)
