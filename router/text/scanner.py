"""From a model's text to what a client gets: content, thinking, tool calls.

Owns what is being read of one choice's text: `Scanner` is fed the text in slices of any size, and
what comes out, joined, never depends on them. Whole answers are fed at once, streams as they come:
there is no second parser. Must not know tokens, requests or JSON of a route; how a model writes its
calls is a `CallSyntax` (see `router.text.call_syntax`).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final, Literal, Protocol

import msgspec

from router.text.window import WHITE, CallSink, Reading, Window

DeltaKind = Literal["content", "reasoning", "call", "arguments"]


class Delta(msgspec.Struct, frozen=True, gc=False):
    """A piece of an answer.

    `call` opens call `index` (from 0) and brings its `id` and `name`, without text; `arguments` is
    a piece of the JSON text of that call's arguments.
    """

    kind: DeltaKind
    text: str
    index: int = 0
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class ThinkingRule:
    """How a model marks its thinking. `starts_open`: the prompt has opened it already.

    Without `show` thinking is left out; it never becomes content.
    """

    open: str = "<think>"
    close: str = "</think>"
    starts_open: bool = False
    show: bool = True


class CallSyntax(Protocol):
    """How a family of models writes calls.

    `marks` open calls, wherever they stand. `turns` separate parts of an answer, each of which may
    be a call; they are never shown. `words` are all that it looks for and that may be control
    tokens. `bare`: a call without a mark may stand at the start of the answer or of a part.
    """

    marks: ClassVar[tuple[str, ...]]
    turns: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    bare: ClassVar[bool]

    def read(self, sink: CallSink, mark: str) -> Reading[bool]:
        """Reads the calls behind `mark` ("" for a bare one); False if there was none."""
        ...


def new_call_id() -> str:
    """As OpenAI's look."""
    return "call_" + secrets.token_hex(12)


@dataclass(frozen=True)
class ScanRules:
    """What is looked for in an answer. Without `syntax` there are no calls.

    A call of a tool that is not in `names` is content. `texts` are the (tool, argument) whose
    values are texts, for syntaxes that do not quote. Without `parallel` the first call is the last.
    """

    thinking: ThinkingRule | None = None
    syntax: CallSyntax | None = None
    names: frozenset[str] = frozenset()
    texts: frozenset[tuple[str, str]] = frozenset()
    parallel: bool = True
    new_id: Callable[[], str] = new_call_id

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """Everything that ends a run of content."""
        marks = () if self.syntax is None else (*self.syntax.marks, *self.syntax.turns)
        return marks if self.thinking is None else (self.thinking.open, *marks)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds the first of `marks`."""
        return re.compile("|".join(map(re.escape, self.marks)) or r"(?!)")

    @cached_property
    def notable(self) -> re.Pattern[str]:
        """Finds what could begin a mark, and white space at the end."""
        marks = self.marks if self.thinking is None else (*self.marks, self.thinking.close)
        firsts = "".join(re.escape(mark[0]) for mark in marks)
        return re.compile(rf"[{firsts}]|[{WHITE}]\Z" if firsts else rf"[{WHITE}]\Z")


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbours of one kind and index joined."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if last is not None and delta.kind == last.kind != "call" and delta.index == last.index:
            result[-1] = Delta(delta.kind, last.text + delta.text, delta.index)
        else:
            result.append(delta)
    return result


class Scanner:
    """The state of one choice. `new_id` makes the ids of calls, in place of the rules' own."""

    def __init__(self, rules: ScanRules, new_id: Callable[[], str] | None = None) -> None:
        self.window: Final = Window()
        self._rules = rules
        self._new_id = new_id or rules.new_id
        self._deltas: list[Delta] = []
        self._blank = ""  # white space that is shown only if text of its kind follows
        self._trims = False  # white space that comes next stands beside a tag
        self._closed = True  # the last call is complete
        self._flows = False  # the parser waits within a run of text, and all of it is out
        self.num_calls = 0
        self.in_reasoning = rules.thinking is not None and rules.thinking.starts_open
        self._parser = self._parse()
        next(self._parser)

    @property
    def done(self) -> bool:
        """Nothing that may follow is wanted."""
        return self.num_calls > 0 and self._closed and not self._rules.parallel

    def push(self, text: str) -> list[Delta]:
        """The next slice; what it completes, as few deltas as possible."""
        if not text or self.done:
            return []
        if self._flows and not self._rules.notable.search(text):  # the usual case, at a fifth
            return [Delta("reasoning" if self.in_reasoning else "content", text)]
        self._flows = False
        self.window.push(text)
        next(self._parser, None)
        return self._taken()

    def flush(self) -> list[Delta]:
        """The text has ended: what was held back. Nothing may be pushed after it."""
        self.window.ended = True
        next(self._parser, None)
        return self._taken()

    # -- what a syntax puts in

    def knows(self, name: str) -> bool:
        """See `CallSink`."""
        return name in self._rules.names

    def could_know(self, beginning: str) -> bool:
        """See `CallSink`."""
        return any(name.startswith(beginning) for name in self._rules.names)

    def takes_text(self, name: str, argument: str) -> bool:
        """See `CallSink`."""
        return (name, argument) in self._rules.texts

    def open_call(self, name: str) -> None:
        """See `CallSink`."""
        self.window.forget()
        self._blank, self._trims, self._closed = "", True, False
        self._deltas.append(Delta("call", "", self.num_calls, self._new_id(), name))
        self.num_calls += 1

    def argue(self, text: str) -> None:
        """See `CallSink`."""
        if text:
            self._deltas.append(Delta("arguments", text, self.num_calls - 1))

    def close_call(self) -> None:
        """See `CallSink`."""
        self._closed = True

    # -- the parser

    def _parse(self) -> Reading[None]:
        """Each `yield` waits for a `push`; it ends with the text, or when nothing more matters."""
        yield
        fresh = True  # a bare call may stand here
        while not self.done:
            if self.in_reasoning:
                yield from self._read_thinking()
                fresh = not self.in_reasoning
                if self.in_reasoning:  # cut
                    break
            elif fresh:
                fresh = False
                if self._rules.syntax is not None and self._rules.syntax.bare:
                    yield from self._read_calls("")
            else:
                mark = yield from self._read_content()
                if not mark:
                    break
                fresh = yield from self._read_mark(mark)
        if not self.done and self._blank:
            self._emit(self._blank)

    def _read_mark(self, mark: str) -> Reading[bool]:
        """What a mark in the content means. True if a bare call may come next."""
        thinking, syntax = self._rules.thinking, self._rules.syntax
        if thinking is not None and mark == thinking.open:
            self._enter(reasoning=True)
        elif syntax is not None and mark in syntax.turns:
            self._enter(reasoning=False)
            return True
        else:
            yield from self._read_calls(mark)
        return False

    def _read_calls(self, mark: str) -> Reading[None]:
        """Calls behind a mark; what is none after all is content from the mark on."""
        window, syntax = self.window, self._rules.syntax
        assert syntax is not None
        window.mark(len(mark))
        if not (yield from syntax.read(self, mark)):
            window.back()
            self._say(window.take(len(mark)))

    def _read_content(self) -> Reading[str]:
        """Content up to a mark, which is read too; "" at the end of the text."""
        window, rules = self.window, self._rules
        while True:
            found = rules.pattern.search(window.text, window.at)
            if found is not None:
                self._say(window.take(found.start() - window.at))
                return window.take(len(found[0]))
            self._say(self._certain(rules.marks))
            if window.ended:
                return ""
            self._flows = self._all_out
            yield

    def _read_thinking(self) -> Reading[None]:
        """Thinking up to its closing tag, or to the end of the text."""
        window, rule = self.window, self._rules.thinking
        assert rule is not None
        yield from window.skip()
        yield from window.accept(rule.open)  # some models repeat what the prompt has
        while True:
            found = window.text.find(rule.close, window.at)
            if found >= 0:
                self._say(window.take(found - window.at))
                window.take(len(rule.close))
                return self._enter(reasoning=False)
            self._say(self._certain((rule.close,)))
            if window.ended:
                return None
            self._flows = rule.show and self._all_out
            yield

    @property
    def _all_out(self) -> bool:
        """Nothing of the text so far is held back, and no white space will be dropped."""
        return not self._blank and not self._trims and self.window.at == len(self.window.text)

    def _certain(self, marks: Sequence[str]) -> str:
        """Reads all that is there, but no beginning of a mark unless the text has ended."""
        window = self.window
        end = len(window.text)
        if not window.ended:
            end -= _held_size(window.text[window.at :], marks)
        return window.take(end - window.at)

    def _enter(self, *, reasoning: bool) -> None:
        self.in_reasoning = reasoning
        self._blank, self._trims = "", True

    def _say(self, text: str) -> None:
        """Content or thinking; white space waits until it is known what it stands beside."""
        if self._trims:
            text = text.lstrip(WHITE)
            self._trims = not text
        shown = text.rstrip(WHITE)
        if shown:
            self._emit(self._blank + shown)
            self._blank = text[len(shown) :]
        else:
            self._blank += text

    def _emit(self, text: str) -> None:
        rule = self._rules.thinking
        if not self.in_reasoning:
            self._deltas.append(Delta("content", text))
        elif rule is not None and rule.show:
            self._deltas.append(Delta("reasoning", text))

    def _taken(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return merged(deltas) if len(deltas) > 1 else deltas


def _held_size(text: str, marks: Sequence[str]) -> int:
    """The longest end of the text that is the beginning of a mark."""
    longest = 0
    for mark in marks:
        start = text.find(mark[0], max(0, len(text) - len(mark) + 1))
        while start >= 0:
            if mark.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start = text.find(mark[0], start + 1)
    return longest
