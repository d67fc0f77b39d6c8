"""What a scheduler has not told the router yet, in the columns of `StepOutput`.

Owns the columns of one message. Must not know queues, blocks or why something is told.
"""

from __future__ import annotations

from engine.plan import TokenLogprobs
from engine.protocol import (
    Embedding,
    Finish,
    FinishReason,
    Logprobs,
    Started,
    Stats,
    StepOutput,
    pack_floats,
    pack_tokens,
)


class Outbox:
    """One message in the making; `news` says whether there is anything to send."""

    __slots__ = (
        "embeddings",
        "finished",
        "ids",
        "logprobs",
        "news",
        "prompt_logprobs",
        "started",
        "tokens",
    )

    def __init__(self) -> None:
        self.ids: list[int] = []  # one entry per token
        self.tokens: list[int] = []
        self.finished: list[Finish] = []
        self.started: list[Started] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.embeddings: list[Embedding] = []
        self.news = False  # a step without tokens is news too: it shows progress

    def finish(self, sequence_id: int, reason: FinishReason, detail: str = "") -> None:
        """The end of a sequence."""
        self.finished.append(Finish(sequence_id, reason, detail))
        self.news = True

    def start(self, sequence_id: int, cached: int) -> None:
        """A sequence left the waiting queue, `cached` tokens of it need not be computed."""
        self.started.append(Started(sequence_id, cached))
        self.news = True

    def message(self, epoch: int, step: int, stats: Stats) -> StepOutput:
        """All of it."""
        return StepOutput(
            epoch=epoch,
            step=step,
            ids=tuple(self.ids),
            counts=(),
            tokens=pack_tokens(self.tokens),
            finished=tuple(self.finished),
            stats=stats,
            started=tuple(self.started),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            embeddings=tuple(self.embeddings),
        )


def logprobs_of(sequence_id: int, start: int, values: TokenLogprobs) -> Logprobs:
    """`values` of the tokens from position `start` on, as they are sent."""
    rivals = [rival for best in values.top for rival in best]
    return Logprobs(
        sequence_id,
        start,
        pack_floats(values.chosen),
        pack_tokens(token for token, _value in rivals),
        pack_floats(value for _token, value in rivals),
    )
