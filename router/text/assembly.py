"""From the tokens of one choice to its text: detokenizing, stop strings, log-probability entries.

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
from router.text.stops import StopMatcher, StopStrings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the tokens of a request become text.

    `pieces[id]` are the bytes shown for each id (special ones are empty where they are hidden);
    `strip_space` drops one space from the start of the text, `strip_lines` all spaces and line
    breaks there; `errors` shows invalid bytes.
    The token that ended a choice by being in `stop_ids` is counted, but is no text (unless
    `include_stop`). `logprobs` says whether entries are wanted.
    """

    pieces: Sequence[bytes]
    strip_space: bool = False
    strip_lines: bool = False
    errors: str = "replace"
    stops: StopStrings | None = None
    stop_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    logprobs: bool = False


class Entry(NamedTuple):
    """One visible token, its log-probabilities, and the characters of the text before it."""

    token: int
    logprob: TokenLogprob
    offset: int


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What some tokens added to a choice. `tokens` are all that count, hidden ones included.

    A struct, as it is made once per token.
    """

    text: str
    tokens: list[int]
    entries: Sequence[Entry]
    finish: FinishReason | None


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
        self._step_by_token = self._matcher is not None or rules.logprobs
        self._num_produced = 0  # characters out of the detokenizer
        self._num_shown = 0  # characters past the stop matcher
        self._held: deque[Entry] = deque()  # entries whose text is not out yet
        self.num_tokens = 0
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
        shown: list[str] = []
        for i in range(visible):
            if logprobs is not None and self._rules.logprobs:
                self._held.append(Entry(tokens[i], logprobs[i], self._num_produced))
            if self._show(self._detokenizer.push([tokens[i]]), shown):
                return self._piece(shown, tokens[: i + 1], "stop")
        if reason is not None:
            if self._show(self._detokenizer.flush(), shown):
                return self._piece(shown, tokens, "stop")
            if self._matcher is not None:
                rest = self._matcher.flush()
                self._num_shown += len(rest)
                shown.append(rest)
        return self._piece(shown, tokens, reason, ended_by_engine=reason is not None)

    def _show(self, text: str, shown: list[str]) -> bool:
        """Moves text through the stop matcher into `shown`; True if a stop string is complete."""
        self._num_produced += len(text)
        if self._matcher is None:
            self._num_shown += len(text)
            shown.append(text)
            return False
        safe, matched = self._matcher.push(text)
        if matched is not None and self._rules.include_stop:
            safe += matched
        self._num_shown += len(safe)
        shown.append(safe)
        return matched is not None

    def _piece(
        self,
        shown: list[str],
        tokens: list[int],
        reason: FinishReason | None,
        *,
        ended_by_engine: bool = False,
    ) -> Piece:
        entries: list[Entry] = []
        while self._held and (ended_by_engine or self._held[0].offset < self._num_shown):
            entries.append(self._held.popleft())
        self.num_tokens += len(tokens)
        self.finish = reason
        return Piece("".join(shown), tokens, entries, reason)
