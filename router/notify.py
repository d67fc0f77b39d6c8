"""What the service manager is told: ready, reloading, stopping, still alive (systemd's sd_notify).

Owns the datagram socket to it, and the pace of the messages. Must not know the server: what it
says is asked for each time. Without `$NOTIFY_SOCKET` nothing is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Generator, Mapping
from typing import Final, NamedTuple

TURN_S: Final = 1.0  # between two looks at the server
PATIENCE_US: Final = 30_000_000  # asked for while it starts or stops, anew in every turn


class Condition(NamedTuple):
    """The server at one moment. `alive`: the watchdog may be told so."""

    phase: str  # of lifecycle.Phase
    alive: bool
    status: str  # one line for people


class Notifier:
    """Tells the service manager. Never waits; a manager that is gone costs only the messages."""

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An "@" stands for the zero byte of an abstract name, which is no file.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket is not None:
            self._socket.setblocking(False)
        self.watchdog_s = _watchdog_s(environ, pid) if address else 0.0
        self._status = ""

    def tell(self, **values: str | int) -> None:
        """One datagram of `KEY=value` lines."""
        if self._socket is not None:
            lines = [f"{key}={value}" for key, value in values.items()]
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)

    def ready(self) -> None:
        """Requests will succeed."""
        self.tell(READY=1)

    def stopping(self) -> None:
        """The end has begun, and may take its time."""
        self.tell(STOPPING=1, EXTEND_TIMEOUT_USEC=PATIENCE_US)

    def status(self, text: str) -> None:
        """One line for people, if it is news."""
        if text != self._status:
            self._status = text
            self.tell(STATUS=text)

    @contextlib.contextmanager
    def reloading(self) -> Generator[None]:
        """Around a change of the configuration, which ends well or not."""
        self.tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
        try:
            yield
        finally:
            self.ready()

    async def keep_telling(self, condition: Callable[[], Condition]) -> None:
        """Until it is cancelled: that it starts, lives or ends, at the pace that is expected.

        This runs on the server's own event loop: a loop that stands tells nothing.
        """
        turn_s = min(TURN_S, self.watchdog_s / 2) if self.watchdog_s else TURN_S
        while self._socket is not None:
            now = condition()
            self.status(now.status)
            if now.phase != "ready":
                self.tell(EXTEND_TIMEOUT_USEC=PATIENCE_US)
            if self.watchdog_s and now.alive:
                self.tell(WATCHDOG=1)
            await asyncio.sleep(turn_s)

    def close(self) -> None:
        """No more messages."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _watchdog_s(environ: Mapping[str, str], pid: int) -> float:
    """After how many silent seconds the manager ends us; 0 = never."""
    meant = environ.get("WATCHDOG_PID", "") in ("", str(pid))
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if meant and text.isdecimal() else 0.0
