"""The vocabulary of a Hugging Face folder: tokenizer.json, taken as it is.

Owns nothing. Must not know chat templates. transformers is not used: where it rebuilds a tokenizer
from parts it loses spaces (huggingface/transformers#47017), the tokenizers library does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from router.errors import EXIT_CONFIG, StartError
from router.text.fast_codec import FastCodec, piece_table, special_tokens
from router.text.settings import end_ids, optional_config, text_of
from router.text.vocabulary import EACH_BYTE, Vocabulary, style_of_decoder

FILE_NAME = "tokenizer.json"


def load_hf_vocabulary(folder: Path) -> Vocabulary:
    """Raises `StartError` naming the file that is missing or unusable, and what to do."""
    file = folder / FILE_NAME
    if not file.is_file():
        raise StartError(
            f"{folder} has no {FILE_NAME}: copy it there from the place the model came from",
            EXIT_CONFIG,
        )
    try:
        parsing = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise StartError(f"{file} is no usable tokenizer: {error}", EXIT_CONFIG) from error
    # limits in the file are meant for training: they would cut prompts silently
    parsing.no_truncation()
    parsing.no_padding()
    try:
        style = style_of_decoder(_decoder(parsing))
    except ValueError as error:
        raise StartError(f"{file} cannot be used: {error}", EXIT_CONFIG) from error
    settings = optional_config(folder / "tokenizer_config.json")
    configs = [
        optional_config(folder / "generation_config.json"),
        optional_config(folder / "config.json"),
    ]
    bos_id = _bos_id(parsing, settings, configs)
    special = special_tokens(parsing)
    pieces = piece_table(parsing, style)
    prefix_ids, suffix_ids = _frame(parsing, settings, bos_id)
    return Vocabulary(
        codec=FastCodec(parsing, special),
        pieces=pieces,
        special=special,
        bos_id=bos_id,
        eos_ids=end_ids([_token_id(parsing, settings.get("eos_token"))], configs, len(pieces)),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        unk_id=_token_id(parsing, settings.get("unk_token")),
        strips_space=style.strips_space,
        errors=EACH_BYTE if style.byte_fallback else "replace",
    )


def _decoder(tokenizer: Tokenizer) -> Mapping[str, Any] | None:
    if tokenizer.decoder is None:
        return None
    state: bytes = tokenizer.decoder.__getstate__()
    return dict(json.loads(state))


def _token_id(tokenizer: Tokenizer, token: object) -> int | None:
    return tokenizer.token_to_id(text_of(token))


def _bos_id(
    tokenizer: Tokenizer, settings: Mapping[str, Any], configs: list[dict[str, Any]]
) -> int | None:
    found = _token_id(tokenizer, settings.get("bos_token"))
    if found is None:
        ids = [config.get("bos_token_id") for config in configs]
        found = next((token for token in ids if isinstance(token, int)), None)
    return found


def _frame(
    tokenizer: Tokenizer, settings: Mapping[str, Any], bos_id: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and end: `add_bos_token` where it is written, else what the post-processor adds."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    starts = [at for at in range(len(full)) if full[at : at + len(bare)] == bare]
    first, last = (starts[-1], starts[-1] + len(bare)) if starts else (0, len(full))
    before, behind = tuple(full[:first]), tuple(full[last:])
    wanted = settings.get("add_bos_token")
    if wanted is False:
        return (), behind
    if wanted is True and not before and bos_id is not None:
        return (bos_id,), behind
    return before, behind
