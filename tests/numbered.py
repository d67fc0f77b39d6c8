"""Lists of numbered promises (public reports A1…, security rules S1…) and the tests that keep them.

A test keeps a promise if its name begins with the number (`test_a14_…`, `test_s5_s22_…`) or if the
list's table names it. Files are read as text: nothing is imported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
_NUMBERS = re.compile(r"test_((?:[a-z]\d+_)+)")
_TEST = re.compile(r"^(?:async )?def (test\w*)\(", re.MULTILINE)
_ID = re.compile(r"`(tests/[\w/.]+\.py::\w+)`")


class Row(NamedTuple):
    """One line of a table: its number, its words, and the ids of tests that it names."""

    number: int
    words: str
    tests: tuple[str, ...]


def table(path: Path, letter: str) -> list[Row]:
    """The rows `| A1 | words | tests |` of a Markdown file, in their order."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 3 and re.fullmatch(rf"{letter}\d+", cells[0]):
            rows.append(Row(int(cells[0][1:]), cells[1], tuple(_ID.findall(cells[2]))))
    return rows


@cache
def all_tests() -> frozenset[str]:
    """The id `tests/path.py::name` of every test function."""
    return frozenset(
        f"tests/{file.relative_to(TESTS).as_posix()}::{name}"
        for file in TESTS.rglob("test_*.py")
        for name in _TEST.findall(file.read_text(encoding="utf-8"))
    )


def by_name(letter: str) -> dict[int, list[str]]:
    """The tests whose names begin with such numbers."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for test in sorted(all_tests()):
        numbers = _NUMBERS.match(test.rpartition("::")[2])
        for number in re.findall(rf"{letter}(\d+)_", numbers[1]) if numbers else ():
            found[int(number)].append(test)
    return found


def complaints(path: Path, letter: str, last: int) -> list[str]:
    """What is wrong with a table of 1 to `last`, as sentences."""
    rows = table(path, letter.upper())
    wrong: list[str] = []
    if [row.number for row in rows] != list(range(1, last + 1)):
        wrong.append(f"the rows are not {letter.upper()}1 to {letter.upper()}{last} in order")
    named = by_name(letter)
    for row in rows:
        wrong += [f"{row.number}: no test {test}" for test in row.tests if test not in all_tests()]
        if not row.tests and row.number not in named:
            wrong.append(f"{row.number}: nothing tests it")
    unknown = set(named) - {row.number for row in rows}
    wrong += [f"{named[number]}: there is no {letter.upper()}{number}" for number in unknown]
    return wrong
