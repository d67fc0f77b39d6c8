"""How a model's files want its hidden states to become one vector, and for how long a text.

Owns nothing. Must not know weights or engines. The files are those of the sentence-transformers
library, which embedding models ship: modules.json names the steps, the folder of its Pooling step
the kind, sentence_bert_config.json (or one of a similar name) the longest text. bge models say
`cls` there, e5 and MiniLM `mean`, Qwen3-Embedding `last`. A model without them (a chat model) gets
the mean over all tokens. Prompts that such files may list are left to the client.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from engine.protocol import PoolingKind
from router.checkpoint.facts import read_config
from router.checkpoint.gguf import read_gguf
from router.errors import EXIT_CONFIG, StartError

POOLING_FOLDER: Final = "1_Pooling"  # where modules.json does not say

# The two ways to write it: a switch for each kind, or one name.
_SWITCHES: Final[dict[str, PoolingKind]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Final[dict[str, PoolingKind]] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_GGUF_NUMBERS: Final[dict[int, PoolingKind]] = {1: "mean", 2: "cls", 3: "last"}
_STEPS: Final = ("Transformer", "Pooling", "Normalize", "Dropout")  # Normalize is asked per request


@dataclass(frozen=True, slots=True)
class PoolingRule:
    """`max_len`: tokens of the longest text to be embedded, 0 if only the model itself limits it.

    Models take longer texts than they were trained to embed: MiniLM 512 tokens, trained for 256.
    """

    kind: PoolingKind = "mean"
    max_len: int = 0


def load_pooling(path: Path) -> PoolingRule:
    """From a model folder or a .gguf file.

    Raises `StartError` naming file, key and value if the vector is made in a way that is not built.
    """
    if path.is_dir():
        return PoolingRule(_kind_of_folder(path), _longest_text(path))
    metadata = read_gguf(path, texts=False).metadata
    number = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    return PoolingRule(_GGUF_NUMBERS.get(number, "mean") if isinstance(number, int) else "mean")


def _kind_of_folder(folder: Path) -> PoolingKind:
    file = folder / _pooling_folder(folder) / "config.json"
    if not file.is_file():
        return "mean"
    settings = read_config(file)
    named = settings.get("pooling_mode")
    if isinstance(named, str):
        if named not in _NAMES:
            raise _unknown(file, f"pooling_mode is '{named}'")
        return _NAMES[named]
    asked = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    kinds: list[PoolingKind] = [_SWITCHES[key] for key in asked if key in _SWITCHES]
    if len(asked) != 1 or not kinds:
        raise _unknown(file, f"{' and '.join(asked) or 'no pooling_mode_...'} is true")
    return kinds[0]


def _unknown(file: Path, found: str) -> StartError:
    known = ", ".join(_SWITCHES)
    return StartError(f"{file}: {found}; exactly one of these can be used: {known}", EXIT_CONFIG)


def _pooling_folder(folder: Path) -> str:
    """Of the Pooling step; checks that the other steps are ones that we take."""
    file = folder / "modules.json"
    if not file.is_file():
        return POOLING_FOLDER
    found = POOLING_FOLDER
    for module in _modules(file):
        step = str(module.get("type", "")).rpartition(".")[2]
        if step not in _STEPS:
            raise StartError(
                f"{file}: the step '{step}' is not supported (only {', '.join(_STEPS)}), and "
                "embeddings without it would be wrong: take another model",
                EXIT_CONFIG,
            )
        if step == "Pooling":
            found = str(module.get("path") or POOLING_FOLDER)
    return found


def _modules(file: Path) -> list[dict[str, Any]]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[dict[str, Any]])
    except (OSError, RecursionError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartError(f"{file} is not readable as a JSON list: {error}", EXIT_CONFIG) from error


def _longest_text(folder: Path) -> int:
    for file in sorted(folder.glob("sentence_*_config.json")):
        longest = read_config(file).get("max_seq_length")
        if longest is None:
            continue
        if type(longest) is not int or longest < 1:
            raise StartError(
                f"{file}: max_seq_length is {longest!r}, not a number of tokens", EXIT_CONFIG
            )
        return longest
    return 0
