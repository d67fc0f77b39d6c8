"""One request's life in one function: admit, place on an engine, stream, release.

Owns nothing that outlives a request: its permit, its streams and its text state are locals of
`Flow.generate` and freed by its end, however it ends. Must not know HTTP, JSON or sockets.

A lost engine is no error here: streams without a token are submitted again, streams with tokens go
on elsewhere (or on the restarted engine) with prompt + tokens, until `router.blame` convicts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from engine.protocol import NO_MEMORY, Finish, Sampling
from router import logs
from router.admission import Admission, Ask
from router.dispatch import PrefixMap, chain, choose
from router.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InsufficientMemory,
    Overloaded,
    Quarantined,
    RequestTimeout,
    SlowClient,
)
from router.fleet import Fleet
from router.metrics import Metrics, ModelMetrics
from router.quarantine import Quarantine
from router.record import RequestRecord
from router.replica import GONE, Replica
from router.streams import SLOW_CLIENT, Delta, Stream, TokenLogprob, WakeUp
from router.text.assembly import ChoiceText, FinishReason, Piece, TextRules
from router.text.served import ServedModel
from router.waiting import Alarm, Entry, FlowSettings, hold_permit

MAX_MOVES: Final = 8  # of one choice in a row, for whatever reason,
MOVE_TOKENS: Final = 32  # with fewer new tokens than these between them
GUESSED_NEW: Final = 256  # tokens of an answer
PART_TOKENS: Final = 16_384  # of prompts, sent to engines in one go: 3 ms
MAX_PIECES: Final = 16  # of one choice and step: a reader far behind gets larger ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that was wholly checked; nothing behind it checks again.

    Choice i belongs to prompt i // n. `sampling.seed` is that of each prompt's first choice; the
    others' are derived from it. `max_new` None: the rest of the context; 0: only the prompt is
    wanted (echo). Every choice follows `grammar` (llguidance's text form; "": none).
    """

    record: RequestRecord
    model: ServedModel
    prompts: tuple[list[int], ...]
    n: int
    max_new: int | None
    sampling: Sampling
    rules: TextRules
    salt: bytes = b""
    priority: int = 0
    tenant: bytes = b""  # whose request it is, where several keys are in use
    grammar: str = ""
    keep: int = 0  # of the `n` choices of each prompt; 0: all

    @property
    def num_choices(self) -> int:
        """Sequences that the job runs."""
        return len(self.prompts) * self.n

    @property
    def ask(self) -> Ask:
        """What admission is asked for; how long answers get is a guess until they end."""
        guess = GUESSED_NEW if self.max_new is None else min(self.max_new, GUESSED_NEW)
        tokens = sum(map(len, self.prompts)) + guess * self.num_choices
        return Ask(tokens, self.tenant, self.priority)


class First(NamedTuple):
    """What is known when a choice's first token is there.

    `prompt_logprobs[i]` belongs to prompt token i + 1.
    """

    cached_tokens: int
    prompt_logprobs: list[TokenLogprob] | None


class Progress(msgspec.Struct, frozen=True, gc=False):
    """One piece of one choice; `first` only with its first one."""

    choice: int
    piece: Piece
    first: First | None


class Placement(NamedTuple):
    """What an engine needs to know besides the stream's tokens."""

    sampling: Sampling
    stop_ids: tuple[int, ...]
    salt: bytes
    priority: int
    grammar: str = ""


class Flow:
    """Runs jobs on engines. Owns which prompts were sent where, and nothing else that lasts."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        metrics: Metrics,
        settings: FlowSettings,
        quarantine: Quarantine,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._metrics = metrics
        self._settings = settings
        self._quarantine = quarantine
        self._clock = clock
        self._prefixes = PrefixMap()
        self._alarms: set[Alarm] = set()  # of the requests that run
        fleet.subscribe(self._on_replica_change)

    def max_len(self, model: ServedModel) -> int:
        """Tokens that prompt and answer may have together, as of now."""
        told = [view.limits.max_len for view in self._fleet.views(model.key) if view.limits]
        return min([model.max_len, *told])

    def limit(self, settings: FlowSettings) -> None:
        """From now on these hold; requests that run keep the time limits they came with."""
        self._settings = settings

    def check_room(self, model: ServedModel, num_tokens: int, *, param: str) -> None:
        """Raises ContextLengthExceeded unless at least one token fits behind the prompt."""
        max_len = self.max_len(model)
        if num_tokens >= max_len:
            raise ContextLengthExceeded(
                f"The prompt is too long: this model's maximum context length is {max_len} tokens, "
                f"the prompt has {num_tokens}; at least one must be left for the answer.",
                param=param,
            )

    async def generate(self, job: Job) -> AsyncGenerator[list[Progress], None]:
        """The whole life of a request, from the queue for a permit to the last token.

        The first item is always empty: it comes when every choice is placed on an engine, or after
        a wait of `ping_s` for that. Later empty items come every `ping_s` without news. Ends when
        each choice has a finish reason.
        Raises RequestError; what it held is free again when it ends, is closed or is cancelled.
        """
        record = job.record
        record.model = job.model.name
        record.prompt_tokens = sum(len(prompt) for prompt in job.prompts)
        self._check_quarantine(job, job.prompts)
        limits = self._settings.deadlines(record.started_s)
        alarm = Alarm(self._clock, limits.first_token_s)
        wait = hold_permit(
            self._fleet, self._admission, self._metrics, job.model, limits.permit_s, job.ask
        )
        at_once = self._admission.is_free(job.model.key, job.ask)
        async with Entry(wait, at_once=at_once) as entry:
            while await entry.waits(self._settings.ping_s):
                yield []
            permit = entry.value()
            record.queue_s = self._clock() - record.started_s
            choices = self._open(job, alarm.event)
            self._alarms.add(alarm)
            try:
                alarm.start(self._settings.ping_s)
                while not await self._place_all(job, choices):
                    await alarm.wait()
                    if alarm.expired:
                        raise self._fleet.unavailable(job.model.key)
                    if alarm.rang():
                        yield []
                yield []
                running = choices
                while running:
                    await alarm.wait()
                    rang = alarm.rang()
                    step: list[Progress] = []
                    changed = self._advance_all(job, running, step)
                    if changed:
                        running = [choice for choice in running if choice.finish is None]
                    if step or rang:
                        if step:
                            alarm.deadline_s = limits.end_s
                        yield step
                    if changed:
                        _raise_failures(job, running)  # what came before them was shown
                        await self._place_all(job, running)
                    if running and alarm.expired:
                        raise RequestTimeout("The request's time limit has passed.")
            finally:
                alarm.stop()
                self._alarms.discard(alarm)
                self._close(job, choices)
                permit.settle(record.prompt_tokens + record.completion_tokens)

    def _open(self, job: Job, event: WakeUp) -> list[_Choice]:
        max_len = self.max_len(job.model)
        choices: list[_Choice] = []
        for prompt in job.prompts:
            hashes = chain(prompt, job.salt, job.model.key)
            room = max(max_len - len(prompt), 1)
            max_new = room if job.max_new is None else min(max(job.max_new, 1), room)
            for _ in range(job.n):
                stream = self._fleet.open(prompt, max_new, event)
                stream.request_id = job.record.request_id
                series = self._metrics.of_model(job.model.name)
                choices.append(_Choice(job, len(choices), stream, hashes, series))
        return choices

    async def _place_all(self, job: Job, choices: Sequence[_Choice]) -> bool:
        """As `_place`, in parts between which the event loop turns."""
        if len(choices) == 1:
            return self._place(job, choices)
        part: list[_Choice] = []
        tokens = 0
        for choice in choices:
            part.append(choice)
            tokens += len(job.prompts[choice.index // job.n])
            if tokens > PART_TOKENS:
                if not self._place(job, part):
                    return False
                part, tokens = [], 0
                await asyncio.sleep(0)
        return self._place(job, part)

    def _place(self, job: Job, choices: Sequence[_Choice]) -> bool:
        """Gives every choice that no engine works on to one. False if one must wait: no engine is
        ready, or none may take a suspect now.

        Raises Quarantined for a choice that engines died of, and Overloaded when the model's
        engines are given up.
        """
        key, held = job.model.key, False
        for choice in choices:
            stream = choice.stream
            if not choice.needs_engine:
                continue
            suspect = stream.is_suspect
            if suspect:
                self._check_guilt(job, stream)
                if held:
                    continue
            now = self._clock()
            views = self._fleet.views(key)
            hits = self._prefixes.hits(choice.hashes, now)
            replica = choose(views, hits, self._settings.max_concurrency, suspect=suspect)
            if replica is None:
                if all(view.state in ("parked", "asleep") for view in views):
                    raise self._fleet.unavailable(key)  # given up, or taken away
                if not any(view.ready for view in views):
                    return False
                held = True  # the end of a trial wakes us
                continue
            if not self._fleet.submit(stream, replica, choice.placement):
                return False
            self._prefixes.record(choice.hashes, replica, now)
            if stream.lost:
                self._count_move(job.record, choice)
                stream.reopen()
        return not held

    def _check_guilt(self, job: Job, stream: Stream) -> None:
        """Raises Quarantined if engines died of this stream, or of another one's equal prompt."""
        if stream.suspicion.convicts:
            self._quarantine.add(job.model.key, job.salt, stream.prompt)
        self._check_quarantine(job, [stream.prompt])

    def _check_quarantine(self, job: Job, prompts: Sequence[list[int]]) -> None:
        """Raises Quarantined if one of the prompts is to be refused."""
        for prompt in prompts:
            if self._quarantine.holds(job.model.key, job.salt, prompt):
                self._metrics.quarantined.inc()
                record = job.record
                logs.error("request_quarantined", request_id=record.request_id, model=record.model)
                raise Quarantined

    def _count_move(self, record: RequestRecord, choice: _Choice) -> None:
        record.moves += 1
        self._metrics.migrated.labels(choice.stream.loss).inc()
        if choice.stream.loss == "handed_over":  # that one is the operator's doing
            return
        if choice.count_move() > MAX_MOVES:
            raise Overloaded("The engines keep giving this request back.")

    def _advance_all(self, job: Job, choices: Sequence[_Choice], step: list[Progress]) -> bool:
        """As `_advance`, for several: True if that holds for any of them."""
        changed = False
        for choice in choices:
            changed |= self._advance(job, choice, step)
        return changed

    def _advance(self, job: Job, choice: _Choice, step: list[Progress]) -> bool:
        """Takes what the engine sent for one choice and adds it to `step`.

        True if the choice ended, failed or has no engine. A failure is kept, to be raised once
        `step` was handed out.
        """
        delta = choice.stream.take()
        end = None if delta.lost else delta.finish
        if end is not None and end.reason in ("abort", "error"):
            choice.failure, end = end, None
        if delta.prompt_logprobs is not None:
            choice.prompt_logprobs += delta.prompt_logprobs
        changed = delta.lost or choice.failure is not None
        if not delta.tokens and end is None:
            return changed
        first = None
        now = self._clock()
        if choice.last_s is None:
            choice.first_s = now
            first = First(choice.stream.cached_tokens, choice.prompt_logprobs or None)
            if job.record.ttft_s is None:
                job.record.ttft_s = now - job.record.started_s
                choice.series.ttft_s.observe(job.record.ttft_s)
        elif delta.tokens:
            choice.series.itl_s.observe((now - choice.last_s) / len(delta.tokens))
        choice.last_s = now
        for piece in choice.push(delta, end):
            step.append(Progress(choice.index, piece, first))
            first = None
        if choice.finish is None:
            return changed
        # A matched stop string ends it here, while its engine still works on it.
        self._fleet.close(choice.stream)
        return True

    def _close(self, job: Job, choices: Sequence[_Choice]) -> None:
        for choice in choices:
            self._fleet.close(choice.stream)
        self._account(job, choices)

    def _account(self, job: Job, choices: Sequence[_Choice]) -> None:
        """Sums of the request, for its log line and for the metrics."""
        record = job.record
        record.cached_tokens = sum(c.stream.cached_tokens for c in choices if c.index % job.n == 0)
        record.completion_tokens = sum(choice.num_tokens for choice in choices)
        if job.rules.scan is not None and job.rules.scan.thinking is not None:
            record.reasoning_tokens = sum(choice.num_reasoning_tokens for choice in choices)
        record.finish = "+".join(dict.fromkeys(choice.finish or "none" for choice in choices))
        series = self._metrics.of_model(job.model.name)
        series.e2e_s.observe(self._clock() - record.started_s)
        series.queue_s.observe(record.queue_s or 0.0)
        series.prompt_tokens.inc(record.prompt_tokens)
        series.generation_tokens.inc(record.completion_tokens)
        series.request_prompt_tokens.observe(record.prompt_tokens)
        series.request_generation_tokens.observe(record.completion_tokens)
        series.request_max_tokens.observe(sum(choice.stream.max_new for choice in choices))
        for choice in choices:
            self._metrics.success.labels(job.model.name, choice.finish or "abort").inc()
            if choice.first_s is not None and choice.last_s is not None and choice.num_tokens > 1:
                mean_s = (choice.last_s - choice.first_s) / (choice.num_tokens - 1)
                series.tpot_s.observe(mean_s)

    def _on_replica_change(self, replica: Replica) -> None:
        if replica.state in GONE:
            self._prefixes.forget(replica.index)
        for alarm in self._alarms:  # who waits for an engine looks again
            alarm.event.set()


class _Choice:
    """One choice of a job: its stream, its text, and what an engine must know to run it."""

    def __init__(
        self, job: Job, index: int, stream: Stream, hashes: Sequence[int], series: ModelMetrics
    ) -> None:
        self.index = index
        self.stream = stream
        self.series = series
        self.hashes = hashes  # of the prompt's blocks, for the choice of a replica
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finish: FinishReason | None = None
        self.first_s: float | None = None
        self.last_s: float | None = None  # of the latest tokens
        self.failure: Finish | None = None  # its end, if that is no natural one
        self._moves = 0  # in a row
        self._moved_at = 0  # tokens that it had at the first of those
        self.placement = Placement(
            sampling=msgspec.structs.replace(
                job.sampling,
                seed=choice_seed(job.sampling.seed, index % job.n),
                min_new=min(job.sampling.min_new, stream.max_new),
            ),
            stop_ids=tuple(sorted(job.rules.stop_ids)),
            salt=job.salt,
            priority=job.priority,
            grammar=job.grammar,
        )
        self._text = ChoiceText(job.rules)
        self._prompt_only = job.max_new == 0

    @property
    def needs_engine(self) -> bool:
        """It was never submitted, or its engine is gone."""
        return self.stream.lost or self.stream.submitted_s is None

    def count_move(self) -> int:
        """It was moved: how often in a row, with hardly a token between?"""
        num_tokens = len(self.stream.tokens)
        if num_tokens - self._moved_at >= MOVE_TOKENS:
            self._moves, self._moved_at = 0, num_tokens
        self._moves += 1
        return self._moves

    @property
    def num_tokens(self) -> int:
        """Tokens that count."""
        return self._text.num_tokens

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of them that were thinking."""
        return self._text.num_reasoning_tokens

    def push(self, delta: Delta, end: Finish | None) -> list[Piece]:
        """The next tokens as text, in one to MAX_PIECES pieces."""
        tokens, logprobs = delta.tokens, delta.logprobs
        if self._prompt_only:  # the one token that the engine had to make is nobody's
            self.finish = "length"
            return [Piece("", [], [], "length")]
        if len(tokens) <= 1:
            piece = self._text.push(tokens, logprobs, end)
            self.finish = piece.finish
            return [piece]
        pieces: list[Piece] = []
        size = -(-len(tokens) // MAX_PIECES)
        for at in range(0, len(tokens), size):
            until = at + size
            known = None if logprobs is None else logprobs[at:until]
            piece = self._text.push(tokens[at:until], known, end if until >= len(tokens) else None)
            pieces.append(piece)
            self.finish = piece.finish
            if self.finish is not None:
                break  # tokens behind a stop string do not count
        return pieces


def _raise_failures(job: Job, choices: Sequence[_Choice]) -> None:
    """Raises Overloaded, SlowClient or EngineFailed for an end that is no natural one."""
    for choice in choices:
        end = choice.failure
        if end is None:
            continue
        if end.reason == "abort":
            raise Overloaded(end.detail or "The server is stopping.")
        if end.detail == SLOW_CLIENT:
            raise SlowClient
        logs.error("engine_error", request_id=job.record.request_id, reason=end.detail)
        if end.detail == NO_MEMORY:
            raise InsufficientMemory
        raise EngineFailed


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a prompt's choice: the given one for the first, mixed with its number for others.

    The mixing is the finalizer of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
    number generators", 2014), cut to 63 bits.
    """
    if choice == 0:
        return seed
    mixed = (seed + choice * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
