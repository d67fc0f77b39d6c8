"""A model's vocabulary as engines take it, for grammars.

Owns the form. Must not know engines, epochs' meaning or what a grammar is.
"""

from __future__ import annotations

from engine.protocol import Vocabulary, pack_tokens
from router.text.tokenizer import Tokenizer


def wire_vocabulary(tokenizer: Tokenizer, vocab_size: int, epoch: int) -> Vocabulary:
    """The pieces of `vocab_size` ids; control tokens by their names.

    An engine's model may have more ids than the tokenizer, which are padding and get no text, or
    fewer, and cannot generate those beyond.
    """
    pieces = tokenizer.pieces(skip_special=False)[:vocab_size]
    lengths = [len(piece) for piece in pieces] + [0] * (vocab_size - len(pieces))
    return Vocabulary(
        epoch,
        pack_tokens(lengths),
        b"".join(pieces),
        tuple(sorted(i for i in tokenizer.special_ids if i < vocab_size)),
        tuple(i for i in tokenizer.eos_ids if i < vocab_size),
    )
