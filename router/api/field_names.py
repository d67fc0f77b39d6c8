"""Errors in the words of the route that was asked.

Several routes put their requests into a chat's; what is refused there carries a chat's field names.
Owns the translation back. Must not know what the checks are.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Final

from router.errors import RequestError

_QUOTED: Final = re.compile(r"'([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*)'")


class FieldNames:
    """Pairs of a pattern for the start of a chat's field path, and what stands there instead.

    The first pattern that fits counts; it ends where a name of the path ends.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._pairs = [(re.compile(rf"(?:{old})(?=[.\[]|$)"), new) for old, new in pairs]

    def renamed(self, path: str) -> str:
        """The path as the client knows it."""
        for pattern, new in self._pairs:
            if match := pattern.match(path):
                return match.expand(new) + path[match.end() :]
        return path

    @contextmanager
    def applied(self) -> Generator[None]:
        """Errors that leave the block name the client's fields, in `param` and in their text."""
        try:
            yield
        except RequestError as error:
            if error.param is not None:
                error.param = self.renamed(error.param)
            error.message = _QUOTED.sub(lambda m: f"'{self.renamed(m[1])}'", error.message)
            raise
