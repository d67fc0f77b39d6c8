"""Every case of the API corpus has its test, in the module of its kind; none is left out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.cases.corpus import CASES

HERE = Path(__file__).parent
_TEST = re.compile(r"^(?:async )?def (test_\w+)\(", re.MULTILINE)
_NAME = re.compile(r"test_case_(\d{3})_\w+")


def found() -> list[tuple[int, str]]:
    """(number, kind of its module) of each test in this folder; all must be named by a number."""
    tests: list[tuple[int, str]] = []
    for file in sorted(HERE.glob("test_*.py")):
        kind = file.stem.removeprefix("test_")
        if kind == "ledger":
            continue
        for name in _TEST.findall(file.read_text(encoding="utf-8")):
            number = _NAME.fullmatch(name)
            assert number is not None, f"{file.name}: {name} names no case"
            tests.append((int(number[1]), kind))
    return tests


def test_the_corpus_is_whole() -> None:
    assert len(CASES) == 173
    assert Counter(case.kind for case in CASES.values()) == {
        "utf8": 8, "stop": 11, "usage": 7, "finish": 6, "logprobs": 10, "choices": 8, "tools": 11,
        "reasoning": 5, "schema": 12, "errors": 6, "validate": 12, "context": 5, "prompt": 5,
        "sampling": 7, "embed": 6, "abort": 3, "overload": 5, "body": 6, "fields": 5,
        "template": 11, "midstream": 4, "http": 6, "msgresp": 8, "replica": 3, "timeout": 3,
    }  # fmt: skip


def test_every_case_has_a_test_in_its_module() -> None:
    tests = found()
    assert [number for number, _ in tests if number not in CASES] == []
    assert [(number, kind) for number, kind in tests if CASES[number].kind != kind] == []
    assert set(CASES) - {number for number, _ in tests} == set()
