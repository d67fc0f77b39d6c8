"""What an operator may do to replicas, and what is shown of them.

Owns the order of each action (first the streams are handed over, then the process ends) and its one
audit line. Must not know HTTP: fleet and supervisor do the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from router import logs
from router.crash import CrashReport
from router.errors import Conflict, ReplicaNotFound
from router.fleet import Fleet
from router.metrics import ReplicaSample
from router.replica import Replica
from router.supervisor import Supervisor
from router.text.served import ModelTable
from router.versions import name_of

DRAINED: Final = "drained by the operator"
RESTARTED: Final = "restarted by the operator"


class Crash(msgspec.Struct, frozen=True, kw_only=True):
    """The latest crash of a replica. `suspects` are requests without a token from that engine,
    `in_flight` all that it worked on; memory is that of the last look before."""

    ago_s: float
    epoch: int
    cause: str
    reason: str
    exit_code: int | None
    signal: str | None
    served_s: float
    silent_s: float
    steps: int
    running: int
    waiting: int
    suspects: tuple[str, ...]
    in_flight: tuple[str, ...]
    rss_bytes: int
    peak_rss_bytes: int
    free_bytes: int
    tail: tuple[str, ...]
    next: str
    delay_s: float


class ReplicaRow(msgspec.Struct, frozen=True, kw_only=True):
    """One replica now. `since_s` is how long it is in its state, `progress_age_s` how long its
    engine has said nothing while it had work."""

    id: int
    model: str
    names: tuple[str, ...]
    state: str
    since_s: float
    reason: str
    epoch: int
    restarts: int
    crashes_in_a_row: int
    running: int
    pid: int | None
    device: str
    progress_age_s: float
    kv_blocks_used: int
    kv_blocks_total: int
    crashes: tuple[Crash, ...]


class Operations:
    """The actions and the table of replicas. Both are done at once; nothing here waits."""

    def __init__(
        self,
        fleet: Fleet,
        supervisor: Supervisor,
        models: ModelTable,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._supervisor = supervisor
        self._models = models
        self._clock = clock

    def rows(self) -> list[ReplicaRow]:
        """All replicas, in the order of their indices."""
        return [
            self._row(replica, sample)
            for replica, sample in zip(self._fleet.replicas, self._fleet.samples(), strict=True)
        ]

    def row(self, index: int) -> ReplicaRow:
        """One of them. Raises ReplicaNotFound."""
        for row in self.rows():
            if row.id == index:
                return row
        raise ReplicaNotFound

    def drain(self, index: int) -> None:
        """Its streams go elsewhere, its process ends, and none is started until `restart`.

        Raises ReplicaNotFound, Conflict: the last one that serves a model is not drained, as there
        is nobody to hand its streams to; an unload lets them finish.
        """
        row = self.row(index)
        others = self._fleet.of_model(self._fleet.replica(index).model)
        if not any(other.state == "serving" for other in others if other.index != index):
            raise Conflict(
                "No other replica serves this model: restart it, or unload the model, which lets "
                "its requests finish."
            )
        self._begin("drain", row)
        self._fleet.hand_over(index, DRAINED)
        self._supervisor.park(index, DRAINED)

    def restart(self, index: int) -> None:
        """Its streams go elsewhere, or wait for the new process that takes the old one's place.

        Raises ReplicaNotFound, Conflict.
        """
        self._begin("restart", self.row(index))
        self._fleet.hand_over(index, RESTARTED)
        self._supervisor.restart(index, RESTARTED)

    def _begin(self, action: str, row: ReplicaRow) -> None:
        """Raises Conflict for one that cannot be acted on; else leaves the audit line."""
        if not self._supervisor.keeps(row.id):
            raise Conflict(
                "This replica has no engine on purpose: its model sleeps or is unloaded."
            )
        logs.info(
            "operator",
            action=action,
            replica=row.id,
            model=row.model,
            state=row.state,
            running=row.running,
        )

    def _row(self, replica: Replica, sample: ReplicaSample) -> ReplicaRow:
        life = self._supervisor.life(replica.index)
        now = self._clock()
        try:
            names = self._models.of_key(replica.model).names
        except KeyError:  # it was exchanged, and its engines are on their way out
            names = (name_of(replica.model),)
        return ReplicaRow(
            id=replica.index,
            model=name_of(replica.model),
            names=names,
            state=replica.state,
            since_s=round(max(0.0, now - replica.since_s), 3),
            reason=replica.reason,
            epoch=replica.epoch,
            restarts=life.restarts,
            crashes_in_a_row=life.crashes_in_a_row,
            running=sample.running,
            pid=life.pid,
            device=life.device,
            progress_age_s=round(sample.progress_age_s, 3),
            kv_blocks_used=sample.stats.blocks_held,
            kv_blocks_total=sample.stats.blocks_total,
            crashes=tuple(_crash(report, now) for report in life.crashes),
        )


def _crash(report: CrashReport, now: float) -> Crash:
    told: dict[str, Any] = msgspec.structs.asdict(report)
    memory = told.pop("memory")
    died_s = told.pop("died_s")
    return Crash(ago_s=round(max(0.0, now - died_s), 3), **told, **memory._asdict())
