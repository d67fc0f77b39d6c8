"""Equal warnings are told once, then counted; nothing else is kept back."""

from __future__ import annotations

import logging
import sys
from typing import Any

from router.folding import MAX_KINDS, WINDOW_S, Folding


def record(level: int, event: str, **fields: Any) -> logging.LogRecord:
    values = {"levelno": level, "msg": event, "fields": fields, "name": "router"}
    return logging.makeLogRecord(values)


def bug(request_id: str, divisor: int = 0) -> logging.LogRecord:
    made = record(logging.ERROR, "bug", request_id=request_id)
    try:
        assert 1 // divisor
        raise KeyError(request_id)
    except (ZeroDivisionError, KeyError):
        made.exc_info = sys.exc_info()
    return made


def texts(records: list[logging.LogRecord]) -> list[str]:
    return [f"{each.getMessage()} {vars(each)['fields']}" for each in records]


def test_equal_warnings_are_counted_and_told_after_the_window() -> None:
    folding = Folding()
    assert len(folding.push(record(30, "lost", peer=1), 0.0)) == 1
    for n in range(200):
        assert folding.push(record(30, "lost", peer=1), n / 100) == []
    assert texts(folding.push(record(20, "request"), WINDOW_S)) == [
        "lost {'peer': 1, 'repeated': 200}",
        "request {}",
    ]
    assert folding.push(record(30, "lost", peer=1), WINDOW_S + 1) == []  # the flood goes on
    (count,) = folding.push(record(20, "request"), 2 * WINDOW_S)[:-1]
    assert vars(count)["fields"]["repeated"] == 1
    folding.push(record(20, "request"), 3 * WINDOW_S)
    assert len(folding.push(record(30, "lost", peer=1), 3 * WINDOW_S + 1)) == 1


def test_what_differs_is_told() -> None:
    folding = Folding()
    for peer in range(50):
        assert len(folding.push(record(30, "lost", peer=peer), 0.0)) == 1
    for _ in range(50):
        assert len(folding.push(record(20, "request", code="x"), 0.0)) == 1


def test_one_bug_of_many_requests_is_one_traceback() -> None:
    folding = Folding()
    (first,) = folding.push(bug("a"), 0.0)
    assert first.exc_info
    assert folding.push(bug("b"), 0.0) == []
    assert len(folding.push(bug("c", divisor=1), 0.0)) == 1  # at another place
    (count,) = folding.rest()
    assert count.exc_info is None
    assert texts([count]) == ["bug {'request_id': 'b', 'repeated': 1}"]
    assert folding.rest() == []


def test_memory_is_bounded_and_no_count_is_lost() -> None:
    folding = Folding()
    told: list[logging.LogRecord] = []
    for _ in range(2):
        for n in range(3 * MAX_KINDS):
            told += folding.push(record(30, "lost", peer=n), 0.0)
            told += folding.push(record(30, "lost", peer=n), 0.0)
    told += folding.rest()
    counted = sum(vars(each)["fields"].get("repeated", 1) for each in told)
    assert counted == 12 * MAX_KINDS
