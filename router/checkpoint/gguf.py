"""GGUF headers for the router: `engine.gguf`'s reader, its error as an exit of the command."""

from __future__ import annotations

from pathlib import Path

from engine.gguf import GgufError, GgufHeader
from engine.gguf import read_gguf as read_header
from router.errors import EXIT_CONFIG, StartError


def read_gguf(path: Path, *, texts: bool = True) -> GgufHeader:
    """See `engine.gguf.read_gguf`. Raises StartError."""
    try:
        return read_header(path, texts=texts)
    except GgufError as error:
        raise StartError(str(error), EXIT_CONFIG) from error
