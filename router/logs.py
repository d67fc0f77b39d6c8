"""Logs are events with fields, one line each, as JSON or as text.

Owns the form of a line, and the thread that writes it: a slow or broken standard error never
delays the event loop, lines that find no room are counted. Everything a client can influence is
escaped. Secrets are never given to it. Must not know what the events mean.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from typing import IO, Final

MAX_FIELD_CHARS: Final = 1000
QUEUE_LINES: Final = 10_000

# All but printable text: control characters, escapes, line separators, lone surrogates, bidi marks.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

Field = str | int | float | bool | None


def event(level: int, name: str, /, **fields: Field) -> None:
    """Log one event. `name` is a fixed word of ours; `fields` say what happened.

    `replica`, `model`, `request_id` are the fields' usual names; times end in `_s`.
    """
    logger = logging.getLogger("router")
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": fields})


def info(name: str, /, **fields: Field) -> None:
    """An event of normal life."""
    event(logging.INFO, name, **fields)


def warning(name: str, /, **fields: Field) -> None:
    """An event that an operator should see."""
    event(logging.WARNING, name, **fields)


def error(name: str, /, **fields: Field) -> None:
    """An event that costs somebody an answer."""
    event(logging.ERROR, name, **fields)


def escape(text: str) -> str:
    """One printable line of at most `MAX_FIELD_CHARS` characters."""
    if len(text) > MAX_FIELD_CHARS:
        text = text[:MAX_FIELD_CHARS] + "…"
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _fields(record: logging.LogRecord) -> dict[str, Field]:
    fields: dict[str, Field] = getattr(record, "fields", {})
    return {
        key: escape(value) if isinstance(value, str) else value for key, value in fields.items()
    }


class JsonLines(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `event`, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Field] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": escape(record.getMessage()),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    """`12:00:00 info event key=value …` for people; values with spaces are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        parts = [when, record.levelname.lower(), escape(record.getMessage())]
        parts += [f"{key}={_text(value)}" for key, value in _fields(record).items()]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _text(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and (not value or re.search(r'[\s"=]', value)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


class BackgroundLines(logging.Handler):
    """Formats in the caller, writes in a thread of its own; counts the lines it had to drop."""

    def __init__(
        self, file: IO[str], capacity: int = QUEUE_LINES, *, owns_file: bool = False
    ) -> None:
        super().__init__()
        self.lost_lines = 0
        self._file = file
        self._owns_file = owns_file
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._write_lines, name="logs", daemon=True)

    def start(self) -> None:
        """Starts the writing thread."""
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))

    def write(self, line: str) -> None:
        """Queues one finished line; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.lost_lines += 1

    def stop(self, timeout_s: float = 1.0) -> None:
        """Writes what is queued, for at most `timeout_s`."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._file.write(line + "\n")
                if self._lines.empty():
                    self._file.flush()
            except (OSError, ValueError):  # disk full, closed: the service goes on
                self.lost_lines += 1
        if self._owns_file:
            with contextlib.suppress(OSError):
                self._file.close()


def _own_stderr() -> IO[str]:
    """Standard error behind a lock of its own: who waits in it delays nobody else."""
    try:
        return open(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    except OSError:  # closed: the lines go nowhere
        return open(os.devnull, "w", encoding="utf-8")


def start(form: str, level: str, file: IO[str] | None = None) -> BackgroundLines:
    """Sends the events of "router" to `file` (standard error); `form` is "json" or "text".

    The caller must `stop` the returned handler at the end.
    """
    owned = file is None
    lines = BackgroundLines(_own_stderr() if file is None else file, owns_file=owned)
    lines.setFormatter(JsonLines() if form == "json" else TextLines())
    logger = logging.getLogger("router")
    logger.handlers[:] = [lines]
    logger.setLevel(level.upper())
    logger.propagate = False
    # uvicorn's own lines (start-up chatter, invalid requests) are warnings at most to us
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.handlers[:] = [lines]
    uvicorn.setLevel(logging.WARNING)
    uvicorn.propagate = False
    lines.start()
    return lines
