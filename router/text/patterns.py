"""Bounds on regular expressions before they are compiled.

Owns the bounds. Must not compile anything, nor know where a pattern comes from. Why (llguidance
1.9, measured): `(a{1000}){1000}` takes four seconds for one step of an answer.
"""

from __future__ import annotations

import re
from typing import Final

MAX_CHARS: Final = 1000
MAX_REPEATED: Final = 20_000  # characters, repetitions written out

_QUANTIFIER: Final = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def pattern_fault(pattern: str) -> str | None:
    """Why the pattern will not be compiled, as the rest of a sentence; None if it may be tried."""
    if len(pattern) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    if any("\ud800" <= char <= "\udfff" for char in pattern):
        return "is not valid Unicode"
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        return "ends in a backslash"
    if repeated_size(pattern) > MAX_REPEATED:
        return "repeats too much to be enforced"
    return None


def repeated_size(pattern: str) -> int:
    """Characters of the pattern with `{n,m}` written out; a bound from above, for any text."""
    sizes = [0]  # of the groups that are open
    last = 0  # of the item that a quantifier would repeat
    at = 0
    while at < len(pattern):
        char = pattern[at]
        quantifier = _QUANTIFIER.match(pattern, at) if char == "{" else None
        if quantifier is not None:
            counts = [int(count[:9]) for count in quantifier.groups() if count]
            sizes[-1] += last * (max(counts, default=1) - 1)
            last *= max(counts, default=1)
            at = quantifier.end()
            continue
        if char == "[":
            at = _class_end(pattern, at)
        elif char == "\\":
            at += 1
        if char == "(":
            sizes.append(0)
            last = 0
        elif char == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif char not in "*+?":
            last = 1
            sizes[-1] += 1
        at += 1
    return sum(sizes)


def _class_end(pattern: str, start: int) -> int:
    """Where the character class that begins there ends; the last character if it does not."""
    at = start + 1
    if pattern[at : at + 1] == "^":
        at += 1
    if pattern[at : at + 1] == "]":  # a member where it comes first
        at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return min(at, len(pattern) - 1)
