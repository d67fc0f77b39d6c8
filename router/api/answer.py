"""One generation as one HTTP answer, streamed or whole.

Owns the order of events (api policy P8) and the counting of usage. Must not know how the JSON of a
route looks (that is its `AnswerForm` or `StreamForm`) nor how tokens are made. Errors pass through:
the boundary around all routes answers them, before or after the headers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
from starlette.types import Send

from router.api.http import send_bytes, send_json
from router.api.sse import DONE, PING, ChunkTemplate, EventStream
from router.flow import First, Job, Progress
from router.record import RequestRecord
from router.text.assembly import Entry, FinishReason
from router.text.scanner import Delta

LOOP_ITEMS: Final = 5000  # of an answer that is written on the event loop: 10 ms


class AnswerForm(Protocol):
    """The JSON of one route for one request, where a stream is made of OpenAI's chunks."""

    def chunks(self, *, include_usage: bool) -> ChunkTemplate:
        """The template of its stream."""
        ...

    def opening(self, index: int, /) -> dict[str, Any] | None:
        """The choice of the chunk that opens choice `index` at once, if there is one."""
        ...

    def first(self, index: int, first: First, /) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The chunk before the first generated text, if there is one: its choice, and further
        members of the chunk itself."""
        ...

    @property
    def tells_tokens(self) -> bool:
        """False if a progress without log-probabilities has nothing to tell but text."""
        ...

    def told(self, progress: Progress) -> list[dict[str, Any]]:
        """The choices of the chunks that tell more than text, in order; no finish reason yet."""
        ...

    def last(self, index: int, finish: FinishReason) -> dict[str, Any]:
        """The choice of a choice's last chunk."""
        ...

    def whole(self, choices: list[WholeChoice], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        ...


class StreamForm(Protocol):
    """The bytes of one route's stream for one request: whole events, an empty text for none."""

    ping: bytes

    def opening(self) -> bytes:
        """Sent with the headers, once every choice is placed on an engine."""
        ...

    def step(self, step: list[Progress]) -> bytes:
        """What one step tells."""
        ...

    def closing(self) -> bytes:
        """The last events; the request's record has its sums by now."""
        ...


@dataclass(slots=True)
class WholeCall:
    """One tool call, gathered."""

    id: str
    name: str
    arguments: str = ""


class WholeChoice:
    """One choice, gathered."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.first = First(0, None)
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[WholeCall] = []
        self.tokens: list[int] = []
        self.entries: list[Entry] = []
        self.finish: FinishReason | None = None
        self.matched: str | None = None  # the stop string that ended it

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        """Of its visible tokens; what `best_of` goes by."""
        values = [entry.logprob.logprob for entry in self.entries]
        return sum(values) / len(values) if values else -math.inf

    def add(self, progress: Progress) -> None:
        """Takes in one step."""
        if progress.first is not None:
            self.first = progress.first
        piece = progress.piece
        self.texts.append(piece.text)
        for delta in piece.deltas:
            self._add_delta(delta)
        self.tokens += piece.tokens
        self.entries += piece.entries
        self.finish = piece.finish
        self.matched = piece.matched

    def _add_delta(self, delta: Delta) -> None:
        match delta.kind:
            case "content":
                self.texts.append(delta.text)
            case "reasoning":
                self.reasoning.append(delta.text)
            case "call":
                self.calls.append(WholeCall(delta.id, delta.name))
            case "arguments":
                self.calls[delta.index].arguments += delta.text


def usage_of(record: RequestRecord) -> dict[str, Any]:
    """OpenAI's usage object of a generation that is over.

    A prompt counts once, however many choices it has; hidden end tokens count.
    """
    usage: dict[str, Any] = {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }
    if record.reasoning_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": record.reasoning_tokens}
    return usage


async def gather(steps: AsyncGenerator[list[Progress], None], job: Job) -> list[WholeChoice]:
    """Runs the generation to its end. Of more choices than asked for, the likeliest are kept."""
    choices = [WholeChoice(index) for index in range(job.num_choices)]
    async with aclosing(steps):
        async for step in steps:
            for progress in step:
                choices[progress.choice].add(progress)
    return _best(choices, job) if 0 < job.keep < job.n else choices


def _best(choices: list[WholeChoice], job: Job) -> list[WholeChoice]:
    kept: list[WholeChoice] = []
    for start in range(0, len(choices), job.n):
        of_prompt = choices[start : start + job.n]
        of_prompt.sort(key=lambda choice: choice.mean_logprob, reverse=True)
        kept += of_prompt[: job.keep]
    return kept


async def answer_whole(
    send: Send, steps: AsyncGenerator[list[Progress], None], job: Job, form: AnswerForm
) -> None:
    """Runs the generation to its end, then sends one JSON body."""
    choices = await gather(steps, job)
    usage = usage_of(job.record)

    def written() -> bytes:
        return msgspec.json.encode(form.whole(choices, usage))

    is_long = sum(map(_num_items, choices)) > LOOP_ITEMS
    body = await asyncio.to_thread(written) if is_long else written()
    await send_bytes(send, body, b"application/json")


def _num_items(choice: WholeChoice) -> int:
    """About how many numbers and names the JSON of a choice holds."""
    told = choice.first.prompt_logprobs or []
    rivals = max((len(each.top) for each in told[:1]), default=0)
    rivals = max((len(each.logprob.top) for each in choice.entries[:1]), default=rivals)
    return len(choice.tokens) + (len(choice.entries) + len(told)) * (1 + rivals)


class GatheringForm(Protocol):
    """The JSON of one route for one request, where streamed and whole answers grow alike."""

    def take(self, step: list[Progress], /) -> object:
        """Takes in one step."""
        ...

    def whole(self) -> dict[str, Any]:
        """The whole answer, once every step was taken in."""
        ...


async def answer_gathered(
    send: Send, steps: AsyncGenerator[list[Progress], None], form: GatheringForm
) -> None:
    """As `answer_whole`, for a form that gathers by itself."""
    async with aclosing(steps):
        async for step in steps:
            form.take(step)
    await send_json(send, form.whole())


async def answer_stream(
    send: Send, steps: AsyncGenerator[list[Progress], None], job: Job, form: StreamForm
) -> None:
    """Sends events as tokens come, one write per step; the last step's go out with the closing.

    The headers go out once the request is placed on an engine, or has waited for that so long that
    it must be told (a failure is an event from then on); steps without news become comments, so
    that no proxy takes a queue or a long prefill for a dead line.
    """
    events = EventStream(send)
    num_running = job.num_choices
    started = False
    last = b""
    async with aclosing(steps):
        async for step in steps:
            if not started:
                started = True
                await events.open()
                await events.write(form.opening() or form.ping)
            elif not step:
                await events.write(form.ping)
            data = form.step(step)
            for progress in step:
                num_running -= progress.piece.finish is not None
            if not num_running:
                last = data
            elif data:
                await events.write(data)
    await events.close(last + form.closing())


class ChunkStream:
    """A stream of OpenAI's chunks: role, text, one finish per choice, usage, `[DONE]`."""

    ping = PING

    def __init__(self, form: AnswerForm, job: Job, *, include_usage: bool) -> None:
        self._form = form
        self._job = job
        self._include_usage = include_usage
        self._chunks = form.chunks(include_usage=include_usage)
        self._tells_tokens = form.tells_tokens

    def opening(self) -> bytes:
        """The chunks that open the choices."""
        openings = [self._form.opening(index) for index in range(self._job.num_choices)]
        return b"".join([self._chunks.choice(choice) for choice in openings if choice is not None])

    def step(self, step: list[Progress]) -> bytes:
        """One chunk a choice, where it has nothing to tell but text."""
        chunks = self._chunks
        data: list[bytes] = []
        for progress in step:
            piece = progress.piece
            if (
                self._tells_tokens
                or piece.entries
                or piece.deltas
                or piece.finish
                or progress.first is not None
            ):
                data += self._events(progress)
            elif piece.text:  # the usual case
                data.append(chunks.text(progress.choice, piece.text))
        return data[0] if len(data) == 1 else b"".join(data)

    def closing(self) -> bytes:
        """The usage, if it is wanted, and the end mark."""
        if not self._include_usage:
            return DONE
        return self._chunks.usage(usage_of(self._job.record)) + DONE

    def _events(self, progress: Progress) -> list[bytes]:
        form, chunks, piece = self._form, self._chunks, progress.piece
        parts: list[bytes] = []
        if progress.first is not None:
            before = form.first(progress.choice, progress.first)
            if before is not None:
                parts.append(chunks.choice(*before))
        if self._tells_tokens or piece.entries or piece.deltas:
            parts += map(chunks.choice, form.told(progress))
        elif piece.text:
            parts.append(chunks.text(progress.choice, piece.text))
        if piece.finish is not None:
            parts.append(chunks.choice(form.last(progress.choice, piece.finish)))
        return parts
