"""How many CPU threads a step should use, given what the machine lets us have.

Pure decisions over measured times; sets nothing itself. A parallel step ends with its slowest
thread: when another process takes one of our cores, every one of a step's hundreds of barriers
waits for the kernel to give it back. Measured on 2 cores beside one busy process: 50 ms a decode
step with 2 threads, 19 ms with 1 (13 ms with 2 on a quiet machine).

The sign of it is CPU time: waiting threads spin, so an undisturbed step uses all its threads for
all of its time (measured: 0.99 of it). What is missing was taken by somebody else.
"""

from __future__ import annotations

_WINDOW_S = 0.25  # of steps, before a verdict
_CONTENDED = 0.8  # share of the threads' time below which fewer threads do better
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 30.0  # before the full number is tried again


class ThreadGovernor:
    """Between 1 and `most` threads. Owns the verdict and when it is to be questioned."""

    def __init__(self, most: int) -> None:
        self.threads = most
        self._most = most
        self._wall_s = 0.0
        self._cpu_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._until_s = 0.0

    def observe(self, now_s: float, wall_s: float, cpu_s: float) -> int:
        """A step took `wall_s`, and `cpu_s` of all threads; returns the next step's threads."""
        if self.threads < self._most:
            if now_s >= self._until_s:
                self.threads = self._most
            return self.threads
        self._wall_s += wall_s
        self._cpu_s += cpu_s
        if self._wall_s >= _WINDOW_S:
            self._judge(now_s, self._cpu_s / (self._wall_s * self._most))
            self._wall_s = self._cpu_s = 0.0
        return self.threads

    def _judge(self, now_s: float, share: float) -> None:
        if share >= _CONTENDED or self._most == 1:
            self._pause_s = _FIRST_PAUSE_S
            return
        self.threads = max(1, int(self._most * share))
        self._until_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
