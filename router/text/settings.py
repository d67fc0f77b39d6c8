"""What the small JSON files beside a tokenizer say. Owns nothing; must not know any library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from router.checkpoint.facts import read_config


def optional_config(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no such file. Raises `StartError` if it is unreadable."""
    return read_config(path) if path.is_file() else {}


def text_of(token: object) -> str:
    """Of a token as written in a config: its text, or an object with it as `content`; else ""."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def end_ids(
    first: Iterable[int | None], configs: Iterable[Mapping[str, Any]], size: int
) -> tuple[int, ...]:
    """These and those under `eos_token_id`, each once; ids beyond a vocabulary of `size` are not.

    generation_config.json lists more than config.json (zai-org/GLM-4#127).
    """
    found: list[object] = list(first)
    for config in configs:
        value = config.get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    ids = [token for token in found if isinstance(token, int) and 0 <= token < size]
    return tuple(dict.fromkeys(ids))
