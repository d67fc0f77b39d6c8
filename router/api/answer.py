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
from router.flow import First, Job, Progress
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

    def is_plain(self, progress: Progress) -> bool:
        """True if text is all that this progress has to tell."""
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


class Usage:
    """Token counts of one request: a prompt counts once, however many choices it has."""

    def __init__(self, job: Job) -> None:
        self._prompt_tokens = sum(len(prompt) for prompt in job.prompts)
        self._n = job.n
        self._cached_tokens = 0
        self._completion_tokens = 0

    def add(self, progress: Progress) -> None:
        """Counts the tokens of one step, hidden end tokens included."""
        self._completion_tokens += len(progress.piece.tokens)
        if progress.first is not None and progress.choice % self._n == 0:
            self._cached_tokens += progress.first.cached_tokens

    def value(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


async def answer_whole(
    send: Send, steps: AsyncGenerator[list[Progress], None], job: Job, form: AnswerForm
) -> None:
    """Runs the generation to its end, then sends one JSON body."""
    choices = [WholeChoice(index) for index in range(job.num_choices)]
    usage = Usage(job)
    async with aclosing(steps):
        async for step in steps:
            for progress in step:
                usage.add(progress)
                choices[progress.choice].add(progress)
    await send_json(send, form.whole(choices, usage.value()))


async def answer_stream(
    send: Send,
    steps: AsyncGenerator[list[Progress], None],
    job: Job,
    form: AnswerForm,
    *,
    include_usage: bool,
) -> None:
    """Sends events as tokens come, one write per step.

    The headers go out once the request is placed on an engine; steps without news become comments,
    so that no proxy takes a long prefill for a dead line.
    """
    events = EventStream(send)
    chunks = form.chunks(include_usage=include_usage)
    usage = Usage(job)
    started = False
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
                usage.add(progress)
                data += _events(chunks, form, progress)
            if data:
                await events.write(b"".join(data))
    await events.close((chunks.usage(usage.value()) if include_usage else b"") + DONE)


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
    if form.is_plain(progress):
        if piece.text:
            parts.append(chunks.text(progress.choice, piece.text))
    else:
        parts.append(chunks.choice(form.chunk(progress)))
    if piece.finish is not None:
        parts.append(chunks.choice(form.last(progress.choice, piece.finish)))
    return parts
