"""The vocabulary of a folder whose only tokenizer is a sentencepiece tokenizer.model.

Owns nothing. Must not know chat formats. transformers is not used: since version 5 it builds
another tokenizer from this file, which loses spaces (huggingface/transformers#47017).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from router.errors import EXIT_CONFIG, StartError
from router.text.cut_codec import CutCodec, Written
from router.text.glm import GLM_ENDS, GLM_PREFIX, GLM_SPECIALS, GlmKind
from router.text.settings import end_ids, optional_config, text_of
from router.text.spm import SentencePieces, open_model
from router.text.vocabulary import EACH_BYTE, Vocabulary

FILE_NAME: Final = "tokenizer.model"
_MAX_HOLES: Final = 1024  # ids left out between those of a vocabulary


def load_spm_vocabulary(folder: Path, data: bytes, glm: GlmKind | None) -> Vocabulary:
    """`data` is the content of the folder's tokenizer.model. Raises `StartError` naming the file
    that is unusable and what is wrong with it."""
    configs = [
        optional_config(folder / name)
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    ]
    try:
        model = open_model(data)
        if glm is not None:
            return _glm_vocabulary(model, glm, configs)
    except ValueError as error:
        raise StartError(f"{folder / FILE_NAME} cannot be used: {error}", EXIT_CONFIG) from error
    try:
        return _llama_vocabulary(model, _added_tokens(folder, configs[0]), configs)
    except ValueError as error:
        raise StartError(f"the tokenizer of {folder}: {error}", EXIT_CONFIG) from error


def _glm_vocabulary(
    model: SentencePieces, kind: GlmKind, configs: list[dict[str, Any]]
) -> Vocabulary:
    """Control tokens behind the pieces. They are never looked for in text, as in the released
    programs: "sop" and "eop" are parts of ordinary words."""
    first = len(model.pieces)
    ids = {name: first + i for i, name in enumerate(GLM_SPECIALS[kind])}
    rows = configs[-1].get("padded_vocab_size")
    if isinstance(rows, int) and rows < first + len(ids):
        raise ValueError(
            f"it has {first:,} pieces and {len(ids)} control tokens, but padded_vocab_size in "
            f"config.json is {rows:,}: it belongs to another model"
        )
    return Vocabulary(
        codec=CutCodec(lambda text, _starts: model.encode(text, starts=True), ()),
        pieces=(*model.pieces, *[b""] * len(ids)),
        special={**model.special, **{token: name for name, token in ids.items()}},
        bos_id=model.bos_id,
        eos_ids=end_ids(
            [model.eos_id, *(ids[name] for name in GLM_ENDS[kind])],
            configs,
            first + len(ids),
        ),
        prefix_ids=tuple(ids[name] for name in GLM_PREFIX[kind]),
        unk_id=model.unk_id,
        strips_space=model.strips_space,
        errors=EACH_BYTE,
    )


def _llama_vocabulary(
    model: SentencePieces, added: Mapping[int, _Added], configs: list[dict[str, Any]]
) -> Vocabulary:
    """Llama, vicuna and their like: settings as transformers' LlamaTokenizer reads them.

    `legacy` (its default: true) puts a space before the text behind a control token.
    """
    settings = configs[0]
    size = max([len(model.pieces), *(token + 1 for token in added)])
    if size > len(model.pieces) + len(added) + _MAX_HOLES:
        raise ValueError(f"the id {size - 1} of an added token is far beyond its vocabulary")
    pieces = [*model.pieces, *[b""] * (size - len(model.pieces))]
    special = dict(model.special)
    for token, entry in added.items():
        special.pop(token, None)
        pieces[token] = b"" if entry.special else entry.token.text.encode()
        if entry.special:
            special[token] = entry.token.text
    legacy = settings.get("legacy", True) is not False
    given = {token: entry.token for token, entry in added.items()}
    ids = {name: token for token, name in special.items()}
    bos_id = _named(ids, settings.get("bos_token"), model.bos_id)
    eos_id = _named(ids, settings.get("eos_token"), model.eos_id)
    return Vocabulary(
        codec=CutCodec(
            lambda text, starts: model.encode(text, starts=starts or legacy),
            [given.get(token) or Written(name, token) for token, name in special.items()],
            [entry.token for entry in added.values() if not entry.special],
        ),
        pieces=tuple(pieces),
        special=special,
        bos_id=bos_id,
        eos_ids=end_ids([eos_id], configs[1:], size),
        prefix_ids=_one(bos_id, settings.get("add_bos_token", True)),
        suffix_ids=_one(eos_id, settings.get("add_eos_token", False)),
        unk_id=model.unk_id,
        strips_space=model.strips_space,
        errors=EACH_BYTE,
    )


class _Added:
    """An added token of the folder's files, and whether it is a control token."""

    def __init__(self, token: Written, special: bool) -> None:
        self.token = token
        self.special = special


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, _Added]:
    """From `added_tokens_decoder`, else from added_tokens.json, which does not say what is special.

    Raises ValueError for an entry of another form.
    """
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, Mapping):
        return {_id(key): _entry(_id(key), value) for key, value in listed.items()}
    named = _special_names([settings, optional_config(folder / "special_tokens_map.json")])
    return {
        _id(token): _Added(Written(text, _id(token)), text in named)
        for text, token in optional_config(folder / "added_tokens.json").items()
    }


def _id(value: object) -> int:
    text = str(value)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"{text[:40]!r} is no id of an added token")
    return int(text)


def _entry(token: int, value: object) -> _Added:
    text = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(text, str) or not text:
        raise ValueError(f"the added token {token} has no text as 'content'")
    added = Written(text, token, value.get("lstrip") is True, value.get("rstrip") is True)
    return _Added(added, value.get("special") is True)


def _special_names(files: Iterable[Mapping[str, Any]]) -> set[str]:
    """The texts under "..._token" and in `additional_special_tokens`."""
    found: list[object] = []
    for file in files:
        found += [value for key, value in file.items() if key.endswith("_token")]
        more = file.get("additional_special_tokens")
        found += more if isinstance(more, list) else []
    return {name for value in found if (name := text_of(value))}


def _named(ids: Mapping[str, int], value: object, default: int | None) -> int | None:
    """The control token that a config names; vicuna's first releases name empty texts."""
    return ids.get(text_of(value), default)


def _one(token: int | None, wanted: object) -> tuple[int, ...]:
    return (token,) if token is not None and wanted is True else ()
