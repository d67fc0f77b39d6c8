"""The state of the whole server as log lines, for who asks by SIGUSR1.

Owns nothing: all of it is read in one moment. Everything is bounded, and holds no text of a client.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import CodeType, CoroutineType
from typing import Any, Final

from router import logs
from router.acceptor import open_descriptors
from router.admission import Admission
from router.engine_process import memory_of
from router.fleet import Fleet
from router.streams import StreamTable
from router.supervisor import Supervisor

OLDEST: Final = 20  # streams
KINDS_OF_TASKS: Final = 40  # by their stacks
FRAMES: Final = 10  # of each, innermost last


class StateDump:
    """Call it to write the lines."""

    def __init__(
        self,
        fleet: Fleet,
        supervisor: Supervisor,
        admission: Admission,
        table: StreamTable,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._supervisor = supervisor
        self._admission = admission
        self._table = table
        self._clock = clock

    def __call__(self, phase: str) -> None:
        tasks = asyncio.all_tasks()
        logs.info(
            "state",
            phase=phase,
            streams=len(self._table),
            tasks=len(tasks),
            rss_bytes=_rss_bytes("self"),
        )
        self._replicas()
        for view in self._admission.views():
            logs.info("state_queue", **view._asdict())
        self._oldest()
        kinds = open_descriptors()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        logs.info("state_descriptors", open=sum(kinds.values()), limit=limit, **kinds)
        stacks = Counter(stack_of(task) for task in tasks)
        for stack, count in stacks.most_common(KINDS_OF_TASKS):
            logs.info("state_tasks", tasks=count, stack=stack)

    def _replicas(self) -> None:
        pids = self._supervisor.pids
        for sample in self._fleet.samples():
            pid = pids.get(sample.replica)
            logs.info(
                "state_replica",
                replica=sample.replica,
                model=sample.model,
                state=sample.state,
                pid=pid,
                rss_bytes=_rss_bytes(str(pid)) if pid else None,
                running=sample.running,
                progress_age_s=round(sample.progress_age_s, 3),
                blocks_held=sample.stats.blocks_held,
                blocks_total=sample.stats.blocks_total,
            )

    def _oldest(self) -> None:
        """Streams in the order in which they were opened."""
        now = self._clock()
        for stream in islice(self._table, OLDEST):
            since_s = stream.submitted_s
            logs.info(
                "state_stream",
                request_id=stream.request_id,
                replica=stream.replica,
                prompt_tokens=len(stream.prompt),
                tokens=len(stream.tokens),
                max_new=stream.max_new,
                age_s=None if since_s is None else round(now - since_s, 3),
                suspicion=stream.suspicion.weight,
            )


def stack_of(task: asyncio.Task[Any]) -> str:
    """Where a task waits: `file:line function`, outermost first."""
    places = [f"{Path(code.co_filename).name}:{line} {code.co_name}" for code, line in _calls(task)]
    return " > ".join(places[-FRAMES:])


def _calls(task: asyncio.Task[Any]) -> Iterator[tuple[CodeType, int]]:
    coroutine: Any = task.get_coro()
    while isinstance(coroutine, CoroutineType):
        frame = coroutine.cr_frame
        if frame is not None:
            yield frame.f_code, frame.f_lineno
        coroutine = coroutine.cr_await


def _rss_bytes(pid: str) -> int | None:
    memory = memory_of(pid)
    return None if memory is None else memory.rss_bytes
