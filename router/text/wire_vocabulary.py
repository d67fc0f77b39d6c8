"""A model's vocabulary as engines are told of it, so that they can follow grammars.

Owns the form. Must not know engines, nor what a grammar is.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.protocol import Vocabulary, pack_tokens
from router.text.served import ModelTable
from router.text.tokenizer import Tokenizer


def wire_vocabulary(tokenizer: Tokenizer, vocab_size: int, epoch: int) -> Vocabulary:
    """The bytes of `vocab_size` ids; control tokens have those of their names.

    A model may have more ids than its tokenizer (padding: they get no bytes) or fewer.
    """
    pieces = tokenizer.pieces(skip_special=False)[:vocab_size]
    lengths = [len(piece) for piece in pieces] + [0] * (vocab_size - len(pieces))
    return Vocabulary(
        epoch,
        pack_tokens(lengths),
        b"".join(pieces),
        tuple(sorted(token for token in tokenizer.special_ids if token < vocab_size)),
        tuple(token for token in tokenizer.eos_ids if token < vocab_size),
    )


def vocabulary_of(models: ModelTable) -> Callable[[str, int, int], Vocabulary]:
    """`router.fleet.VocabularyOf` for these models."""

    def vocabulary(model: str, vocab_size: int, epoch: int) -> Vocabulary:
        return wire_vocabulary(models.of_key(model).tokenizer, vocab_size, epoch)

    return vocabulary
