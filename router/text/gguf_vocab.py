"""The vocabulary inside a GGUF file, rebuilt in memory for the library that made it.

Owns nothing. Must not know tensors. Known are byte-level BPE (`tokenizer.ggml.model` = gpt2), for
the tokenizers library, and sentencepiece's BPE (llama; also Gemma's), for sentencepiece itself.

`smollm` splits digits one by one before GPT-2's expression, as llama.cpp and the model's own
tokenizer.json do. tests/golden/smollm2 was made without that step; its prompts give equal ids both
ways (there is no piece of space + digit), but "a  2" would not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.gguf import Value
from router.checkpoint.gguf import read_gguf
from router.errors import EXIT_CONFIG, StartError
from router.text.cut_codec import CutCodec, Written
from router.text.fast_codec import FastCodec, add_tokens, piece_table, special_tokens
from router.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from router.text.vocabulary import EACH_BYTE, PieceStyle, Vocabulary

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)

_SENTENCEPIECE_DEFAULTS: Mapping[str, Value] = {
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_space_prefix": True,
}

# GGUF has room for two end tokens only; these names end a turn wherever they are control tokens.
_END_NAMES = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",
    )
)


def load_gguf_vocabulary(file: Path) -> Vocabulary:
    """Raises `StartError` naming the file and what is missing, inconsistent or not known."""
    metadata = read_gguf(file).metadata
    try:
        return _vocabulary(metadata)
    except ValueError as error:
        raise StartError(
            f"the vocabulary in {file} cannot be used: {error}", EXIT_CONFIG
        ) from error


def _vocabulary(metadata: Mapping[str, Value]) -> Vocabulary:
    model = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokens")
    kinds = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError("it has not one token type for each token")
    if model == "gpt2":
        return _byte_level(metadata, tokens, kinds)
    if model == "llama":
        return _sentence_pieces(metadata, tokens, kinds)
    raise ValueError(f"its kind is {model!r}, known are 'gpt2' (byte-level BPE) and 'llama'")


def _byte_level(
    metadata: Mapping[str, Value], tokens: list[str], kinds: Sequence[object]
) -> Vocabulary:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(str(name))
    if pre is None:
        raise ValueError(
            f"its pre-tokenizer {name!r} is not known; known are {', '.join(PRE_TOKENIZERS)}"
        )
    parsing = _tokenizer(tokens, kinds, _texts(metadata, "merges"), pre)
    special = special_tokens(parsing)
    bos_id = _id(metadata, "bos_token_id", len(tokens))
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos)
    return Vocabulary(
        codec=FastCodec(parsing, special),
        pieces=piece_table(parsing, PieceStyle(byte_level=True)),
        special=special,
        bos_id=bos_id,
        eos_ids=_eos_ids(metadata, special, len(tokens)),
        prefix_ids=(bos_id,) if adds_bos and bos_id is not None else (),
        unk_id=_id(metadata, "unknown_token_id", len(tokens)),
    )


def _sentence_pieces(
    metadata: Mapping[str, Value], tokens: list[str], kinds: Sequence[object]
) -> Vocabulary:
    """Defaults, and the space behind control tokens too, are llama.cpp's."""
    from router.text.spm import open_model, write_model

    metadata = {**_SENTENCEPIECE_DEFAULTS, **metadata}
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError("it has not one score for each token")
    if not all(isinstance(kind, int) and 0 < kind < 7 for kind in kinds):
        raise ValueError("it has token types that are not known")
    known = [int(str(kind)) for kind in kinds]
    for i, token in enumerate(tokens):
        if not token:
            tokens[i], known[i] = f"[EMPTY_{i}]", _UNUSED
        elif known[i] == _USER_DEFINED and token in _END_NAMES:
            known[i] = _CONTROL
    unk_id = _id(metadata, "unknown_token_id", len(tokens))
    if _UNKNOWN not in known and unk_id is not None:
        known[unk_id] = _UNKNOWN
    prefix = metadata["tokenizer.ggml.add_space_prefix"] is not False
    numbers = [float(score) for score in scores]
    model = open_model(write_model(tokens, numbers, known, adds_prefix=prefix))
    bos_id = _id(metadata, "bos_token_id", len(tokens))
    eos_ids = _eos_ids(metadata, model.special, len(tokens))
    adds_bos = metadata["tokenizer.ggml.add_bos_token"] is not False
    adds_eos = metadata["tokenizer.ggml.add_eos_token"] is True
    return Vocabulary(
        codec=CutCodec(
            lambda text, _starts: model.encode(text, starts=True),
            [Written(name, token) for token, name in model.special.items()],
        ),
        pieces=model.pieces,
        special=model.special,
        bos_id=bos_id,
        eos_ids=eos_ids,
        prefix_ids=(bos_id,) if adds_bos and bos_id is not None else (),
        suffix_ids=eos_ids[:1] if adds_eos else (),
        unk_id=model.unk_id,
        strips_space=model.strips_space,
        errors=EACH_BYTE,
    )


def _tokenizer(
    tokens: list[str], kinds: Sequence[object], merges: list[str], pre: PreTokenizer
) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError(f"{len(tokens) - len(vocab)} of its tokens appear twice")
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f"its merge {merge!r} speaks of tokens that it has not")
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    bytes_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_last])
    tokenizer.decoder = decoders.ByteLevel()
    added = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    add_tokens(
        tokenizer,
        (
            AddedToken(token, special=added[kind], normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if isinstance(kind, int) and kind in added and token
        ),
    )
    return tokenizer


def _texts(metadata: Mapping[str, Value], name: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values:
        raise ValueError(f"it has no {name}")
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"its {name} are no texts")
    return [str(value) for value in values]


def _id(metadata: Mapping[str, Value], name: str, vocab_size: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    return value if isinstance(value, int) and 0 <= value < vocab_size else None


def _eos_ids(
    metadata: Mapping[str, Value], special: Mapping[int, str], vocab_size: int
) -> tuple[int, ...]:
    named = [_id(metadata, f"{name}_token_id", vocab_size) for name in ("eos", "eot", "eom")]
    ends = [number for number, text in special.items() if text in _END_NAMES]
    return tuple(dict.fromkeys(token for token in [*named, *ends] if token is not None))
