"""Every public report has its test; the table beside this file says which."""

from __future__ import annotations

from pathlib import Path

from tests.numbered import complaints

LAST = 28


def test_every_report_has_its_tests() -> None:
    assert complaints(Path(__file__).with_name("README.md"), "a", LAST) == []
