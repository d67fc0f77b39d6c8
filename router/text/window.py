"""Text that arrives in slices, for parsers written as generators that `yield` for more.

Owns what has arrived and is not used up. Must not know tags, syntaxes or requests. A parser that
decides by characters and by the end alone, never by where a slice ends, gives the same for all
slicings.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Final, Protocol, TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # a parser: yields where it needs more text, returns T

WHITE: Final = " \t\r\n"


class Window:
    """The text from `at` on is unread. `ended`: no more will come."""

    __slots__ = ("_keep", "at", "ended", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._keep = -1  # where a parser may go back to, -1 for none

    def push(self, text: str) -> None:
        """Appends a slice, and forgets what was read."""
        first = self.at if self._keep < 0 else self._keep
        self.text = self.text[first:] + text
        self.at -= first
        if self._keep >= 0:
            self._keep = 0

    def mark(self, size: int = 0) -> None:
        """Keeps what is read from here on, and the `size` characters before, for `back`."""
        self._keep = self.at - size

    def back(self) -> None:
        """Everything since the mark is unread again. The mark is gone."""
        self.at = self._keep
        self._keep = -1

    def forget(self) -> None:
        """Removes the mark: nothing will be read twice."""
        self._keep = -1

    def take(self, size: int) -> str:
        """Reads so many characters of those that are there."""
        start = self.at
        self.at = min(start + size, len(self.text))
        return self.text[start : self.at]

    def peek(self) -> Reading[str]:
        """The next character, "" at the end."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def skip(self, chars: str = WHITE) -> Reading[str]:
        """Reads all of these characters; the next one after them, "" at the end."""
        while True:
            char = yield from self.peek()
            if not char or char not in chars:
                return char
            self.at += 1

    def accept(self, word: str) -> Reading[bool]:
        """Reads `word` if it comes next."""
        while True:
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return True
            rest = self.text[self.at : self.at + len(word)]
            if self.ended or not word.startswith(rest):
                return False
            yield

    def until(self, stop: re.Pattern[str]) -> Reading[str | None]:
        """Reads up to the first match of a pattern of one character, and not that; None without."""
        seen = 0
        while True:
            found = stop.search(self.text, self.at + seen)
            if found is not None:
                return self.take(found.start() - self.at)
            if self.ended:
                return None
            seen = len(self.text) - self.at
            yield

    def until_word(self, word: str) -> Reading[str | None]:
        """Reads up to `word` and past it; the text before it, None if it never comes."""
        seen = 0
        while True:
            found = self.text.find(word, self.at + seen)
            if found >= 0:
                before = self.take(found - self.at)
                self.at += len(word)
                return before
            if self.ended:
                return None
            seen = max(0, len(self.text) - self.at - len(word) + 1)
            yield


class CallSink(Protocol):
    """Where a syntax puts the calls that it reads."""

    @property
    def window(self) -> Window:
        """The text."""
        ...

    def knows(self, name: str) -> bool:
        """There is such a tool."""
        ...

    def could_know(self, beginning: str) -> bool:
        """There is a tool whose name begins like this."""
        ...

    def takes_text(self, name: str, argument: str) -> bool:
        """By its schema this argument is a text."""
        ...

    def open_call(self, name: str) -> None:
        """A call begins. From here on nothing can be taken back."""
        ...

    def argue(self, text: str) -> None:
        """The next piece of the arguments of the call that was opened last."""
        ...

    def close_call(self) -> None:
        """Its arguments are complete."""
        ...

    @property
    def done(self) -> bool:
        """No further call is wanted."""
        ...
