"""How malloc treats large blocks: given back at once while a model loads, kept for reuse after.

Owns nothing; the setting is the process's. Only glibc has it, elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from contextlib import contextmanager

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LOAD_BYTES = 1 << 17  # larger blocks are mappings of their own, and so leave no holes
_STEADY_BYTES = 32 << 20  # the highest that glibc takes, and where its own rule ends up


@contextmanager
def giving_back() -> Generator[None]:
    """For the time of a load. Without it the holes that converted weights leave between the kept
    ones stay resident: measured, 396 MB for 249 MB of int8 weights, with it 266 MB.
    """
    mallopt, trim = _function("mallopt"), _function("malloc_trim")
    mallopt(_M_MMAP_THRESHOLD, _LOAD_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _STEADY_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _STEADY_BYTES)
        trim(0)


def _function(name: str) -> Callable[..., int]:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return lambda *_: 0
    return found
