"""Equal warnings are told once, then counted: a flood of them must not hide what caused it.

Owns which warnings were told lately. Must not know where lines go. Pure: time is a parameter.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

WINDOW_S: Final = 10.0
MAX_KINDS: Final = 256  # of warnings that are remembered at a time
ALSO: Final = frozenset(("engine_says",))  # events of normal life that may come in floods


@dataclass(slots=True)
class _Told:
    """A warning that was told at `at_s`, and the last of those that were kept back since."""

    at_s: float
    repeats: int = 0
    last: logging.LogRecord | None = None


class Folding:
    """Warnings that are equal in all their fields, tracebacks that end at the same place."""

    def __init__(self) -> None:
        self._told: dict[object, _Told] = {}  # oldest first

    def push(self, record: logging.LogRecord, now_s: float) -> list[logging.LogRecord]:
        """What to write now: usually `record`, nothing if an equal one was just written.

        Before it come the counts (field `repeated`) of those whose time is over.
        """
        out = self._overdue(now_s) if self._told else []
        if record.levelno < logging.WARNING and record.getMessage() not in ALSO:
            return [*out, record]
        kind = _kind(record)
        told = self._told.get(kind)
        if told is not None:
            told.repeats += 1
            told.last = record
            return out
        if len(self._told) >= MAX_KINDS:
            out += _summary(self._told.pop(next(iter(self._told))))
        self._told[kind] = _Told(now_s)
        return [*out, record]

    def rest(self) -> list[logging.LogRecord]:
        """The counts that are left at the end."""
        left = [record for told in self._told.values() for record in _summary(told)]
        self._told.clear()
        return left

    def _overdue(self, now_s: float) -> list[logging.LogRecord]:
        out: list[logging.LogRecord] = []
        while self._told:
            kind = next(iter(self._told))
            if now_s - self._told[kind].at_s < WINDOW_S:
                break
            told = self._told.pop(kind)
            if told.repeats:  # the flood goes on: the next window begins with this count
                self._told[kind] = _Told(now_s)
                out += _summary(told)
        return out


def _kind(record: logging.LogRecord) -> object:
    """What equal records have in common. One bug met by many requests is one kind."""
    fields = {**getattr(record, "fields", {})}
    place: object = None
    if record.exc_info and record.exc_info[0] is not None:
        fields.pop("request_id", None)
        trace = record.exc_info[2]
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = None if trace is None else (trace.tb_frame.f_code, trace.tb_lineno)
        place = (record.exc_info[0], where)
    return (record.name, record.levelno, record.getMessage(), *sorted(fields.items()), place)


def _summary(told: _Told) -> list[logging.LogRecord]:
    """The last repeat with the number of all, its traceback left out; nothing if there was none."""
    if told.last is None:
        return []
    values = {**vars(told.last), "exc_info": None, "exc_text": None}
    values["fields"] = {**getattr(told.last, "fields", {}), "repeated": told.repeats}
    return [logging.makeLogRecord(values)]
