"""The life of one request for embeddings: admit, keep engines busy with its texts, gather, release.

Owns nothing that outlives a request. Must not know HTTP, JSON, sockets or text. To engines a text
is a sequence that generates nothing; what is said in `router.flow` about lost engines, permits and
time limits holds here too. Texts go out in order, so many at once that every ready replica has its
next steps at hand, and no more: the rest waits here as packed token ids.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, NamedTuple

from engine.protocol import NO_MEMORY, Pooling, Sampling, unpack_floats, unpack_tokens
from router import logs
from router.admission import Admission, Ask
from router.dispatch import choose
from router.errors import (
    BadRequest,
    EngineFailed,
    InsufficientMemory,
    Overloaded,
    Quarantined,
    RequestTimeout,
)
from router.fleet import Fleet
from router.flow import MAX_MOVES, Placement
from router.metrics import Metrics
from router.quarantine import Quarantine
from router.record import RequestRecord
from router.replica import Replica
from router.streams import Stream, WakeUp
from router.text.served import ServedModel
from router.waiting import Alarm, FlowSettings, hold_permit

WINDOW_TOKENS: Final = 4096  # of one request at once, for each ready replica: some steps' worth
TEXT_TOKENS: Final = 16  # what a text costs beside its tokens, in tokens
BURST: Final = 32  # texts sent before the event loop turns: 1 to 2 ms

_PLACEMENT: Final = Placement(Sampling(), stop_ids=(), salt=b"", priority=0)
_TOKEN_BYTES: Final = 4
_FLOAT_BYTES: Final = 4


class EmbeddingLimits(NamedTuple):
    """What a model's embeddings can be: values of a whole vector, tokens of one text."""

    size: int
    max_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingJob:
    """A request that was wholly checked. `texts` are token ids as the wire has them, none empty.

    `pooling.dimensions` is the number of values of each vector.
    """

    record: RequestRecord
    model: ServedModel
    texts: Sequence[bytes]
    pooling: Pooling
    tenant: bytes = b""


class EmbedFlow:
    """Runs embedding jobs on engines."""

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
        self._alarms: set[Alarm] = set()  # of the requests that run
        fleet.subscribe(self._on_replica_change)

    def limit(self, settings: FlowSettings) -> None:
        """From now on these hold; requests that run keep the time limits they came with."""
        self._settings = settings

    def told_limits(self, model: ServedModel) -> EmbeddingLimits | None:
        """As of now: size 0 if its engines make none, None if none was ready yet."""
        told = [view.limits for view in self._fleet.views(model.key) if view.limits]
        if not told:
            return None
        longest = min(model.max_len, *(limits.max_len for limits in told))
        size = min(limits.embedding_size for limits in told)
        return EmbeddingLimits(size, min(longest, model.pooling.max_len or longest))

    def limits(self, model: ServedModel) -> EmbeddingLimits:
        """Raises BadRequest if its engines make none, Overloaded if none was ready yet."""
        limits = self.told_limits(model)
        if limits is None:
            raise self._fleet.unavailable(model.key)
        if limits.size == 0:
            raise BadRequest(
                f"The model '{model.name}' makes no embeddings; see 'capabilities' in /v1/models.",
                param="model",
                code="unsupported_operation",
            )
        return limits

    async def embed(self, job: EmbeddingJob) -> list[bytes]:
        """The vectors of all texts, in their order, as little-endian float32.

        Raises RequestError; what it held is free again when it ends or is cancelled.
        """
        record, key = job.record, job.model.key
        record.model = job.model.name
        record.texts = len(job.texts)
        record.prompt_tokens = sum(map(len, job.texts)) // _TOKEN_BYTES
        if any(self._quarantine.holds(key, job.tenant, text) for text in job.texts):
            raise self._quarantined(job)
        limits = self._settings.deadlines(record.started_s)
        alarm = Alarm(self._clock, limits.end_s)
        ask = Ask(record.prompt_tokens, job.tenant, embeds=True)
        permit = hold_permit(
            self._fleet, self._admission, self._metrics, job.model, limits.permit_s, ask
        )
        async with permit:
            record.queue_s = self._clock() - record.started_s
            run = _Run(job, self._fleet, alarm.event)
            self._alarms.add(alarm)
            try:
                alarm.start(self._settings.ping_s)
                while not run.done:
                    await self._place(run)
                    await alarm.wait()
                    run.gather()
                    if alarm.expired and not run.done:
                        if not self._fleet.serving_count(key):
                            raise self._fleet.unavailable(key)
                        raise RequestTimeout("The request's time limit has passed.")
            finally:
                alarm.stop()
                self._alarms.discard(alarm)
                run.close()
                self._account(record, run)
            return run.vectors

    async def _place(self, run: _Run) -> None:
        """Gives texts to engines: first those whose engine is lost, then as many as may be out.

        Raises Quarantined for a text that engines died of, and Overloaded when the model's engines
        are given up.
        """
        views = self._fleet.views(run.key)
        if all(view.state in ("parked", "asleep") for view in views):
            raise self._fleet.unavailable(run.key)
        if not any(view.ready for view in views):
            return  # a change of a replica's state will be heard of
        window_tokens = WINDOW_TOKENS * sum(view.ready for view in views)
        texts = chain(run.unplaced(), run.open_while(window_tokens))
        for sent, text in enumerate(texts, 1):
            self._send(run, text)
            if sent % BURST == 0:
                await asyncio.sleep(0)

    def _send(self, run: _Run, text: Stream) -> None:
        """One text to the best replica; it stays unplaced if none may take it."""
        suspect = text.is_suspect
        if suspect:
            self._check_guilt(run, text)
        views = self._fleet.views(run.key)
        replica = choose(views, {}, self._settings.max_concurrency, suspect=suspect)
        if replica is None or not self._fleet.submit(text, replica, _PLACEMENT):
            return  # the end of a trial, or a replica's change, wakes us
        if text.lost:
            run.job.record.moves += 1
            run.moves[text.id] += text.loss != "handed_over"
            self._metrics.migrated.labels(text.loss).inc()
            if run.moves[text.id] > MAX_MOVES:
                raise Overloaded("The engines keep giving this request back.")
            text.reopen()

    def _check_guilt(self, run: _Run, text: Stream) -> None:
        """Raises Quarantined if engines died of this text, or of an equal one."""
        salt = run.job.tenant
        if text.suspicion.convicts:
            self._quarantine.add(run.key, salt, text.prompt)
        if self._quarantine.holds(run.key, salt, text.prompt):
            raise self._quarantined(run.job)

    def _quarantined(self, job: EmbeddingJob) -> Quarantined:
        self._metrics.quarantined.inc()
        record = job.record
        logs.error("request_quarantined", request_id=record.request_id, model=record.model)
        return Quarantined()

    def _account(self, record: RequestRecord, run: _Run) -> None:
        record.finish = "stop" if run.done else "none"
        series = self._metrics.of_model(run.model)
        series.e2e_s.observe(self._clock() - record.started_s)
        series.queue_s.observe(record.queue_s or 0.0)
        series.prompt_tokens.inc(record.prompt_tokens)
        series.request_prompt_tokens.observe(record.prompt_tokens)
        self._metrics.success.labels(run.model, "stop" if run.done else "abort").inc()

    def _on_replica_change(self, _replica: Replica) -> None:
        for alarm in self._alarms:  # who waits for an engine looks again
            alarm.event.set()


class _Run:
    """One job on its way: which texts are out, and the vectors so far."""

    def __init__(self, job: EmbeddingJob, fleet: Fleet, event: WakeUp) -> None:
        self.job = job
        self.model, self.key = job.model.name, job.model.key
        self.vectors = [b""] * len(job.texts)
        self.moves = Counter[int]()
        self._fleet = fleet
        self._event = event
        self._opened = 0  # texts[: _opened] were given a stream
        self._out: dict[int, Stream] = {}  # index of the text -> its stream
        self._out_tokens = 0

    @property
    def done(self) -> bool:
        """All vectors are there."""
        return self._opened == len(self.vectors) and not self._out

    def unplaced(self) -> list[Stream]:
        """Texts out that no engine works on."""
        return [s for s in self._out.values() if s.lost or s.submitted_s is None]

    def open_while(self, window_tokens: int) -> Iterator[Stream]:
        """Streams for the next texts, as long as those out stay within the window.

        A text longer than the window goes alone.
        """
        while self._opened < len(self.vectors):
            tokens = self.job.texts[self._opened]
            out_tokens = self._out_tokens + _cost(tokens)
            if out_tokens > window_tokens and (self._out or not window_tokens):
                return
            stream = self._fleet.open(unpack_tokens(tokens), 0, self._event)
            stream.pooling = self.job.pooling
            stream.request_id = self.job.record.request_id
            self._out[self._opened] = stream
            self._out_tokens = out_tokens
            self._opened += 1
            yield stream

    def gather(self) -> None:
        """Takes the vectors that have come. Raises EngineFailed, or Overloaded if we are cut."""
        ended = [(i, s) for i, s in self._out.items() if s.finish is not None and not s.lost]
        for index, stream in ended:
            self.vectors[index] = self._vector(stream)
            self._fleet.close(stream)
            self._out_tokens -= _cost(self.job.texts[index])
            del self._out[index]

    def _vector(self, stream: Stream) -> bytes:
        finish, vector = stream.finish, stream.embedding
        if finish is not None and finish.reason == "abort":
            raise Overloaded(finish.detail or "The server is stopping.")
        problem = finish.detail if finish is not None and finish.reason == "error" else ""
        if not problem and (vector is None or not _is_vector(vector, self.job.pooling.dimensions)):
            problem = "no embedding of the size asked for, or one with values that are no numbers"
        if problem or vector is None:
            logs.error("engine_error", request_id=stream.request_id, reason=problem)
            if problem == NO_MEMORY:
                raise InsufficientMemory
            raise EngineFailed
        return vector

    def close(self) -> None:
        """Gives up what is still out."""
        for stream in self._out.values():
            self._fleet.close(stream)


def _cost(tokens: bytes) -> int:
    return len(tokens) // _TOKEN_BYTES + TEXT_TOKENS


def _is_vector(values: bytes, size: int) -> bool:
    """So many float32 values, all finite."""
    return len(values) == size * _FLOAT_BYTES and math.isfinite(sum(unpack_floats(values)))
