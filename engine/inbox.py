"""What can reach an engine from outside, and what carries it: values and the transport's interface.

Owns nothing. Must not know ZeroMQ or any other transport: those are files beside `engine.link`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from engine.protocol import ToEngine, ToRouter

EXIT_PARENT_GONE = 1  # exit code of an engine without a router: nobody is left to read it


class Terminate(NamedTuple):
    """SIGTERM or SIGINT arrived."""

    signal: int


class ParentGone(NamedTuple):
    """The router's end of the parent pipe is closed, so the router is dead."""


class Skipped(NamedTuple):
    """A frame that was no message of the protocol was dropped."""

    size_bytes: int


Item = ToEngine | Terminate | ParentGone | Skipped


class EngineLink(Protocol):
    """A transport as the loop sees it; one instance is used by one thread."""

    def receive(self, timeout_s: float | None) -> list[Item]:
        """All that has arrived; waits up to `timeout_s` (None: for ever, 0: not) for the first."""
        ...

    def send(self, message: ToRouter) -> None:
        """Queue one message in order; may wait for the router to read, never drops."""
        ...
