"""One sentencepiece model in memory: what its ids mean, and how it encodes.

Owns the library's objects. Must not know where the model comes from: a tokenizer.model, or parts
found in a GGUF file, which are written as such a file here. Both are protocol buffers, whose format
is plain enough to need no library (sentencepiece, src/sentencepiece_model.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sentencepiece import SentencePieceProcessor

from router.text.vocabulary import SPACE_MARK

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # also GGUF's numbers

# A message may be continued: a later field takes the place of an earlier one.
_NO_PREFIX: Final = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }
_BPE: Final = 2
_MAX_SCORE: Final = 1e38  # what 32 bits hold


@dataclass(frozen=True, slots=True)
class SentencePieces:
    """A model. `pieces[id]` are bytes, b"" for those in `special` (control and unknown tokens)."""

    whole: SentencePieceProcessor
    inner: SentencePieceProcessor  # the same without the space that it puts before a text
    pieces: tuple[bytes, ...]
    special: dict[int, str]
    strips_space: bool  # decoding drops the space before a text

    @property
    def bos_id(self) -> int | None:
        return _known(self.whole.bos_id())

    @property
    def eos_id(self) -> int | None:
        return _known(self.whole.eos_id())

    @property
    def unk_id(self) -> int | None:
        return _known(self.whole.unk_id())

    def encode(self, text: str, *, starts: bool) -> list[int]:
        """Ids of a text; with the space in front if it `starts` something."""
        ids: list[int] = (self.whole if starts else self.inner).encode(text)
        return ids


def open_model(data: bytes) -> SentencePieces:
    """Raises ValueError for what is no sentencepiece model."""
    try:
        whole = SentencePieceProcessor(model_proto=data)
        inner = SentencePieceProcessor(model_proto=data + _NO_PREFIX)
        size: int = whole.get_piece_size()
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"it is no sentencepiece model ({error})") from error
    if not size:
        raise ValueError("it is no sentencepiece model (it holds no pieces)")
    ids = list(range(size))
    names: list[str] = whole.id_to_piece(ids)
    controls: list[bool] = whole.is_control(ids)
    unknown: list[bool] = whole.is_unknown(ids)
    in_bytes: list[bool] = whole.is_byte(ids)
    special = {i: names[i] for i in ids if controls[i] or unknown[i]}
    pieces = tuple(b"" if i in special else _bytes_of(names[i], is_byte=in_bytes[i]) for i in ids)
    return SentencePieces(whole, inner, pieces, special, not whole.decode_pieces([SPACE_MARK]))


def write_model(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, adds_prefix: bool
) -> bytes:
    """A byte pair model of these pieces, as a tokenizer.model holds it; nothing is normalized.

    Raises ValueError for scores that are no numbers.
    """
    if not all(abs(score) < _MAX_SCORE for score in scores):
        raise ValueError("it has a score that is no number")
    parts = [
        _field(
            1,
            _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind),
        )
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
    ]
    trainer = _number(3, _BPE) + _number(35, BYTE in kinds)  # model_type, byte_fallback
    if UNKNOWN in kinds:
        trainer += _field(45, pieces[kinds.index(UNKNOWN)].encode())
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _field(1, b"identity") + _number(3, adds_prefix) + _number(4, 0) + _number(5, 1)
    return b"".join([*parts, _field(2, trainer), _field(3, normalizer)])


def _known(token: int) -> int | None:
    return token if token >= 0 else None


def _bytes_of(piece: str, *, is_byte: bool) -> bytes:
    return bytes.fromhex(piece[3:5]) if is_byte else piece.replace(SPACE_MARK, " ").encode()


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(int(value))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
