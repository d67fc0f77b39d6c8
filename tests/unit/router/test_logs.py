"""Log lines: one line each whatever is in them, and never in the way."""

from __future__ import annotations

import io
import json
import logging
import resource
import time
from collections.abc import Iterator
from pathlib import Path

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


class Memory(logs.LogFile):
    """Keeps what is written."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__()
        self._kept = file

    def write(self, lines: bytes) -> None:
        self._kept.write(lines)


def written(form: str, level: str = "info") -> list[str]:
    file = io.BytesIO()
    lines = logs.start(form, level, Memory(file))
    logs.info("request", model="a b\n\x1b[31mred\u2028", status=200, took_s=0.12345678, code=None)
    logs.event(logging.DEBUG, "hidden")
    lines.stop()
    return file.getvalue().decode().splitlines()


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


def test_r23_a_full_disk_costs_lines_only() -> None:
    lines = logs.start("text", "info", logs.LogFile("/dev/full"))
    logs.info("one")
    logs.info("two")
    lines.stop()
    assert lines.lost_lines == 2


def test_r23_lost_lines_are_told_of_once_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    file = logs.LogFile(str(path))
    lines = logs.BackgroundLines(file)  # not started: this test is its thread
    lines.setFormatter(logs.JsonLines())
    lines._write(["x" * 100])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))  # here the disk ends
    try:
        lines._write(["y" * 500])  # a part of it is written
        lines._write(["z"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert lines.lost_lines == 2
    lines._write(["after"])
    lines._write(["later"])
    file.close()
    whole, torn, after, told, later = path.read_text().splitlines()
    assert (whole, torn, after, later) == ("x" * 100, "y" * 199, "after", "later")
    assert json.loads(told)["lines"] == lines.lost_lines == 2


def wait_until_idle(lines: logs.BackgroundLines) -> None:
    deadline_s = time.monotonic() + 10
    while not lines._lines.empty():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    time.sleep(0.005)  # the batch that was just taken


def test_r23_a_full_queue_costs_lines_only() -> None:
    lines = logs.BackgroundLines(logs.LogFile(), capacity=1)  # not started: nobody reads
    lines.write("one")
    lines.write("two")
    assert lines.lost_lines == 1


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    lines = logs.start("json", "info", logs.LogFile(str(path)))
    logs.info("first")
    wait_until_idle(lines)
    path.rename(tmp_path / "router.log.1")
    lines.reopen()
    wait_until_idle(lines)
    logs.info("second")
    lines.stop()
    events = [json.loads(file.read_text())["event"] for file in sorted(tmp_path.iterdir())]
    assert events == ["second", "first"]
    assert path.stat().st_mode & 0o777 & ~0o640 == 0


def test_where_no_new_file_can_be_opened_the_old_one_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    lines = logs.start("json", "info", logs.LogFile(str(folder / "router.log")))
    wait_until_idle(lines)
    folder.rename(tmp_path / "moved")
    lines.reopen()
    wait_until_idle(lines)
    logs.info("second")
    lines.stop()
    written = (tmp_path / "moved" / "router.log").read_text().splitlines()
    assert [json.loads(line)["event"] for line in written] == ["log_file_not_reopened", "second"]


def test_tracebacks_are_kept() -> None:
    file = io.BytesIO()
    lines = logs.start("json", "info", Memory(file))
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("router").exception("bug")
    lines.stop()
    assert "KeyError" in json.loads(file.getvalue())["traceback"]
