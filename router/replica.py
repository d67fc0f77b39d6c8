"""One replica as the router sees it: its state, what its engine said, what it owes.

Owns the fields of one replica and the rules that need no other one: when a sign of life is due,
when it is asked for one, what is said of replicas that cannot be used. Only the fleet changes a
replica. Must not know sockets, processes or requests.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from engine.protocol import Busy, Fatal, Limits, Ping, Pong, Stats
from router.errors import Overloaded
from router.frame_account import FrameAccount
from router.metrics import ReplicaSample
from router.streams import Casualty, ReplicaState, ReplicaView, StreamTable
from router.versions import name_of

FIRST_FRAME_LIMIT_S: Final = 600.0  # imports on a slow disk; exit and end-of-file come at once
BUSY_FACTOR: Final = 10.0  # an announced silence may take this much longer than announced

ADVICE: Final[dict[ReplicaState, str]] = {
    "starting": "it is still loading, try again soon",
    "serving": "try again",
    "draining": "its engine is being stopped, try again soon",
    "hung": "its engine made no progress and is being restarted, try again soon",
    "dead": "its engine is being restarted, try again soon",
    "parked": "its engine failed again and again or was stopped, and needs the operator",
    "asleep": "it has no engine at the moment, try again soon",
}

GONE: Final = ("hung", "dead", "parked", "asleep")  # states without an engine that works


class Replica:
    """One engine slot. Only the fleet changes it."""

    def __init__(self, index: int, model: str) -> None:
        self.index = index
        self.model = model
        self.state: ReplicaState = "dead"  # not started yet
        self.since_s = 0.0
        self.epoch = 0
        self.identity = b""
        self.limits: Limits | None = None
        self.stats = Stats()
        self.submitted = 0
        self.knows_vocabulary = False  # told to this epoch
        self.heard_s = 0.0  # last frame of this epoch, or the moment its work began
        self.patience_s = 0.0  # how long it may be silent beyond the usual, as announced
        self.ping_n = 0
        self.ping_s: float | None = None  # when the oldest unanswered ping was sent
        self.outbox: deque[bytes] = deque()  # frames that found the socket full
        self.frames = FrameAccount()
        self.fatal: tuple[str, int] | None = None  # its own last words
        self.casualties: list[Casualty] = []  # of this epoch
        self.reason = "not started"

    def begin(self, epoch: int, identity: bytes, now: float) -> None:
        """A new process: nothing holds any more that was known of the one before."""
        self.epoch = epoch
        self.identity = identity
        self.stats = Stats()
        self.fatal = None
        self.casualties = []
        self.knows_vocabulary = False
        self.outbox.clear()
        self.ping_s = None
        self.heard_s = now
        self.patience_s = FIRST_FRAME_LIMIT_S

    def hear(self, message: Pong | Busy | Fatal) -> None:
        """What its engine says of itself."""
        match message:
            case Pong(stats=stats):
                self.stats = stats
                self.patience_s = 0.0
            case Busy(expected_s=expected_s):
                least_s = FIRST_FRAME_LIMIT_S if self.state == "starting" else 0.0
                self.patience_s = max(max(0.0, expected_s) * BUSY_FACTOR, least_s)
            case Fatal(reason=reason, code=code):
                self.fatal = (reason, code)

    def owes_since_s(self, works: bool) -> float | None:
        """Since when a sign of life is due; None if none is."""
        return self.heard_s if works or self.state == "starting" else self.ping_s

    def ping(self, now: float) -> Ping:
        """The question how it is, which it owes an answer to from now on."""
        self.ping_n += 1
        self.ping_s = now
        return Ping(self.epoch, self.ping_n)

    def wants_ping(self, works: bool, now: float, hang_timeout_s: float) -> bool:
        """It is idle, and was long enough without being asked how it is."""
        if works or self.state != "serving" or self.ping_s is not None:
            return False
        return now - self.heard_s >= min(5.0, hang_timeout_s / 4)


def view(r: Replica, table: StreamTable) -> ReplicaView:
    """What a choice may look at."""
    load, behind, on_trial = table.load(r.index), bool(r.outbox), table.on_trial(r.index)
    return ReplicaView(r.index, r.state, r.epoch, *load, r.submitted, r.limits, behind, on_trial)


def sample(r: Replica, table: StreamTable, now: float) -> ReplicaSample:
    """Numbers for a scrape."""
    running = len(table.of_replica(r.index))
    age_s = now - r.heard_s if running else 0.0
    block_size = r.limits.block_size if r.limits else 0
    return ReplicaSample(name_of(r.model), r.index, r.state, running, age_s, block_size, r.stats)


def unavailable(name: str, replicas: list[Replica], now: float) -> Overloaded:
    """The answer while none of them is ready: which model, in which state, since when."""
    best = min(replicas, key=lambda replica: replica.state == "parked", default=None)
    if best is None:
        return Overloaded(f"Model '{name}' was exchanged or removed.", retry_after_s=2)
    since_s = max(0.0, now - best.since_s)
    return Overloaded(
        f"Model '{name}' is {best.state} since {since_s:.0f} s: {ADVICE[best.state]}.",
        retry_after_s=30 if best.state == "parked" else 2,
    )
