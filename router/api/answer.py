"""One generation as one HTTP answer, streamed or whole.

Owns the order of events (api policy P8) and the counting of usage. Must not know how the JSON of a
route looks (that is its `AnswerForm`) nor how tokens are made. Errors pass through: the boundary
around all routes answers them, before or after the headers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from starlette.types import Send

from router.api.http import send_json
from router.api.sse import DONE, PING, ChunkTemplate, EventStream
from router.flow import First, Job, Progress, RequestRecord
from router.text.assembly import Entry, FinishReason


class AnswerForm(Protocol):
    """The JSON of one route for one request."""

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

    def chunk(self, progress: Progress) -> dict[str, Any]:
        """The choice of a chunk that tells more than text; no finish reason yet."""
        ...

    def last(self, index: int, finish: FinishReason) -> dict[str, Any]:
        """The choice of a choice's last chunk."""
        ...

    def whole(self, choices: list[WholeChoice], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        ...


class WholeChoice:
    """One choice, gathered."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.first = First(0, None)
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.entries: list[Entry] = []
        self.finish: FinishReason | None = None

    def add(self, progress: Progress) -> None:
        """Takes in one step."""
        if progress.first is not None:
            self.first = progress.first
        piece = progress.piece
        self.texts.append(piece.text)
        self.tokens += piece.tokens
        self.entries += piece.entries
        self.finish = piece.finish


def usage_of(record: RequestRecord) -> dict[str, Any]:
    """OpenAI's usage object of a generation that is over.

    A prompt counts once, however many choices it has; hidden end tokens count.
    """
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }


async def answer_whole(
    send: Send, steps: AsyncGenerator[list[Progress], None], job: Job, form: AnswerForm
) -> None:
    """Runs the generation to its end, then sends one JSON body."""
    choices = [WholeChoice(index) for index in range(job.num_choices)]
    async with aclosing(steps):
        async for step in steps:
            for progress in step:
                choices[progress.choice].add(progress)
    await send_json(send, form.whole(choices, usage_of(job.record)))


async def answer_stream(
    send: Send,
    steps: AsyncGenerator[list[Progress], None],
    job: Job,
    form: AnswerForm,
    *,
    include_usage: bool,
) -> None:
    """Sends events as tokens come, one write per step; the last step's go out with `[DONE]`.

    The headers go out once the request is placed on an engine; steps without news become comments,
    so that no proxy takes a long prefill for a dead line.
    """
    events = EventStream(send)
    chunks = form.chunks(include_usage=include_usage)
    tells_tokens = form.tells_tokens
    num_running = job.num_choices
    started = False
    last: list[bytes] = []
    async with aclosing(steps):
        async for step in steps:
            if not started:
                started = True
                await events.open()
                await events.write(_openings(chunks, form, job) or PING)
            elif not step:
                await events.write(PING)
            data: list[bytes] = []
            for progress in step:
                piece = progress.piece
                if tells_tokens or piece.entries or piece.finish or progress.first is not None:
                    data += _events(chunks, form, progress)
                    num_running -= piece.finish is not None
                elif piece.text:  # the usual case
                    data.append(chunks.text(progress.choice, piece.text))
            if not num_running:
                last = data
            elif data:
                await events.write(data[0] if len(data) == 1 else b"".join(data))
    if include_usage:
        last.append(chunks.usage(usage_of(job.record)))
    await events.close(b"".join([*last, DONE]))


def _openings(chunks: ChunkTemplate, form: AnswerForm, job: Job) -> bytes:
    openings = [form.opening(index) for index in range(job.num_choices)]
    return b"".join([chunks.choice(choice) for choice in openings if choice is not None])


def _events(chunks: ChunkTemplate, form: AnswerForm, progress: Progress) -> list[bytes]:
    piece = progress.piece
    parts: list[bytes] = []
    if progress.first is not None:
        before = form.first(progress.choice, progress.first)
        if before is not None:
            parts.append(chunks.choice(*before))
    if form.tells_tokens or piece.entries:
        parts.append(chunks.choice(form.chunk(progress)))
    elif piece.text:
        parts.append(chunks.text(progress.choice, piece.text))
    if piece.finish is not None:
        parts.append(chunks.choice(form.last(progress.choice, piece.finish)))
    return parts
