"""Logs are events with fields, one line each, as JSON or as text.

Owns the form of a line, and the thread that writes it: a slow or broken standard error never
delays the event loop, lines that find no room are counted. Everything a client can influence is
escaped. Secrets are never given to it. Must not know what the events mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from typing import Final

from router.folding import Folding

MAX_FIELD_CHARS: Final = 1000
QUEUE_LINES: Final = 10_000
BATCH_LINES: Final = 200  # written at once, so that a slow disk is asked less often

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


class LogFile:
    """Where lines go: standard error, or a file that is appended to and can be opened anew."""

    def __init__(self, path: str = "") -> None:
        """Raises OSError when `path` cannot be opened; "" is standard error."""
        self._path = path
        self._fd = _open_file(path) if path else _own_stderr()
        self._torn = False  # it ends in the middle of a line

    def write(self, lines: bytes) -> None:
        """All of it, ending in a newline. Raises OSError; what was written until then stays."""
        rest = memoryview(b"\n" + lines if self._torn else lines)
        while rest:
            written = os.write(self._fd, rest)
            self._torn = rest[written - 1] != ord("\n")
            rest = rest[written:]

    def reopen(self) -> None:
        """After the file was moved away. Raises OSError, and goes on with the old one then."""
        if self._path:
            old, self._fd = self._fd, _open_file(self._path)
            self._torn = False
            os.close(old)

    def close(self) -> None:
        """No more lines."""
        os.close(self._fd)


def _open_file(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _own_stderr() -> int:
    """A descriptor that nobody else closes; where standard error is closed, one that swallows."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


class BackgroundLines(logging.Handler):
    """Formats in the caller, writes in a thread of its own; counts the lines it had to drop.

    Once lines can be written again, one of them says how many were lost.
    """

    def __init__(self, file: LogFile, capacity: int = QUEUE_LINES) -> None:
        super().__init__()
        self._file = file
        self._folding = Folding()
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self._unqueued = 0  # counted by the callers
        self._unwritten = 0  # by the thread
        self._told = 0
        self._reopening = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, name="logs", daemon=True)

    @property
    def lost_lines(self) -> int:
        """Lines that found the queue full or could not be written."""
        return self._unqueued + self._unwritten

    def start(self) -> None:
        """Starts the writing thread."""
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        for told in self._folding.push(record, time.monotonic()):
            self.write(self.format(told))

    def write(self, line: str) -> None:
        """Queues one finished line; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._unqueued += 1

    def reopen(self) -> None:
        """Opens the file anew, soon: it was moved away, as logrotate does. Never waits."""
        self._reopening.set()
        with contextlib.suppress(queue.Full):  # then the thread is at work, and sees it
            self._lines.put_nowait("")

    def stop(self, timeout_s: float = 1.0) -> None:
        """Writes what is queued, for at most `timeout_s`."""
        for told in self._folding.rest():
            self.write(self.format(told))
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _write_lines(self) -> None:
        stopped = False
        while not stopped:
            batch = [self._lines.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < BATCH_LINES:
                    batch.append(self._lines.get_nowait())
            stopped = None in batch
            if self._reopening.is_set():
                self._reopen()
            self._write([line for line in batch if line])
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, lines: list[str]) -> None:
        lost = self.lost_lines
        if lost > self._told:
            lines.append(self._warning("log_lines_lost", lines=lost - self._told))
        try:
            text = "".join([line + "\n" for line in lines])
            self._file.write(text.encode("utf-8", "backslashreplace"))
            self._told = lost
        except OSError:  # disk full, nobody reads: the service goes on
            self._unwritten += len(lines) - (lost > self._told)

    def _reopen(self) -> None:
        self._reopening.clear()
        try:
            self._file.reopen()
        except OSError as error:
            self._write([self._warning("log_file_not_reopened", reason=error.strerror)])

    def _warning(self, name: str, **fields: Field) -> str:
        values = {"name": "router", "levelno": logging.WARNING, "levelname": "WARNING"}
        return self.format(logging.makeLogRecord({**values, "msg": name, "fields": fields}))


def _is_news(record: logging.LogRecord) -> bool:
    """Who is cut off at the end is no bug, and needs no stack."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)


def start(form: str, level: str, file: LogFile | None = None) -> BackgroundLines:
    """Sends the events of "router" to `file` (standard error); `form` is "json" or "text".

    The caller must `stop` the returned handler at the end, which closes the file.
    """
    lines = BackgroundLines(LogFile() if file is None else file)
    lines.addFilter(_is_news)
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
