"""Encoding by a library that knows no control tokens: they are cut out of the text by name.

Owns nothing. Must not know which library encodes what lies between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple

_SPACES: Final = re.compile(r"\s*")


class Written(NamedTuple):
    """A text that is one id. `lstrip`, `rstrip`: it takes the white space beside it along."""

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False


class CutCodec:
    """A `Codec` of `encode(text, starts)`, control tokens and added tokens that are plain text."""

    def __init__(
        self,
        encode: Callable[[str, bool], list[int]],
        special: Sequence[Written],
        added: Sequence[Written] = (),
    ) -> None:
        self._encode = encode
        self._special = _Names(special)
        self._added = _Names(added)
        self._all = _Names([*special, *added])

    @property
    def names(self) -> Collection[str]:
        return self._special.tokens

    def plain(self, text: str, *, starts: bool) -> list[int]:
        return self._joined(self._added, text, starts)

    def parsed(self, text: str) -> list[int]:
        return self._joined(self._all, text, starts=True)

    def cut(self, text: str) -> list[tuple[str, int | None]]:
        return list(self._special.cut(text))

    def _joined(self, names: _Names, text: str, starts: bool) -> list[int]:
        ids: list[int] = []
        for part, token in names.cut(text):
            if part:
                ids += self._encode(part, starts)
            if token is not None:
                ids.append(token)
            starts = False
        return ids


class _Names:
    """The texts of some tokens; of several that begin at one place the longest is taken."""

    def __init__(self, tokens: Sequence[Written]) -> None:
        self.tokens = {token.text: token for token in tokens}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def cut(self, text: str) -> Iterator[tuple[str, int | None]]:
        """As `Codec.cut`."""
        end = 0
        if self._pattern is not None:
            for match in self._pattern.finditer(text):
                token = self.tokens[match[0]]
                part = text[end : match.start()]
                yield part.rstrip() if token.lstrip else part, token.id
                end = match.end()
                if token.rstrip and (spaces := _SPACES.match(text, end)):
                    end = spaces.end()
        yield text[end:], None
