"""What a model's files say about its vocabulary, ready for encoding and decoding.

Owns nothing: values and the functions that build them. Must not know where the files are, nor any
library: how text becomes ids is behind `Codec`.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

SPACE_MARK = "▁"


class Codec(Protocol):
    """Text to ids by the rules of one library. Several threads may use it at once."""

    @property
    def names(self) -> Collection[str]:
        """The texts that are taken for control tokens where those are looked for."""
        ...

    def plain(self, text: str, *, starts: bool) -> list[int]:
        """Ids of a text in which no control tokens are looked for; `starts`: it begins the prompt.

        They hold control tokens all the same where the model has them as ordinary pieces too.
        """
        ...

    def parsed(self, text: str) -> list[int]:
        """Ids of a text at the start of a prompt, written control tokens included."""
        ...

    def cut(self, text: str) -> Sequence[tuple[str, int | None]]:
        """Stretches of text, each with the control token behind it; the last one has none."""
        ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`pieces[id]` is b"" for control tokens and for holes; `special` names the control tokens.

    `errors` is the codec error handler by which bytes that are no UTF-8 are shown.
    """

    codec: Codec
    pieces: tuple[bytes, ...]
    special: Mapping[int, str]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()  # behind a text that is embedded; answers follow none
    unk_id: int | None = None
    strips_space: bool = False
    errors: str = "replace"


EACH_BYTE: Final = "router.each_byte"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each byte, as sentencepiece shows them; Python's own takes some together."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _each_byte)


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


def _flat(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder.get("decoders", ()) for step in _flat(inner)]
