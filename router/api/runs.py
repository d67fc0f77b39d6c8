"""An answer as the runs it is made of: thinking, text, calls, in the order in which they came.

Owns where one run ends and the next begins; both the streamed and the whole answers of
/v1/responses and /v1/messages are made of it, so they cannot differ. Must not know their JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from router.text.assembly import Entry, FinishReason, Piece
from router.text.scanner import Delta

RunKind = Literal["content", "reasoning", "call"]


@dataclass(slots=True)
class Run:
    """A stretch of the answer that is all of one kind; `id` and `name` are a call's."""

    index: int
    kind: RunKind
    id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list[str])
    entries: list[Entry] = field(default_factory=list[Entry])
    over: bool = False
    cut: bool = False  # the token limit ended it

    @property
    def text(self) -> str:
        """All of it; the arguments of a call."""
        return "".join(self.parts)


class Change(NamedTuple):
    """A run begins, grows by `text` or ends."""

    what: Literal["opens", "grows", "ends"]
    run: Run
    text: str = ""
    entries: tuple[Entry, ...] = ()


class Runs:
    """Takes the pieces of one choice. After the one with a finish reason all runs are over."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.finish: FinishReason | None = None
        self.matched: str | None = None  # the stop string that ended it

    def push(self, piece: Piece) -> list[Change]:
        """What the piece changes, in order.

        Log-probabilities go to the first text of their piece; those of thinking are not kept.
        """
        changes: list[Change] = []
        entries = tuple(piece.entries)
        if piece.text:
            self._grow(changes, "content", piece.text, entries)
        for delta in piece.deltas:
            if delta.kind == "call":
                self._open(changes, "call", delta)
            elif delta.kind == "arguments":
                self._grow(changes, "call", delta.text)
            else:
                is_text = delta.kind == "content"
                self._grow(changes, delta.kind, delta.text, entries if is_text else ())
                entries = () if is_text else entries
        if piece.finish is not None:
            self.finish, self.matched = piece.finish, piece.matched
            if not self.runs:  # an answer of no words is still an answer
                self._open(changes, "content")
            self._end(changes)
        return changes

    def _grow(
        self, changes: list[Change], kind: RunKind, text: str, entries: tuple[Entry, ...] = ()
    ) -> None:
        if not text:
            return
        run = self._current
        if run is None or run.kind != kind:
            run = self._open(changes, kind)
        run.parts.append(text)
        run.entries += entries
        changes.append(Change("grows", run, text, entries))

    def _open(self, changes: list[Change], kind: RunKind, call: Delta | None = None) -> Run:
        self._end(changes)
        run = Run(len(self.runs), kind)
        if call is not None:
            run.id, run.name = call.id, call.name
        self.runs.append(run)
        changes.append(Change("opens", run))
        return run

    def _end(self, changes: list[Change]) -> None:
        run = self._current
        if run is None:
            return
        run.cut = self.finish == "length"
        if run.kind == "call" and not run.cut and not run.text.strip():
            self._grow(changes, "call", "{}")  # clients parse the arguments of every whole call
        run.over = True
        changes.append(Change("ends", run))

    @property
    def _current(self) -> Run | None:
        return self.runs[-1] if self.runs and not self.runs[-1].over else None
