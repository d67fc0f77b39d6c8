"""The key under which engines, permits and streams know a model.

A name may come to mean other files while requests for the old ones still run; so fleet and
admission know models by a key, which is the name itself until then. Clients, logs and metrics see
names only.
"""

from __future__ import annotations

from typing import Final

_MARK: Final = "\0"  # no name holds it


def key_of(name: str, version: int) -> str:
    """The key of that version; the first is 1."""
    return name if version == 1 else f"{name}{_MARK}{version}"


def name_of(key: str) -> str:
    """The name that clients see."""
    return key.partition(_MARK)[0]
