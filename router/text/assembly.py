"""From the tokens of one choice to its text: detokenizing, stop strings, thinking and tool calls,
log-probability entries.

Owns the text state of one choice. Must not know HTTP, engines or sockets.
The result does not depend on how the tokens were bundled: a streamed answer and a whole one are
the same text, the same entries and the same count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

from engine.protocol import Finish
from router.streams import TokenLogprob
from router.text.detokenizer import Detokenizer
from router.text.scanner import Delta, Scanner, ScanRules, merged
from router.text.stops import StopMatcher, StopStrings

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the tokens of a request become text.

    `pieces[id]` are the bytes shown for each id (special ones are empty where they are hidden);
    `strip_space` drops one space from the start of the text, `strip_lines` all spaces and line
    breaks there; `errors` shows invalid bytes.
    The token that ended a choice by being in `stop_ids` is counted, but is no text (unless
    `include_stop`). `logprobs` says whether entries are wanted. With `scan` the text behind the
    stop strings is taken apart into answer, thinking and tool calls.
    """

    pieces: Sequence[bytes]
    strip_space: bool = False
    strip_lines: bool = False
    errors: str = "replace"
    stops: StopStrings | None = None
    stop_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    logprobs: bool = False
    scan: ScanRules | None = None


class Entry(NamedTuple):
    """One visible token, its log-probabilities, and the characters of the text before it."""

    token: int
    logprob: TokenLogprob
    offset: int


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What some tokens added to a choice. `tokens` are all that count, hidden ones included.

    Where the text is scanned it is told in `deltas`, and `text` is empty. `matched` is the stop
    string that ended it. A struct, as it is made once per token.
    """

    text: str
    tokens: list[int]
    entries: Sequence[Entry]
    finish: FinishReason | None
    deltas: Sequence[Delta] = ()
    matched: str | None = None


class ChoiceText:
    """The text of one choice, as far as it may be shown.

    An entry is shown once the first character of its token is; so nothing of a stop string is ever
    told, and the entries that were shown never have to be taken back.
    """

    def __init__(self, rules: TextRules) -> None:
        self._rules = rules
        self._detokenizer = Detokenizer(
            rules.pieces,
            strip_space=rules.strip_space,
            strip_lines=rules.strip_lines,
            errors=rules.errors,
        )
        self._matcher = StopMatcher(rules.stops) if rules.stops else None
        self._scanner = Scanner(rules.scan) if rules.scan else None
        self._step_by_token = bool(self._matcher or self._scanner or rules.logprobs)
        self._num_produced = 0  # characters out of the detokenizer
        self._num_shown = 0  # characters past the stop matcher
        self._held: deque[Entry] = deque()  # entries whose text is not out yet
        self._shown: list[str] = []  # of the piece in the making
        self._deltas: list[Delta] = []
        self._matched: str | None = None
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish: FinishReason | None = None

    def push(
        self, tokens: list[int], logprobs: list[TokenLogprob] | None, end: Finish | None
    ) -> Piece:
        """The next tokens, and the engine's end of the sequence if it came.

        `end` must be a natural one (`stop` or `length`). After a piece with `finish` set, nothing
        may be pushed any more; tokens behind a matched stop string are dropped and not counted.
        """
        if end is None and not self._step_by_token:  # the usual case
            self.num_tokens += len(tokens)
            return Piece(self._detokenizer.push(tokens), tokens, (), None)
        reason: FinishReason | None = None
        if end is not None:
            reason = "stop" if end.reason == "stop" else "length"
        visible = len(tokens)
        if reason == "stop" and not self._rules.include_stop and visible:
            visible -= tokens[-1] in self._rules.stop_ids
        if self._step_by_token:
            return self._push_each(tokens, visible, logprobs, reason)
        text = self._detokenizer.push(tokens if visible == len(tokens) else tokens[:visible])
        if reason is not None:
            text += self._detokenizer.flush()
            self.finish = reason
        self.num_tokens += len(tokens)
        return Piece(text, tokens, (), reason)

    def _push_each(
        self,
        tokens: list[int],
        visible: int,
        logprobs: list[TokenLogprob] | None,
        reason: FinishReason | None,
    ) -> Piece:
        for i in range(visible):
            if logprobs is not None and self._rules.logprobs:
                self._held.append(Entry(tokens[i], logprobs[i], self._num_produced))
            if self._scanner is not None:
                self.num_reasoning_tokens += self._scanner.in_reasoning
            if self._show(self._detokenizer.push([tokens[i]])):
                self._flush_scanner()
                return self._piece(tokens[: i + 1], "stop")
        if reason is not None:
            if not self._show(self._detokenizer.flush()) and self._matcher is not None:
                self._emit(self._matcher.flush())
            self._flush_scanner()
            return self._piece(tokens, reason, ended_by_engine=self._matched is None)
        return self._piece(tokens, reason)

    def _show(self, text: str) -> bool:
        """Moves text through the stop matcher; True if it ends here."""
        self._num_produced += len(text)
        if self._matcher is None:
            self._emit(text)
        else:
            safe, self._matched = self._matcher.push(text)
            if self._matched is not None and self._rules.include_stop:
                safe += self._matched
            self._emit(safe)
        return self._matched is not None or (self._scanner is not None and self._scanner.done)

    def _emit(self, text: str) -> None:
        self._num_shown += len(text)
        if self._scanner is None:
            self._shown.append(text)
        elif text:
            self._deltas += self._scanner.push(text)

    def _flush_scanner(self) -> None:
        if self._scanner is not None:
            self._deltas += self._scanner.flush()

    def _piece(
        self, tokens: list[int], reason: FinishReason | None, *, ended_by_engine: bool = False
    ) -> Piece:
        entries: list[Entry] = []
        while self._held and (ended_by_engine or self._held[0].offset < self._num_shown):
            entries.append(self._held.popleft())
        self.num_tokens += len(tokens)
        if self._matched is not None or (reason is None and self._scanner and self._scanner.done):
            reason = "stop"
        if reason == "stop" and self._scanner is not None and self._scanner.num_calls:
            reason = "tool_calls"
        self.finish = reason
        text, self._shown = "".join(self._shown), []
        deltas, self._deltas = merged(self._deltas), []
        return Piece(text, tokens, entries, reason, deltas, self._matched)
