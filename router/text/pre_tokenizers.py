"""How byte-level vocabularies split a text into words before they look at the bytes.

Owns the expressions. Must not know files or libraries. The names are those of llama.cpp
(src/llama-vocab.cpp), which made them up for its files, and so is the order of expressions. Where
llama.cpp approximates an expression of the model's own tokenizer.json, that one is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_QWEN2 = _WORDS + r"|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_ASCII_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_SENTENCE = r" ?[^(\s|.,!?…。，、।۔،)]+"

LLAMA3: Final = _WORDS + r"|\p{N}{1,3}" + _TAIL  # and GLM-4


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Expressions applied one after the other, each to the pieces that the one before left."""

    splits: tuple[str, ...]
    add_bos: bool = False  # where the file does not say
    ignore_merges: bool = False  # a word that is a piece stays whole


_GPT2_NAMES = (
    "gpt-2 phi-2 mpt olmo jais jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code "
    "roberta-bpe gigachat a.x-4.0 mellum exaone4 trillion granite-docling"
)
_DIGITS_NAMES = "smollm starcoder refact command-r codeshell exaone minerva-7b"
_LLAMA3_NAMES = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2"
_QWEN2_NAMES = "qwen2 stablelm2 deepseek-r1-qwen megrez kormo hunyuan grok-2"

PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    **dict.fromkeys(_GPT2_NAMES.split(), PreTokenizer((_GPT2,))),
    **dict.fromkeys(_DIGITS_NAMES.split(), PreTokenizer((r"\p{N}", _GPT2))),
    **dict.fromkeys(
        _LLAMA3_NAMES.split(), PreTokenizer((LLAMA3,), add_bos=True, ignore_merges=True)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), PreTokenizer((LLAMA3,))),
    **dict.fromkeys(_QWEN2_NAMES.split(), PreTokenizer((_QWEN2,))),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense"),
        PreTokenizer(
            (
                r"\p{N}{1,3}",
                r"[一-龥぀-ゟ゠-ヿ]+",
                _ASCII_SIGNS
                + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
                + _SPACES,
            )
        ),
    ),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    ),
    "tekken": PreTokenizer(
        (_CASED % ("", "") + r"|\p{N}" + _SLASH_TAIL,), add_bos=True, ignore_merges=True
    ),
    **dict.fromkeys(
        ("gpt-4o", "llama4", "minimax-m2"),
        PreTokenizer((_CASED % (_SUFFIX + "?", _SUFFIX + "?") + r"|\p{N}{1,3}" + _SLASH_TAIL,)),
    ),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        PreTokenizer(
            (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                r"|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    "seed-coder": PreTokenizer((_WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES,)),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), PreTokenizer((_SENTENCE,))),
    "viking": PreTokenizer((_SENTENCE, r"\p{N}")),
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
