"""Which of a repository's files a model needs: decisions on names alone.

Owns nothing. Never chosen: programs (*.py), pickles other than PyTorch's weights, other formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

SAFETENSORS_INDEX: Final = "model.safetensors.index.json"
PYTORCH_INDEX: Final = "pytorch_model.bin.index.json"

_SMALL: Final = frozenset(
    (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    )
)
_SMALL_PATTERN: Final = re.compile(
    r"[^/]+\.tiktoken|additional_chat_templates/[^/]+\.jinja|\d+_[A-Za-z]+/config\.json"
)
_SPLIT_GGUF: Final = re.compile(r".*-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)


class NoChoice(Exception):
    """The repository holds nothing to serve, or too much; the text goes on after its name."""


def small_files(names: Sequence[str]) -> list[str]:
    """Configuration, tokenizer, chat template, pooling, and the index of the weights to come."""
    found = [name for name in names if name in _SMALL or _SMALL_PATTERN.fullmatch(name)]
    index = SAFETENSORS_INDEX if _safetensors(names) else PYTORCH_INDEX
    return [*found, *(name for name in names if name == index)]


def weight_names(names: Sequence[str], index: Mapping[str, str] | None) -> list[str]:
    """safetensors, or .bin files where there are none. `index` is a weight_map (tensor -> file).

    Raises `NoChoice`.
    """
    if index is not None:
        wanted = sorted(set(index.values()))
        missing = [name for name in wanted if name not in names]
        if missing:
            raise NoChoice(f"its index names {missing[0]}, which is not there")
        return wanted
    for single in ("model.safetensors", "pytorch_model.bin"):
        if single in names and (single.endswith(".safetensors") or not _safetensors(names)):
            return [single]
    bins = [name for name in names if re.fullmatch(r"pytorch_model[^/]*\.bin", name)]
    found = _safetensors(names) or bins
    if not found:
        kinds = sorted({"." + name.rpartition(".")[2] for name in names if "." in name})
        raise NoChoice(
            "it has no weights of a kind that can be read (.safetensors, .bin, .gguf), only "
            f"{', '.join(kinds)}"
        )
    return found


def gguf_name(names: Sequence[str], part: str) -> str:
    """The .gguf file that `part` names, whole or by its quantization (Q4_K_M); "" is the only one.

    Raises `NoChoice` listing what there is.
    """
    files = [
        name
        for name in names
        if name.lower().endswith(".gguf") and not name.rpartition("/")[2].startswith("mmproj")
    ]
    if part.lower().endswith(".gguf"):
        found = [name for name in files if part in (name, name.rpartition("/")[2])]
    else:
        found = [name for name in files if not part or _is_quantized_as(name, part)]
    whole = [name for name in found if not _SPLIT_GGUF.fullmatch(name)]
    if len(whole) == 1:
        return whole[0]
    if found and not whole:
        raise NoChoice(f"{found[0]} is one of several pieces, which cannot be read: choose another")
    offered = [name for name in files if not _SPLIT_GGUF.fullmatch(name)]
    some = ", ".join(offered[:12]) + (", …" if len(offered) > 12 else "")
    wish = f"no .gguf file for '{part}'" if part and not whole else f"{len(whole)} .gguf files"
    raise NoChoice(f"it has {wish}: add ':' and one of {some or 'none: there are no such files'}")


def is_gguf_only(names: Sequence[str]) -> bool:
    """No Hugging Face model, but .gguf files."""
    return "config.json" not in names and any(name.lower().endswith(".gguf") for name in names)


def _safetensors(names: Sequence[str]) -> list[str]:
    """Of the top folder; neither adapters nor a second copy under Mistral's own names."""
    return [
        name
        for name in names
        if re.fullmatch(r"[^/]+\.safetensors", name)
        and not name.startswith(("adapter_", "consolidated"))
    ]


def _is_quantized_as(name: str, part: str) -> bool:
    stem = name.rpartition("/")[2].lower().removesuffix(".gguf")
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    return stem == part.lower() or stem.endswith(tuple(mark + part.lower() for mark in "-._"))
