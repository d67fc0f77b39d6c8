"""Stop strings found in text that arrives in pieces. Knows neither tokens nor HTTP.

The strings of a request are compiled once (`StopStrings`) into the automaton of Aho and Corasick,
"Efficient string matching: an aid to bibliographic search" (1975), and shared by its choices, each
of which follows it with its own `StopMatcher`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence

from router.errors import BadRequest

MAX_STOP_CHARS = 8192  # of all stop strings of a request together: 20 ms for their automaton


class StopStrings:
    """A compiled set of stop strings; immutable. Empty strings are left out.

    A node stands for a prefix of some stop string, node 0 for the empty one. Raises `BadRequest`
    when the strings are too long in total.
    """

    __slots__ = ("fail", "first", "goto", "match_length", "prefix")

    def __init__(self, stops: Iterable[str]) -> None:
        texts = [stop for stop in stops if stop]
        if sum(map(len, texts)) > MAX_STOP_CHARS:
            raise BadRequest(
                f"stop strings are limited to {MAX_STOP_CHARS} characters", param="stop"
            )
        self.prefix: list[tuple[str, int]] = [("", 0)]  # node -> (a stop string, length of prefix)
        self.goto: dict[tuple[int, str], int] = {}
        self.match_length: list[int] = [0]  # longest stop string that ends at this node
        for text in texts:
            self._insert(text)
        self.fail = [0] * len(self.prefix)  # node -> its longest proper suffix that is a node
        self._link()
        self.first = re.compile(_beginnings(texts))

    def __bool__(self) -> bool:
        return len(self.prefix) > 1

    def _insert(self, text: str) -> None:
        node = 0
        for depth, char in enumerate(text, 1):
            child = self.goto.setdefault((node, char), len(self.prefix))
            if child == len(self.prefix):
                self.prefix.append((text, depth))
                self.match_length.append(0)
            node = child
        self.match_length[node] = len(text)

    def _link(self) -> None:
        """Breadth first, so that a node's suffix is linked before the node."""
        children: dict[int, list[tuple[str, int]]] = {}
        for (parent, char), node in self.goto.items():
            children.setdefault(parent, []).append((char, node))
        queue = deque([0])
        while queue:
            parent = queue.popleft()
            for char, node in children.get(parent, ()):
                if parent:
                    self.fail[node] = self.step(self.fail[parent], char)
                if not self.match_length[node]:
                    self.match_length[node] = self.match_length[self.fail[node]]
                queue.append(node)

    def step(self, node: int, char: str) -> int:
        """The node after one more character."""
        goto, fail = self.goto, self.fail
        while True:
            child = goto.get((node, char))
            if child is not None:
                return child
            if not node:
                return 0
            node = fail[node]


def _beginnings(texts: Sequence[str]) -> str:
    """An expression for the places where a match can begin, seen from its first two characters.

    It finds every such place and a few more; a space alone would be found in every other token.
    """
    seconds: dict[str, set[str]] = {}
    for text in texts:
        seconds.setdefault(text[0], set()).add(text[1:2])
    choices = [
        re.escape(first)
        if "" in follow
        else f"{re.escape(first)}(?:[{''.join(map(re.escape, sorted(follow)))}]|\\Z)"
        for first, follow in seconds.items()
    ]
    return "|".join(choices) or r"(?!)"


class StopMatcher:
    """Follows one text and cuts it before the first stop string.

    First means: the one whose end comes first; of several with the same end the longest. So the
    result does not depend on how the text was chunked. No part of the matched string is ever
    returned, and no more is held back than the longest end of the text that may still become one.
    Time is linear in the text.
    """

    __slots__ = ("_matched", "_node", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._node = 0  # the text held back is the prefix that this node stands for
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns (text that is safe to send, the stop string if one is complete).

        After a match nothing more comes out.
        """
        if self._matched is not None:
            return "", self._matched
        stops = self._stops
        held, node, at = self._node, self._node, 0
        while at < len(text):
            if not node:
                begin = stops.first.search(text, at)
                if begin is None:
                    break
                at = begin.start()
            node = stops.step(node, text[at])
            at += 1
            length = stops.match_length[node]
            if length:
                self._node = node
                self._matched = self._stop_string(node, length)
                return self._joined(held, text, at - length), self._matched
        self._node = node
        return self._joined(held, text, len(text) - stops.prefix[node][1]), None

    def flush(self) -> str:
        """End of the text: what was held back, as no stop string can be completed any more."""
        stop, length = self._stops.prefix[self._node]
        self._node = 0
        return "" if self._matched is not None else stop[:length]

    def _joined(self, held: int, text: str, end: int) -> str:
        """The text held back at node `held`, then `text[:end]`; a negative end cuts the former."""
        stop, length = self._stops.prefix[held]
        if end > 0:
            return stop[:length] + text[:end]
        return stop[: length + end]

    def _stop_string(self, node: int, length: int) -> str:
        stop, depth = self._stops.prefix[node]
        return stop[depth - length : depth]
