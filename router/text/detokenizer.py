"""Token ids to text while they arrive: whole characters only. Knows neither streams nor HTTP."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence


class Detokenizer:
    """The text state of one generated sequence.

    `pieces[id]` is the byte string of each id (see `Tokenizer.pieces`); ids beyond it add nothing.
    Joined results equal decoding the joined bytes at once, however the ids were chunked: bytes
    that do not yet complete a character are held back, invalid ones become U+FFFD.
    `strip_space` drops one space from the very start of the text (sentencepiece vocabularies mark
    the start of a text that way), `strip_lines` all spaces and line breaks there; leave both off
    where the ids continue a text. `errors` is the codec error handler for invalid bytes (see
    `Tokenizer.decode_errors`).
    """

    __slots__ = ("_errors", "_held", "_pieces", "_strip_lines", "_strip_space")

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        strip_space: bool = False,
        strip_lines: bool = False,
        errors: str = "replace",
    ) -> None:
        self._pieces = pieces
        self._errors = errors
        self._strip_lines = strip_lines
        self._held = b""  # the first bytes of a character
        self._strip_space = strip_space

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete, possibly ""."""
        pieces = self._pieces
        try:
            # one id is the usual case, and costs a third without list and join
            data = pieces[ids[0]] if len(ids) == 1 else b"".join([pieces[token] for token in ids])
        except IndexError:
            data = b"".join([pieces[token] for token in ids if token < len(pieces)])
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        if self._strip_lines:
            data = data.lstrip(b" \n")
            self._strip_lines = not data
        # codecs' incremental decoder does the same in Python, at three times the cost
        if self._held:
            data = self._held + data
        text, used = utf_8_decode(data, self._errors, False)
        self._held = data[used:]
        return text

    def flush(self) -> str:
        """End of the sequence: bytes still held back become U+FFFD. The state is as new after it,
        but for the start of the text."""
        held, self._held = self._held, b""
        return held.decode("utf-8", self._errors)
