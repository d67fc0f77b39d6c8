"""Grammars in llguidance's text form, and a vocabulary of one token per byte for them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from engine.grammar import Grammars, Matcher
from engine.protocol import Submit, Vocabulary, pack_tokens, unpack_tokens
from tools.tiny_model import EOS_ID, FIRST_BYTE, SPECIALS, VOCAB_SIZE

DIGITS = "start: /[0-9]{3}/"
ANY_DIGITS = "start: /[0-9]+/"
PEOPLE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def json_grammar(schema: dict[str, Any]) -> str:
    """As `LLMatcher.grammar_from_json_schema` writes it."""
    return json.dumps({"grammars": [{"json_schema": schema}]})


def byte_vocabulary(epoch: int = 1, eos: tuple[int, ...] = (EOS_ID,)) -> Vocabulary:
    """That of `tools.tiny_model`."""
    names = [name.encode() for name in SPECIALS]
    pieces = names + [bytes([byte]) for byte in range(256)]
    lengths = pack_tokens(len(piece) for piece in pieces)
    return Vocabulary(epoch, lengths, b"".join(pieces), tuple(range(FIRST_BYTE)), eos)


@cache
def byte_grammars(eos: tuple[int, ...] = (EOS_ID,)) -> Grammars:
    return Grammars(byte_vocabulary(eos=eos), VOCAB_SIZE)


def matcher_of(submit: Submit) -> Matcher:
    """What an engine that knows `byte_vocabulary` compiles for a submit."""
    generated = unpack_tokens(submit.tokens)[submit.num_prompt :] if submit.num_prompt else []
    return byte_grammars().matcher(
        submit.grammar, generated, submit.stop_ids, submit.sampling.min_new
    )
