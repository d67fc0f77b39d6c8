"""The pieces of engine.main; the process as a whole is in tests/system/test_engine_process.py."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from engine.config import ModelError, NotEnoughMemory
from engine.main import describe, expected_load_s, read_line, report


def test_read_line_leaves_the_rest_in_the_pipe() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"first\nsecond\n")
    assert read_line(reader) == b"first\n"
    assert os.read(reader, 100) == b"second\n"
    os.close(writer)
    assert read_line(reader) == b""
    os.close(reader)


def test_read_line_is_bounded() -> None:
    with open("/dev/zero", "rb", buffering=0) as endless:
        assert len(read_line(endless.fileno())) == 1024 * 1024


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ModelError("no config.json in /m"), 78, "no config.json in /m"),
        (NotEnoughMemory("needs 9 GiB of 8"), 75, "needs 9 GiB of 8"),
        (MemoryError(), 75, "no memory left"),
        (KeyError("slot"), 70, "KeyError: 'slot'"),
    ],
)
def test_describe(error: Exception, code: int, told: str) -> None:
    fatal = describe(error, 3)
    assert (fatal.epoch, fatal.code) == (3, code)
    assert told in fatal.reason


def test_expected_load_follows_the_size_of_the_files(tmp_path: Path) -> None:
    empty = expected_load_s(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(50_000_000))
    (tmp_path / "notes.txt").write_bytes(bytes(1000))
    assert expected_load_s(tmp_path) == empty + 1.0
    assert expected_load_s(tmp_path / "model.safetensors") == empty + 1.0
    assert expected_load_s(tmp_path / "missing") == empty


def test_report_survives_a_closed_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    report("two\nlines\n")
    assert stderr.getvalue() == "engine: two\nlines\n"
    stderr.close()
    report("nobody reads this")
