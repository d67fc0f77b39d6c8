"""Our own regular expressions on clients' texts: none takes more than linear time."""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import router

SIZE = 40_000  # a pattern of quadratic time takes seconds for it, a linear one milliseconds
ENOUGH_S = 2.0
PIECES = (
    *"a \n\\\"'0-.,<|{}[]()_:/=#é\u2028\ud800",
    "a ", "a.", "1.", "-1", "ab,", " ,", "\\u", "\\n", "<|", "<a", "</", "{{", "{%", "a=", "a:",
    "x/", "[[", "\n\n", " \n", "\r\n", "' ", '" ', '\\"', '"\\', "\\/", "'s", "0a", "A0",
)  # fmt: skip


class Use(NamedTuple):
    """A pattern for texts that a module or a class of the router keeps."""

    name: str
    pattern: re.Pattern[str]
    searches: bool  # it is tried at every place of a text, not at the first alone


def uses() -> Iterator[Use]:
    for info in pkgutil.walk_packages(router.__path__, "router."):
        module = importlib.import_module(info.name)
        source = Path(module.__file__ or "").read_text(encoding="utf-8")
        owners = [module, *(each for each in vars(module).values() if isinstance(each, type))]
        for owner in owners:
            for name, value in vars(owner).items():
                if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
                    found = re.search(
                        rf"\b{name}\.(search|sub|subn|split|finditer|findall)\b", source
                    )
                    matched = re.search(rf"\b{name}\.(full)?match\b", source)
                    searches = found is not None or matched is None
                    yield Use(f"{info.name}.{name}", value, searches)


USES = {(id(use.pattern), use.searches): use for use in uses()}


def test_s16_there_are_patterns_to_look_at() -> None:
    assert len(USES) > 20


@pytest.mark.parametrize("use", USES.values(), ids=[use.name for use in USES.values()])
def test_s16_our_patterns_are_linear(use: Use) -> None:
    for piece in PIECES:
        text = piece * (SIZE // len(piece))
        for hostile in (text, text + "!", '"' + text, "<" + text):
            begin_s = time.monotonic()
            use.pattern.match(hostile)
            use.pattern.fullmatch(hostile)
            if use.searches:
                deque(use.pattern.finditer(hostile), 0)
            assert time.monotonic() - begin_s < ENOUGH_S, repr(piece)
