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

from router.checkpoint.facts import read_config
from router.errors import EXIT_CONFIG, StartError
from router.text.vocabulary import (
    Vocabulary,
    make_anchor,
    make_plain,
    piece_table,
    special_tokens,
    style_of_decoder,
)

FILE_NAME = "tokenizer.json"


def load_hf_vocabulary(folder: Path) -> Vocabulary:
    """Raises `StartError` naming the file that is missing or unusable, and what to do."""
    file = folder / FILE_NAME
    if not file.is_file():
        raise StartError(_missing(folder), EXIT_CONFIG)
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
    anchor = make_anchor()
    pieces = piece_table(parsing, style)
    return Vocabulary(
        parsing=parsing,
        plain=make_plain(parsing, anchor),
        anchor=anchor,
        pieces=pieces,
        special=special_tokens(parsing),
        bos_id=bos_id,
        eos_ids=_eos_ids(parsing, settings, configs, len(pieces)),
        prefix_ids=_prefix_ids(parsing, settings, bos_id),
        unk_id=_token_id(parsing, settings.get("unk_token")),
        strips_space=style.strips_space,
    )


def optional_config(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no such file. Raises `StartError` if it is unreadable."""
    return read_config(path) if path.is_file() else {}


def _missing(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has a sentencepiece tokenizer.model but no {FILE_NAME}, which is the only "
            "kind read so far: take a copy of the model that has one"
        )
    return f"{folder} has no {FILE_NAME}: copy it there from the place the model came from"


def _decoder(tokenizer: Tokenizer) -> Mapping[str, Any] | None:
    if tokenizer.decoder is None:
        return None
    state: bytes = tokenizer.decoder.__getstate__()
    return dict(json.loads(state))


def _token_id(tokenizer: Tokenizer, token: object) -> int | None:
    """Of a token as written in a config: its text, or an object with it as `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _bos_id(
    tokenizer: Tokenizer, settings: Mapping[str, Any], configs: list[dict[str, Any]]
) -> int | None:
    found = _token_id(tokenizer, settings.get("bos_token"))
    if found is None:
        ids = [config.get("bos_token_id") for config in configs]
        found = next((token for token in ids if isinstance(token, int)), None)
    return found


def _eos_ids(
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    configs: list[dict[str, Any]],
    vocab_size: int,
) -> tuple[int, ...]:
    """All of them: generation_config.json lists more than config.json (zai-org/GLM-4#127)."""
    found: list[object] = [_token_id(tokenizer, settings.get("eos_token"))]
    for config in configs:
        value = config.get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    ids = [token for token in found if isinstance(token, int) and 0 <= token < vocab_size]
    return tuple(dict.fromkeys(ids))


def _prefix_ids(
    tokenizer: Tokenizer, settings: Mapping[str, Any], bos_id: int | None
) -> tuple[int, ...]:
    """The start: `add_bos_token` where it is written, else what the file's post-processor adds.

    What the latter adds at the end is left out: an answer follows there.
    """
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    starts = [at for at in range(len(full)) if full[at : at + len(bare)] == bare]
    own = tuple(full[: starts[-1]]) if starts else ()
    wanted = settings.get("add_bos_token")
    if wanted is False:
        return ()
    if wanted is True and not own and bos_id is not None:
        return (bos_id,)
    return own
