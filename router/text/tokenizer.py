"""Text to token ids and back, for one model.

Owns the vocabulary. Must not know templates, requests or threads (encoding releases the GIL and may
be called from several). Files are read by `router.text.hf_vocab` and `router.text.gguf_vocab`.
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


class FastTokenizer:
    """A `Tokenizer` on top of the tokenizers library."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._special_ids = frozenset(vocabulary.special)
        # unknown characters become the unknown token: that is text, though an unreadable one
        self._control_ids = self._special_ids - {vocabulary.unk_id}
        self._names = SpecialNames(vocabulary.special.values())
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

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids = self._parsed(text) if parse_special else self._plain(text)
        return self._prefixed(ids) if add_special else ids

    def encode_trusted(self, text: str, untrusted: dict[str, str]) -> list[int]:
        if not untrusted:
            return self._prefixed(self._parsed(text))
        restore = re.compile("|".join(map(re.escape, untrusted)))

        def restored(part: str) -> str:
            return restore.sub(lambda match: untrusted[match[0]], part)

        ids: list[int] = []
        end = 0
        (encoded,) = self._vocabulary.parsing.encode_batch([text], add_special_tokens=False)
        for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
            name = self._vocabulary.special.get(token)
            if name is None or text[first:last].strip() != name.strip():
                continue
            ids += self._plain(restored(text[end:first]), starts=end == 0)
            ids.append(token)
            end = last
        ids += self._plain(restored(text[end:]), starts=end == 0)
        return self._prefixed(ids)

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
        return data.decode("utf-8", "replace")

    def _prefixed(self, ids: list[int]) -> list[int]:
        """With exactly one start: not a second one before ids that bring their own."""
        prefix = list(self.prefix_ids)
        return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids

    def _parsed(self, text: str) -> list[int]:
        (encoded,) = self._vocabulary.parsing.encode_batch_fast([text], add_special_tokens=False)
        return encoded.ids

    def _plain(self, text: str, *, starts: bool = True) -> list[int]:
        """Ids of a text in which nothing is a control token; `starts`: it begins the prompt."""
        if not text:
            return []
        whole = text if starts else self._vocabulary.anchor + text
        (encoded,) = self._vocabulary.plain.encode_batch_fast([whole], add_special_tokens=False)
        ids = encoded.ids if starts else encoded.ids[1:]
        if self._control_ids.isdisjoint(ids):
            return ids
        return self._broken_up(text, starts)

    def _broken_up(self, text: str, starts: bool) -> list[int]:
        """For models that hold control tokens as ordinary pieces too: cut their names apart."""
        match = self._names.pattern.search(text)
        if match is None:  # the piece of one character, or found after normalization: leave it out
            whole = text if starts else self._vocabulary.anchor + text
            (encoded,) = self._vocabulary.plain.encode_batch_fast([whole], add_special_tokens=False)
            ids = encoded.ids if starts else encoded.ids[1:]
            return [token for token in ids if token not in self._control_ids]
        cut = match.start() + 1
        return self._plain(text[:cut], starts=starts) + self._plain(text[cut:], starts=False)
