"""Text to token ids and back, for one model.

Owns the vocabulary. Must not know templates, requests or threads (encoding releases the GIL and may
be called from several). Files are read by the `..._vocab` modules, text is cut by a `Codec`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from router.text.vocabulary import Vocabulary


class Tokenizer(Protocol):
    """What the router needs of a vocabulary."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end an answer, the model's main one first; may be empty."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The start token, whether or not texts begin with it."""
        ...

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What every prompt of this model begins with: usually (bos_id,) or ()."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are control tokens, not text."""
        ...

    @property
    def strips_space(self) -> bool:
        """A text's first token carries a space that is not part of the text."""
        ...

    @property
    def decode_errors(self) -> str:
        """The codec error handler that shows bytes which are no UTF-8."""
        ...

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Ids of a text.

        `add_special` puts `prefix_ids` in front unless the ids begin with them already.
        `parse_special` turns the text of control tokens into their ids; without it they are
        ordinary text and the result has no special id.
        """
        ...

    def encode_trusted(self, text: str, untrusted: dict[str, str]) -> list[int]:
        """Ids of a text whose control tokens are parsed, but not those inside untrusted parts.

        Each key of `untrusted` stands in the text for its value, which is encoded as plain text.
        `prefix_ids` are in front exactly once.
        """
        ...

    def encode_for_embedding(self, text: str) -> list[int]:
        """Ids of a text to be embedded, all of them, with what the model's files put around it.

        The text is plain: none of its ids is a control token.
        """
        ...

    @property
    def special_names(self) -> SpecialNames:
        """How control tokens are written."""
        ...

    def pieces(self, *, skip_special: bool = True) -> Sequence[bytes]:
        """id -> bytes, for `Detokenizer`."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for; b"" for special and unknown ids."""
        ...

    def token_text(self, token: int) -> str:
        """An id to show: control tokens by name, part characters as U+FFFD, unknown ids as ""."""
        ...

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False
    ) -> str:
        """The text of ids; incomplete characters become U+FFFD.

        `continues`: the ids go on with an earlier text, so a leading space is kept.
        """
        ...


class SpecialNames:
    """The texts of all control tokens, and which texts could become one next to other texts."""

    __slots__ = ("_all", "_begins", "_ends", "_longest", "pattern")

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted(names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._longest = len(longest_first[0]) if longest_first else 0
        self._all = "\n".join(longest_first)
        self._begins = {name[:size] for name in longest_first for size in range(1, len(name))}
        self._ends = {name[-size:] for name in longest_first for size in range(1, len(name))}

    def could_begin(self, text: str) -> bool:
        """The end of the text is the beginning of a control token."""
        return any(text[-size:] in self._begins for size in range(1, self._longest))

    def could_end(self, text: str) -> bool:
        """The beginning of the text is the end of a control token."""
        return any(text[:size] in self._ends for size in range(1, self._longest))

    def could_hold(self, text: str) -> bool:
        """The whole text is a part of a control token."""
        return len(text) < self._longest and text in self._all


class ModelTokenizer:
    """A `Tokenizer` over a vocabulary of any kind."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._codec = vocabulary.codec
        self._special_ids = frozenset(vocabulary.special)
        # unknown characters become the unknown token: that is text, though an unreadable one
        self._control_ids = self._special_ids - {vocabulary.unk_id}
        self._names = SpecialNames(self._codec.names)
        self._shown = tuple(
            vocabulary.special[token].encode() if token in vocabulary.special else piece
            for token, piece in enumerate(vocabulary.pieces)
        )

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary.pieces)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._vocabulary.eos_ids

    @property
    def bos_id(self) -> int | None:
        return self._vocabulary.bos_id

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return self._vocabulary.prefix_ids

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    @property
    def strips_space(self) -> bool:
        return self._vocabulary.strips_space

    @property
    def decode_errors(self) -> str:
        return self._vocabulary.errors

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids = self._codec.parsed(text) if parse_special else self._plain(text)
        return self._prefixed(ids) if add_special else ids

    def encode_trusted(self, text: str, untrusted: dict[str, str]) -> list[int]:
        if not untrusted:
            return self._prefixed(self._codec.parsed(text))
        restore = re.compile("|".join(map(re.escape, untrusted)))
        ids: list[int] = []
        for i, (part, token) in enumerate(self._codec.cut(text)):
            part = restore.sub(lambda match: untrusted[match[0]], part)
            ids += self._plain(part, starts=i == 0)
            if token is not None:
                ids.append(token)
        return self._prefixed(ids)

    def encode_for_embedding(self, text: str) -> list[int]:
        return [*self.prefix_ids, *self._plain(text), *self._vocabulary.suffix_ids]

    @property
    def special_names(self) -> SpecialNames:
        return self._names

    def pieces(self, *, skip_special: bool = True) -> Sequence[bytes]:
        return self._vocabulary.pieces if skip_special else self._shown

    def token_bytes(self, token: int) -> bytes:
        return self._vocabulary.pieces[token] if 0 <= token < self.vocab_size else b""

    def token_text(self, token: int) -> str:
        return self._shown[token].decode("utf-8", "replace") if 0 <= token < self.vocab_size else ""

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False
    ) -> str:
        pieces, size = self.pieces(skip_special=skip_special), self.vocab_size
        data = b"".join([pieces[token] for token in ids if 0 <= token < size])
        if self.strips_space and not continues:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", self.decode_errors)

    def _prefixed(self, ids: list[int]) -> list[int]:
        """With exactly one start: not a second one before ids that bring their own."""
        prefix = list(self.prefix_ids)
        return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids

    def _plain(self, text: str, *, starts: bool = True) -> list[int]:
        """Ids of a text in which nothing is a control token; `starts`: it begins the prompt."""
        if not text:
            return []
        ids = self._codec.plain(text, starts=starts)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The model holds control tokens as ordinary pieces too: cut their names apart.
        match = self._names.pattern.search(text)
        if match is None:  # the piece of one character, or found after normalization: leave it out
            return [token for token in ids if token not in self._control_ids]
        cut = match.start() + 1
        return self._plain(text[:cut], starts=starts) + self._plain(text[cut:], starts=False)
