"""What a model's files say about its vocabulary, ready for encoding and decoding.

Owns nothing: values and the functions that build them. Must not know where the files are.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer

SPACE_MARK = "▁"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`parsing` turns written control tokens into ids, `plain` leaves them as text.

    Both share one model. `pieces[id]` is b"" for control tokens and for holes. `plain` also knows
    `anchor`, an unguessable text that becomes one id beyond the vocabulary: what is encoded after
    it is not the start of a text (some vocabularies put a space before the first word only).
    """

    parsing: Tokenizer
    plain: Tokenizer
    anchor: str
    pieces: tuple[bytes, ...]
    special: Mapping[int, str]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()
    unk_id: int | None = None
    strips_space: bool = False


@dataclass(frozen=True, slots=True)
class PieceStyle:
    """How a vocabulary writes bytes: the inverse of its library's decoder, token by token."""

    byte_level: bool = False  # GPT-2's alphabet of 256 printable characters
    byte_fallback: bool = False  # pieces <0x00> to <0xFF>
    marks_space: bool = False  # ▁ is a space
    strips_space: bool = False  # the first space of a text is not part of it
    word_prefix: str | None = None  # continues a word (WordPiece); other pieces begin with a space
    word_suffix: str | None = None  # ends a word

    def bytes_of(self, token: str) -> bytes:
        """The bytes of an ordinary piece."""
        if self.byte_level:
            try:
                return token.translate(_BYTE_OF_CHAR).encode("latin-1")
            except UnicodeEncodeError:
                return token.encode()
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            return bytes.fromhex(token[3:5])
        if self.word_prefix is not None:
            rest = token.removeprefix(self.word_prefix)
            return (rest if rest != token else " " + token).encode()
        if self.word_suffix and token.endswith(self.word_suffix):
            return (token.removesuffix(self.word_suffix) + " ").encode()
        return (token.replace(SPACE_MARK, " ") if self.marks_space else token).encode()


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + position) for position, byte in enumerate(rest)
    }


_BYTE_OF_CHAR = {ord(char): byte for byte, char in byte_alphabet().items()}


def style_of_decoder(decoder: Mapping[str, Any] | None) -> PieceStyle:
    """Reads the `decoder` entry of a tokenizer.json.

    Raises ValueError naming a kind of decoder that is not known.
    """
    if decoder is None:  # the library then joins pieces with spaces
        return PieceStyle(word_prefix="\0", strips_space=True)
    found: dict[str, Any] = {}
    for step in _flat(decoder):
        kind = step.get("type")
        if kind == "ByteLevel":
            found["byte_level"] = True
        elif kind == "ByteFallback":
            found["byte_fallback"] = True
        elif kind == "Replace" and step.get("pattern") == {"String": SPACE_MARK}:
            found["marks_space"] = True
        elif kind == "Metaspace":
            found["marks_space"] = True
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "")
            found["strips_space"] = scheme not in ("never", "")
        elif kind == "Strip" and step.get("content") == " ":
            found["strips_space"] = step.get("start", 0) > 0
        elif kind == "WordPiece":
            found |= {"word_prefix": step.get("prefix", "##"), "strips_space": True}
        elif kind == "BPEDecoder":
            found["word_suffix"] = step.get("suffix", "</w>")
        elif kind != "Fuse":
            raise ValueError(f"its decoder {kind!r} is not known")
    return PieceStyle(**found)


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


def make_anchor() -> str:
    """See `Vocabulary`."""
    return f"\ue5a1{secrets.token_hex(16)}\ue5a2"


def _flat(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder.get("decoders", ()) for step in _flat(inner)]
