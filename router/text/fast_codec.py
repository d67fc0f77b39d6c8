"""Encoding by the tokenizers library.

Owns the library's objects. Must not know files. Two tokenizers share one model: one looks for
control tokens, the other reads them as text.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from itertools import groupby

from tokenizers import AddedToken, Tokenizer

from router.text.vocabulary import PieceStyle


class FastCodec:
    """A `Codec`. `plain` also knows `anchor`, an unguessable text that becomes one id beyond the
    vocabulary: what is encoded after it is not the start of a text (some vocabularies put a space
    before the first word only)."""

    def __init__(self, parsing: Tokenizer, special: Mapping[int, str]) -> None:
        self.parsing = parsing
        self._anchor = f"\ue5a1{secrets.token_hex(16)}\ue5a2"
        self._twin = make_plain(parsing, self._anchor)
        self._special = special

    @property
    def names(self) -> Collection[str]:
        return self._special.values()

    def plain(self, text: str, *, starts: bool) -> list[int]:
        whole = text if starts else self._anchor + text
        (encoded,) = self._twin.encode_batch_fast([whole], add_special_tokens=False)
        return encoded.ids if starts else encoded.ids[1:]

    def parsed(self, text: str) -> list[int]:
        (encoded,) = self.parsing.encode_batch_fast([text], add_special_tokens=False)
        return encoded.ids

    def cut(self, text: str) -> list[tuple[str, int | None]]:
        found: list[tuple[str, int | None]] = []
        end = 0
        (encoded,) = self.parsing.encode_batch([text], add_special_tokens=False)
        for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
            name = self._special.get(token)
            if name is None or text[first:last].strip() != name.strip():
                continue
            found.append((text[end:first], token))
            end = last
        return [*found, (text[end:], None)]


def piece_table(tokenizer: Tokenizer, style: PieceStyle) -> tuple[bytes, ...]:
    """id -> bytes of all pieces and added tokens; b"" for control tokens and holes."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(ids.values(), default=-1) + 1)
    for token, number in ids.items():
        table[number] = style.bytes_of(token)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        table[number] = b"" if added.special else added.content.encode()
    return tuple(table)


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """id -> name of all control tokens."""
    added = tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.special}


def make_plain(parsing: Tokenizer, anchor: str) -> Tokenizer:
    """A twin that shares the model but reads control tokens as text."""
    plain = Tokenizer(parsing.model)
    if parsing.normalizer is not None:
        plain.normalizer = parsing.normalizer
    if parsing.pre_tokenizer is not None:
        plain.pre_tokenizer = parsing.pre_tokenizer
    add_tokens(plain, (token for _, token in sorted(parsing.get_added_tokens_decoder().items())))
    if plain.get_added_tokens_decoder().keys() != parsing.get_added_tokens_decoder().keys():
        plain = Tokenizer.from_str(parsing.to_str())  # ids with holes cannot be added in order
    plain.encode_special_tokens = True
    plain.add_tokens([AddedToken(anchor, special=False, normalized=False)])
    return plain


def add_tokens(tokenizer: Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Adds tokens in order; those that the model has keep their ids."""
    for special, run in groupby(tokens, key=lambda token: token.special):
        if special:
            tokenizer.add_special_tokens(list(run))
        else:
            tokenizer.add_tokens(list(run))
