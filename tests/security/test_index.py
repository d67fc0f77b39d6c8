"""Every rule of security has its test; the table beside this file says which."""

from __future__ import annotations

from pathlib import Path

from tests.numbered import complaints

LAST = 22


def test_every_rule_has_its_tests() -> None:
    assert complaints(Path(__file__).with_name("README.md"), "s", LAST) == []
