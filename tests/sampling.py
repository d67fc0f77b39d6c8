"""Text drawn from a grammar at random, without a model: llguidance's masks and a policy.

Owns nothing. The policy takes any allowed token, but often one that closes something, so that
texts end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

_CLOSING = (b'"', b"}", b"]", b'"}', b'"]')
_MERGED = (
    *(b'{"', b'":', b'": ', b'",', b'", "', b'"}', b'"]', b"}}", b"},", b"\n  ", b"    ", b"  "),
    *(b"true", b"false", b"null", b"12", b"-1", b"0.", b"e+", b"\\u00", b"\\n", b"the ", b"19"),
    *("é".encode(), "你".encode(), b"\xf0\x9f"),
)


class Vocabulary:
    """All bytes and some longer tokens, as llguidance wants to be told of them."""

    bos_token_id = None

    def __init__(self) -> None:
        pieces = [*(bytes([byte]) for byte in range(256)), *_MERGED]
        self.eos_token_id = len(pieces)
        self.special_token_ids: Sequence[int] = (self.eos_token_id,)
        self.tokens = (*pieces, b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        """Each byte is its id."""
        return list(text)


class Sampler:
    """Draws texts from grammars."""

    def __init__(self) -> None:
        self._vocabulary = Vocabulary()
        self._tokenizer = LLTokenizer(TokenizerWrapper(self._vocabulary))
        self._closing = [self._vocabulary.tokens.index(piece) for piece in _CLOSING]

    def draw(
        self, grammar: str, rng: random.Random, *, most: int = 400, haste: float = 0.3
    ) -> tuple[bytes, bool]:
        """(text, whether it ended by itself within `most` tokens); `haste`: how often to close.

        Raises AssertionError where the grammar does not compile or leaves no token.
        """
        tokens, end = self._vocabulary.tokens, self._vocabulary.eos_token_id
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        text = b""
        for _ in range(most):
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            assert not matcher.is_error(), matcher.get_error()
            allowed = [token for token in range(len(tokens)) if mask >> token & 1]
            assert allowed, f"nothing may follow {text!r}"
            if end in allowed and (len(allowed) == 1 or rng.random() < haste):
                return text, True
            allowed = [token for token in allowed if token != end]
            closing = [token for token in self._closing if token in allowed]
            token = rng.choice(closing if closing and rng.random() < haste else allowed)
            assert matcher.consume_token(token)
            text += tokens[token]
            if matcher.is_stopped():
                return text, True
        return text, False

    def accepts(self, grammar: str, text: str | bytes) -> bool:
        """Whether the whole text, and no less, follows the grammar."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        data = text.encode() if isinstance(text, str) else text
        return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()

    def begins(self, grammar: str, text: bytes) -> bool:
        """Whether the text is a beginning of one that follows the grammar."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.try_consume_tokens(list(text)) == len(text)
