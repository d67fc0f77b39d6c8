"""Log lines: one line each whatever is in them, and never in the way."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from router import logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("router", "uvicorn")]
    kept = [(lg, lg.handlers[:], lg.level, lg.propagate) for lg in loggers]
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def written(form: str, level: str = "info") -> list[str]:
    file = io.StringIO()
    lines = logs.start(form, level, file)
    logs.info("request", model="a b\n\x1b[31mred\u2028", status=200, took_s=0.12345678, code=None)
    logs.event(logging.DEBUG, "hidden")
    lines.stop()
    return file.getvalue().splitlines()


def test_json_lines_are_escaped() -> None:
    (line,) = written("json")
    event = json.loads(line)
    assert event["event"] == "request"
    assert event["level"] == "info"
    assert event["model"] == "a b\\u000a\\u001b[31mred\\u2028"
    assert (event["status"], event["code"]) == (200, None)


def test_text_lines_are_escaped() -> None:
    (line,) = written("text")
    assert "info request" in line
    assert "took_s=0.123457" in line
    assert "\x1b" not in line


def test_level() -> None:
    assert len(written("json", "debug")) == 2
    assert written("json", "error") == []


def test_long_fields_are_cut() -> None:
    assert len(logs.escape("x" * 10**6)) <= logs.MAX_FIELD_CHARS + 1


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("no space left on device")


def test_a_full_disk_costs_lines_only() -> None:
    lines = logs.start("text", "info", Broken())
    logs.info("one")
    logs.info("two")
    lines.stop()
    assert lines.lost_lines == 2


def test_a_full_queue_costs_lines_only() -> None:
    lines = logs.BackgroundLines(io.StringIO(), capacity=1)  # not started: nobody reads
    lines.write("one")
    lines.write("two")
    assert lines.lost_lines == 1


def test_tracebacks_are_kept() -> None:
    file = io.StringIO()
    lines = logs.start("json", "info", file)
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("router").exception("bug")
    lines.stop()
    assert "KeyError" in json.loads(file.getvalue())["traceback"]
