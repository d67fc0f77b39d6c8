"""The token streams between engines and requests: one coalescing slot and one record each.

Owns the streams, the table id -> Stream, and so the load of each replica (derived, never counted).
Must not know sockets, text or HTTP. The fleet writes
(`append`, `end`), one flow reads (`wait`, `take`); both run on the router's one event loop.
A reader that is slow finds more tokens in its next `take`, up to UNREAD_BYTES of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Final, Literal, NamedTuple

import msgspec

from engine.protocol import (
    BadFrame,
    Finish,
    Limits,
    Logprobs,
    Pooling,
    Stats,
    StepOutput,
    unpack_floats,
    unpack_tokens,
)
from router.blame import NO_SUSPICION

UNREAD_BYTES: Final = 2 * 1024 * 1024  # that may wait for one reader, as the next two count them
TOKEN_BYTES: Final = 40  # a Python int in a list
LOGPROB_BYTES: Final = 120  # one token's or one rival's, as a tuple
SLOW_CLIENT: Final = "slow_client"  # detail of the end of a stream whose reader fell behind

ReplicaState = Literal["starting", "serving", "draining", "hung", "dead", "parked", "asleep"]


# Why an engine works no longer on a stream that goes on: it died, it gave it back, or it was asked
# to (a drain, a restart): that one is nobody's fault.
Loss = Literal["engine_died", "given_back", "handed_over"]


class ReplicaView(NamedTuple):
    """What a choice between replicas may look at: values of one moment."""

    replica: int
    state: ReplicaState
    epoch: int
    inflight_requests: int
    inflight_tokens: int  # prompt and generated tokens of what it works on
    submitted: int  # sequences it was ever given
    limits: Limits | None  # None until it was ready once
    is_behind: bool = False  # frames wait until it reads again
    on_trial: bool = False  # it works on a suspect, see `router.blame`

    @property
    def ready(self) -> bool:
        """May it be given work?"""
        return self.state == "serving" and not self.is_behind


class Casualty(NamedTuple):
    """A sequence that an engine worked on when it died; `silent`: it had given it no token yet."""

    request_id: str
    silent: bool


class Remains(NamedTuple):
    """What is known of an engine's last moments."""

    words: tuple[str, int] | None  # (reason, exit code) that it announced itself
    stats: Stats
    heard_s: float  # its last message, of the monotonic clock
    casualties: tuple[Casualty, ...]


class TokenLogprob(NamedTuple):
    """Log-probability of one token, and of its best rivals as (token id, logprob), best first."""

    logprob: float
    top: list[tuple[int, float]]


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What happened since the last `take`. A struct, as it is made once per token.

    `logprobs` is parallel to `tokens` (None if the engine sent none); `prompt_logprobs[i]` belongs
    to the next prompt token not yet told of, the first one being position 1.
    `lost` says that `finish` is not the sequence's, but that of the engine's work on it: the stream
    may be reopened.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob] | None
    finish: Finish | None
    lost: bool = False


class WakeUp:
    """An event for one waiter, which `wait` clears: any number of `set` before it wakes it once.

    It does what asyncio.Event does with a list of waiters and a clear, at a third of the cost.
    """

    __slots__ = ("_is_set", "_waiter")

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Something changed."""
        if self._is_set:
            return
        self._is_set = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():  # done: it was cancelled
            waiter.set_result(None)

    async def wait(self) -> None:
        """Returns once it is set, at once if it is already."""
        if not self._is_set:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._is_set = False


class Stream:
    """One sequence: its prompt, all tokens so far, and the slot between writer and reader.

    `event` may be shared by the streams of one request; it is set at each change of any of them.
    Times are of the caller's clock, in seconds.
    """

    __slots__ = (
        "_event",
        "_has_logprobs",
        "_logprobs",
        "_num_rivals",
        "_prompt_logprobs",
        "_prompt_taken",
        "_taken",
        "cached_tokens",
        "embedding",
        "finish",
        "first_token_s",
        "given_tokens",
        "id",
        "loss",
        "max_new",
        "pooling",
        "prompt",
        "replica",
        "request_id",
        "submitted_s",
        "suspicion",
        "tokens",
    )

    def __init__(
        self, id: int, prompt: list[int], max_new: int, event: WakeUp | None = None
    ) -> None:
        self.id = id
        self.prompt = prompt
        self.max_new = max_new  # bound of len(tokens)
        self.pooling: Pooling | None = None  # set: it ends with an embedding and has no tokens
        self.embedding: bytes | None = None
        self.tokens: list[int] = []  # all generated tokens: the record for continuation
        self.cached_tokens = 0  # of the prompt, at the first start
        self.replica: int | None = None  # who works on it now
        self.finish: Finish | None = None
        self.loss: Loss | None = None
        self.given_tokens = 0  # of `tokens`, those that its engine was given, not made by it
        self.suspicion = NO_SUSPICION  # of engines' deaths while they worked on it
        self.request_id = ""  # the request's name in logs and crash reports
        self.submitted_s: float | None = None
        self.first_token_s: float | None = None
        self._event = WakeUp() if event is None else event
        self._taken = 0
        self._prompt_taken = 0
        self._has_logprobs = False
        self._num_rivals = 0  # of those in the next one
        self._logprobs: list[TokenLogprob] = []  # not taken yet
        self._prompt_logprobs: list[TokenLogprob] = []

    @property
    def is_suspect(self) -> bool:
        """It may be why an engine died: no other suspect may run beside it."""
        return self.suspicion.lasts(len(self.tokens))

    @property
    def done(self) -> bool:
        """No more tokens will come (unless it is reopened)."""
        return self.finish is not None

    @property
    def unread_bytes(self) -> int:
        """What waits of the answer takes about so much memory.

        The prompt's log-probabilities are not in it: they are bounded by the prompt, and come in
        larger lots than a reader who keeps up can have taken by the next step.
        """
        num_told = len(self._logprobs) + self._num_rivals
        return (len(self.tokens) - self._taken) * TOKEN_BYTES + num_told * LOGPROB_BYTES

    @property
    def lost(self) -> bool:
        """Its engine is gone, it may go on elsewhere."""
        return self.loss is not None

    @property
    def silent(self) -> bool:
        """The engine that works on it, or did last, has given it no token."""
        return len(self.tokens) == self.given_tokens

    def append(self, tokens: list[int], logprobs: list[TokenLogprob] | None = None) -> None:
        """The engine generated `tokens`. Ignored after the end.

        Raises ValueError when log-probabilities do not come with every token or with none.
        """
        if self.finish is not None:
            return
        if logprobs is not None or self._has_logprobs:
            if logprobs is None or len(logprobs) != len(tokens):
                raise ValueError("log-probabilities and tokens do not pair")
            if self.tokens and not self._has_logprobs:
                raise ValueError("log-probabilities begin in the middle")
            self._has_logprobs = True
            self._logprobs += logprobs
            self._num_rivals += sum([len(entry.top) for entry in logprobs])
        self.tokens += tokens
        self._event.set()

    def append_token(self, token: int) -> bool:
        """`append` in its usual case; False, and nothing is done, in any other (also the first)."""
        tokens = self.tokens
        if not tokens or self._has_logprobs or self.finish is not None:
            return False
        if len(tokens) >= self.max_new or self.unread_bytes > UNREAD_BYTES:
            return False
        tokens.append(token)
        self._event.set()
        return True

    def append_prompt_logprobs(self, start: int, logprobs: list[TokenLogprob]) -> None:
        """Log-probabilities of prompt positions from `start` on; those known already are skipped.

        A continued stream computes its prompt again on another engine, hence the skipping.
        """
        known = 1 + self._prompt_taken + len(self._prompt_logprobs)
        if self.finish is None and start <= known:
            self._prompt_logprobs += logprobs[known - start :]
            self._event.set()

    def end(self, finish: Finish, *, loss: Loss | None = None) -> None:
        """The one end; a second one is ignored. With `loss` it may be reopened elsewhere."""
        if self.finish is not None:
            return
        self.finish = finish
        self.loss = loss
        self._event.set()

    def reopen(self) -> None:
        """To be continued on another engine. Raises ValueError if the stream is not lost."""
        if not self.lost:
            raise ValueError(f"stream {self.id} is not lost")
        self.finish = None
        self.loss = None

    def wake(self) -> None:
        """Its reader looks again, though nothing came."""
        self._event.set()

    async def wait(self) -> None:
        """Returns after a change. It may also return without one: `take` then gives no tokens."""
        await self._event.wait()

    def take(self) -> Delta:
        """Everything since the last call."""
        tokens = self.tokens[self._taken :]
        self._taken += len(tokens)
        logprobs = told = None
        if self._has_logprobs:
            logprobs, self._logprobs = self._logprobs, []
        if self._prompt_logprobs:
            told, self._prompt_logprobs = self._prompt_logprobs, []
            self._prompt_taken += len(told)
        self._num_rivals = 0
        return Delta(tokens, logprobs, told, self.finish, self.lost)


class StreamTable:
    """All open streams by id, and which replica works on which.

    Ids are positive, rise, and are never used twice.
    """

    def __init__(self) -> None:
        self._last_id = 0
        self._streams: dict[int, Stream] = {}
        self._of_replica: dict[int, dict[int, Stream]] = {}
        self._on_trial: dict[int, Stream] = {}  # by replica: the suspect it was given last

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams.values()))

    def open(self, prompt: list[int], max_new: int, event: WakeUp | None = None) -> Stream:
        """A new stream; its owner must `close` it."""
        self._last_id += 1
        stream = Stream(self._last_id, prompt, max_new, event)
        self._streams[stream.id] = stream
        return stream

    def close(self, stream: Stream) -> None:
        """Forget it: later messages about it are ignored. May be called twice."""
        self.release(stream)
        self._streams.pop(stream.id, None)

    def assign(self, stream: Stream, replica: int) -> None:
        """`replica` works on it from now on."""
        self.release(stream)
        stream.replica = replica
        stream.given_tokens = len(stream.tokens)
        self._of_replica.setdefault(replica, {})[stream.id] = stream
        if stream.is_suspect:
            self._on_trial[replica] = stream

    def release(self, stream: Stream) -> None:
        """No replica works on it any more."""
        replica = stream.replica
        if replica is not None:
            self._of_replica[replica].pop(stream.id, None)
            stream.replica = None
            self.check_trial(replica)

    def take_away(self, replica: int, detail: str, loss: Loss) -> list[Stream]:
        """All that `replica` works on, ended as lost, to go on elsewhere."""
        streams = list(self.of_replica(replica).values())
        for stream in streams:
            self.release(stream)
            stream.end(Finish(stream.id, "error", detail), loss=loss)
        return streams

    def wake_unplaced(self) -> None:
        """Whoever waits for a replica looks again."""
        for stream in self._streams.values():
            if stream.replica is None:
                stream.wake()

    def load(self, replica: int) -> tuple[int, int]:
        """(sequences, tokens) that `replica` works on."""
        streams = self._of_replica.get(replica, {}).values()
        return len(streams), sum(len(s.prompt) + len(s.tokens) for s in streams)

    def on_trial(self, replica: int) -> bool:
        """Does it work on a suspect?"""
        suspect = self._on_trial.get(replica)
        return suspect is not None and suspect.is_suspect

    def check_trial(self, replica: int) -> None:
        """`replica` got on: where that ends a trial, suspects that wait for theirs look again."""
        suspect = self._on_trial.get(replica)
        if suspect is not None and (suspect.replica != replica or not suspect.is_suspect):
            del self._on_trial[replica]
            self.wake_unplaced()

    def of_replica(self, replica: int) -> dict[int, Stream]:
        """The streams `replica` works on, by id. A live view: do not change it."""
        return self._of_replica.setdefault(replica, {})


def deliver(
    message: StepOutput, streams: Mapping[int, Stream], vocab_size: int, now: float
) -> list[tuple[Stream, str]]:
    """Append one step's tokens to the streams they belong to; ids that are not there are ignored.

    Returns the streams that got something impossible, with the reason, and with SLOW_CLIENT those
    whose reader has too much to read already; they got no token. Ends
    (`message.finished`) are the caller's. Raises BadFrame, with no stream changed, if the columns
    do not fit together. Cost: one append and one wake-up per sequence, no object per token.
    """
    tokens = unpack_tokens(message.tokens)
    counts = message.counts or (1,) * len(message.ids)
    if len(counts) != len(message.ids) or sum(counts) != len(tokens) or min(counts, default=0) < 0:
        raise BadFrame("columns of different length")
    logprobs = {entry.id: _unpack_logprobs(entry) for entry in message.logprobs}
    _deliver_prompts(message, streams)
    unusual: list[tuple[int, list[int]]] = []
    if message.counts or logprobs or not _in_vocabulary(tokens, vocab_size):
        ends = list(accumulate(counts))
        parts = [tokens[end - count : end] for end, count in zip(ends, counts, strict=True)]
        unusual += zip(message.ids, parts, strict=True)
    else:
        for id_, token in zip(message.ids, tokens, strict=True):
            stream = streams.get(id_)
            if stream is not None and not stream.append_token(token):
                unusual.append((id_, [token]))
    failures: list[tuple[Stream, str]] = []
    for id_, new in unusual:
        stream = streams.get(id_)
        if stream is not None and new:
            reason = _append(stream, new, logprobs.get(id_), vocab_size, now)
            if reason:
                failures.append((stream, reason))
    return failures


def _append(
    stream: Stream,
    tokens: list[int],
    logprobs: list[TokenLogprob] | None,
    vocab_size: int,
    now: float,
) -> str:
    """Appends after all checks; returns why not, if not."""
    if not _in_vocabulary(tokens, vocab_size):
        return "the engine sent a token id outside the vocabulary"
    if len(stream.tokens) + len(tokens) > stream.max_new:
        return "the engine sent more tokens than were asked for"
    if stream.unread_bytes > UNREAD_BYTES and not stream.done:
        return SLOW_CLIENT
    if stream.first_token_s is None:
        stream.first_token_s = now
    try:
        stream.append(tokens, logprobs)
    except ValueError as error:
        return str(error)
    return ""


def _deliver_prompts(message: StepOutput, streams: Mapping[int, Stream]) -> None:
    """What one step says of prompts: started, log-probabilities, embeddings."""
    told = [(entry, _unpack_logprobs(entry)) for entry in message.prompt_logprobs]
    for started in message.started:
        if (stream := streams.get(started.id)) is not None and not stream.tokens:
            stream.cached_tokens = started.cached
    for entry, values in told:
        if (stream := streams.get(entry.id)) is not None:
            stream.append_prompt_logprobs(entry.start, values)
    for embedding in message.embeddings:
        if (stream := streams.get(embedding.id)) is not None:
            stream.embedding = embedding.values  # its end, in the same message, wakes the reader


def _in_vocabulary(tokens: list[int], vocab_size: int) -> bool:
    return not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size)


def _unpack_logprobs(entry: Logprobs) -> list[TokenLogprob]:
    chosen = unpack_floats(entry.chosen)
    top_ids = unpack_tokens(entry.top_ids)
    top = unpack_floats(entry.top)
    if len(top_ids) != len(top) or (top and (not chosen or len(top) % len(chosen))):
        raise BadFrame("log-probability columns of different length")
    k = len(top) // len(chosen) if top else 0
    rivals = list(zip(top_ids, top, strict=True))
    return [TokenLogprob(value, rivals[i * k : i * k + k]) for i, value in enumerate(chosen)]
