"""How far a download is: one line redrawn on a terminal, else an event every ten seconds.

Owns the time of the last word. Must not know where bytes come from.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import IO, Final

from router import logs

EVENT_S: Final = 10.0


class Progress:
    """Of one download of `total_bytes`, of which `begun_bytes` were there before."""

    def __init__(
        self,
        model: str,
        total_bytes: int,
        begun_bytes: int,
        *,
        terminal: IO[str] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._total_bytes = total_bytes
        self._begun_bytes = begun_bytes
        self._terminal = terminal
        self._clock = clock
        self._begin_s = self._said_s = clock()

    def show(self, done_bytes: int) -> None:
        """Called a few times a second."""
        now_s = self._clock()
        if self._terminal is not None:
            width = shutil.get_terminal_size().columns - 1
            self._terminal.write(f"\r\x1b[K{self.line(done_bytes)[:width]}")
            self._terminal.flush()
        elif now_s - self._said_s >= EVENT_S:
            self._said_s = now_s
            rate = self._bytes_per_s(done_bytes)
            logs.info(
                "downloading",
                model=self._model,
                done_mb=round(done_bytes / 1e6),
                total_mb=round(self._total_bytes / 1e6),
                mb_per_s=round(rate / 1e6, 1),
            )

    def close(self) -> None:
        """Leaves the terminal's line to others."""
        if self._terminal is not None:
            self._terminal.write("\r\x1b[K")
            self._terminal.flush()

    @property
    def seconds(self) -> float:
        return self._clock() - self._begin_s

    def line(self, done_bytes: int) -> str:
        """`org/name  1.2 of 13.5 GB (9 %), 112 MB/s, 1:50 left`"""
        percent = 100 * done_bytes // max(self._total_bytes, 1)
        rate = self._bytes_per_s(done_bytes)
        text = f"{self._model}  {_amount(done_bytes, self._total_bytes)} ({percent} %)"
        if rate > 0:
            left_s = int((self._total_bytes - done_bytes) / rate)
            text += f", {rate / 1e6:.1f} MB/s, {left_s // 60}:{left_s % 60:02} left"
        return text

    def _bytes_per_s(self, done_bytes: int) -> float:
        return max(0, done_bytes - self._begun_bytes) / max(self.seconds, 0.001)


def _amount(done_bytes: int, total_bytes: int) -> str:
    unit, size = ("GB", 1e9) if total_bytes >= 1e9 else ("MB", 1e6)
    return f"{done_bytes / size:.1f} of {total_bytes / size:.1f} {unit}"
