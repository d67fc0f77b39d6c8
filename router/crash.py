"""The end of an engine process: what it was, what follows, and the one report of it (pure).

Owns the judgement (restart after which delay, park, or end the router) and the form of a crash
report. Must not know processes, clocks or randomness: all of them are given.
"""

from __future__ import annotations

import signal
from typing import Any, Final, Literal, NamedTuple

import msgspec

from router.errors import EXIT_CONFIG, EXIT_FATAL, EXIT_NO_MEMORY
from router.streams import Remains

CRASH_LOOP: Final = 5  # crashes in a row without SERVICE_S of service
SERVICE_S: Final = 60.0
FIRST_DELAY_S, LONGEST_DELAY_S, JITTER = 0.5, 30.0, 0.2
LOGGED_TAIL: Final = 8  # lines


class Memory(NamedTuple):
    """Of a process at its last look: what it held, the most it ever held, what was left to take.

    0 where the system does not tell.
    """

    rss_bytes: int = 0
    peak_rss_bytes: int = 0
    free_bytes: int = 0


class Death(NamedTuple):
    """How a process ended. `code` as in subprocess: negative is the signal's number."""

    code: int
    served_s: float  # 0 if it never became ready
    condemned: str  # why we killed it, or ""
    out_of_memory: bool  # the kernel's OOM killer struck meanwhile
    last_words: tuple[str, int] | None
    tail: tuple[str, ...]
    memory: Memory = Memory()


class Verdict(NamedTuple):
    """What follows a crash: another start after `delay_s`, or the end."""

    action: Literal["restart", "park", "exit"]
    delay_s: float = 0.0


def judge(streak: int, *, first_load: bool, on_fatal: str, jitter: float) -> Verdict:
    """`streak` counts crashes in a row without `SERVICE_S` of service; `jitter` is in [-1, 1]."""
    if first_load and on_fatal == "exit":
        return Verdict("exit")
    if streak >= CRASH_LOOP:
        return Verdict("park")
    delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** max(0, streak - 1))
    return Verdict("restart", delay_s * (1 + JITTER * jitter))


def cause(death: Death) -> str:
    """One word for metrics and logs."""
    if death.condemned:
        return "hang" if death.condemned.startswith("no progress") else "condemned"
    if death.out_of_memory and death.code == -signal.SIGKILL:
        return "out_of_memory"
    return "signal" if death.code < 0 else "exit"


def is_from_outside(death: Death) -> bool:
    """A SIGKILL that neither we nor the OOM killer sent: no fault of an engine ends like that."""
    return cause(death) == "signal" and death.code == -signal.SIGKILL


def sentence(death: Death) -> str:
    """For people: why it ended, in its own words if it had any."""
    if death.condemned:
        return f"killed: {death.condemned}"
    if death.out_of_memory and death.code == -signal.SIGKILL:
        return "killed by the kernel, out of memory"
    how = _signal_name(-death.code) if death.code < 0 else f"exit code {death.code}"
    words = death.last_words[0] if death.last_words else ""
    if not words and death.code > 0:
        words = next((line for line in reversed(death.tail) if line.strip()), "")
    return f"{words} ({how})" if words else how


def exit_code(death: Death) -> int:
    """The router's own exit code if this death ends it."""
    codes = (EXIT_FATAL, EXIT_NO_MEMORY, EXIT_CONFIG)
    if death.code in codes:
        return death.code
    return EXIT_NO_MEMORY if cause(death) == "out_of_memory" else EXIT_FATAL


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class CrashReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one crash. Times are of the monotonic clock, in seconds.

    `suspects` are the requests that this engine had given no token yet: if one of them is what it
    died of, it is among those. `in_flight` are all it worked on, suspects included.
    """

    died_s: float
    epoch: int
    cause: str
    reason: str
    exit_code: int | None  # None: it was killed by `signal`
    signal: str | None
    served_s: float
    silent_s: float  # since its last message
    steps: int  # that it had done, as last told; the sequences it then had:
    running: int
    waiting: int
    suspects: tuple[str, ...]
    in_flight: tuple[str, ...]
    memory: Memory
    tail: tuple[str, ...]
    next: str
    delay_s: float

    def fields(self) -> dict[str, Any]:
        """As fields of a log event."""
        return {
            "epoch": self.epoch,
            "cause": self.cause,
            "reason": self.reason,
            "served_s": round(self.served_s, 3),
            "silent_s": round(self.silent_s, 3),
            "next": self.next,
            "delay_s": round(self.delay_s, 2),
            "steps": self.steps,
            "in_flight": len(self.in_flight),
            "requests": " ".join(sorted(set(self.in_flight))),
            "suspects": " ".join(sorted(set(self.suspects))),
            **self.memory._asdict(),
            "tail": " | ".join(self.tail[-LOGGED_TAIL:]),
        }


def report(
    death: Death, remains: Remains, verdict: Verdict, *, epoch: int, now: float
) -> CrashReport:
    """The one report of a crash."""
    killed = death.code < 0
    return CrashReport(
        died_s=now,
        epoch=epoch,
        cause=cause(death),
        reason=sentence(death),
        exit_code=None if killed else death.code,
        signal=_signal_name(-death.code) if killed else None,
        served_s=death.served_s,
        silent_s=max(0.0, now - remains.heard_s),
        steps=remains.stats.steps,
        running=remains.stats.running,
        waiting=remains.stats.waiting,
        suspects=tuple(case.request_id for case in remains.casualties if case.silent),
        in_flight=tuple(case.request_id for case in remains.casualties),
        memory=death.memory,
        tail=death.tail,
        next=verdict.action,
        delay_s=verdict.delay_s,
    )
