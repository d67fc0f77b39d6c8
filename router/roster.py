"""The models that are served, on which replicas, loaded or not, while the server runs.

Owns which engines belong to which model, what clients see, and what the operator unloaded. Must not
know HTTP, texts or configuration files: it is given plans. Replica states are the fleet's,
processes the supervisor's, waiting requests the admission's; the roster tells them what is wanted.

    load    asleep -> started again          unload   no newcomers, who runs may end, then asleep
    wake    somebody waits -> started        idle     nobody for `idle_unload_s` -> asleep
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from router import logs
from router.admission import Admission, Gate, Refusal
from router.config import LimitConfig, RouterConfig
from router.engine_process import EngineSpec
from router.errors import EXIT_FATAL, EXIT_NO_MEMORY, ModelUnloaded, StartError
from router.fleet import Fleet
from router.idle import Use, next_step
from router.memory import EnginePlan
from router.planning import PlannedEngine, PlannedModel, Running
from router.streams import ReplicaState, StreamTable
from router.text.served import ModelTable, ServedModel

TICK_S: Final = 0.05
LOOK_S: Final = 0.02
GRACE_S: Final = 5.0  # between SIGTERM and SIGKILL

T = TypeVar("T")
ModelState = Literal["ready", "loading", "unloading", "unloaded", "asleep", "failed"]


class Processes(Protocol):
    """Who owns the engine processes."""

    def add(self, index: int, spec: EngineSpec) -> None: ...
    async def retire(self, index: int, grace_s: float, *, for_now: bool = False) -> None: ...


class Planner(Protocol):
    """Reads and plans. Slow, so it is called in threads only. `read`, `plan` raise StartError."""

    def read(self) -> RouterConfig:
        """What the operator wants now."""
        ...

    def plan(self, config: RouterConfig, running: Sequence[Running]) -> list[PlannedModel]:
        """See `planning.plan_models`."""
        ...

    def lack(self, engines: Sequence[EnginePlan], device: str) -> str:
        """See `planning.lack`."""
        ...


@dataclass(frozen=True, slots=True)
class Works:
    """What the roster directs. `gates` makes the queues of a model."""

    fleet: Fleet
    processes: Processes
    admission: Admission
    table: ModelTable
    streams: StreamTable
    planner: Planner
    gates: Callable[[ServedModel], tuple[Gate, Gate | None]]


ReplicaRow = tuple[int, str, ReplicaState]  # index, device, state


class ModelView(NamedTuple):
    """One model at one moment, for the operator."""

    names: tuple[str, ...]
    state: ModelState
    replicas: tuple[ReplicaRow, ...]
    needed_bytes: int  # of all its engines, as planned
    waiting: int


class Entry:
    """One model. `engines` are by the indices of their replicas."""

    def __init__(self, planned: PlannedModel, engines: dict[int, PlannedEngine]) -> None:
        self.planned = planned
        self.engines = engines
        self.unloaded = False  # by the operator
        self.busy = False  # in the hands of a change: no idle rule

    @property
    def served(self) -> ServedModel:
        """As clients see it."""
        return self.planned.served

    @property
    def key(self) -> str:
        """What fleet and admission know it by."""
        return self.planned.served.key

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.planned.served.name


class Roster:
    """All models. Changes hold `changing`: one after the other."""

    def __init__(
        self,
        works: Works,
        limits: LimitConfig,
        planned: Sequence[PlannedModel],
        clock: Callable[[], float],
    ) -> None:
        """The fleet was made with the replicas of `planned`, in their order."""
        self.limits = limits  # may be exchanged
        self.changing = asyncio.Lock()
        self._works = works
        self._clock = clock
        self._leaving: set[int] = set()  # replicas whose process is told to end
        self._waking: set[str] = set()  # models for which memory is looked for
        self._tasks: set[asyncio.Task[Any]] = set()
        indices = iter(range(sum(len(model.engines) for model in planned)))
        entries = [
            Entry(model, {next(indices): engine for engine in model.engines}) for model in planned
        ]
        self._entries = {entry.key: entry for entry in entries}
        self._shown = entries

    # -- what is asked

    @property
    def shown(self) -> list[Entry]:
        """The models that clients see."""
        return list(self._shown)

    def find(self, name: str) -> Entry:
        """By any of its names, which is only ever compared. Raises ModelNotFound."""
        return self._entries[self._works.table.find(name).key]

    def view(self, entry: Entry) -> ModelView:
        """As of now."""
        replicas = tuple(self._replica_views(entry))
        needed = sum(engine.plan.total_bytes for engine in entry.engines.values())
        waiting = self._works.admission.waiting(entry.key)
        return ModelView(entry.served.names, self.state(entry), replicas, needed, waiting)

    def _replica_views(self, entry: Entry) -> Iterator[ReplicaRow]:
        for index, engine in entry.engines.items():
            yield index, engine.device, self._works.fleet.replica(index).state

    def state(self, entry: Entry) -> ModelState:
        """What its engines and the operator's wish come to."""
        states = set(self.states(entry))
        if entry.unloaded:
            return "unloaded" if states <= {"asleep"} else "unloading"
        if "serving" in states:
            return "ready"
        if states <= {"asleep"}:
            return "asleep"
        return "failed" if states <= {"parked"} else "loading"

    def states(self, entry: Entry) -> tuple[ReplicaState, ...]:
        """Of its replicas."""
        return tuple(self._works.fleet.replica(index).state for index in entry.engines)

    # -- idle models

    async def run(self) -> None:
        """Looks after idle models until it is cancelled, and what it began with it."""
        try:
            while True:
                self.tick()
                await asyncio.sleep(TICK_S)
        finally:
            for task in list(self._tasks):
                task.cancel()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that goes on though nobody waits for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def tick(self) -> None:
        """Puts models to sleep and wakes them, by the rule of `idle`."""
        for entry in list(self._entries.values()):
            if entry.unloaded or entry.busy or entry.key in self._waking:
                continue
            step = next_step(self._use(entry), self.limits.idle_unload_s, self._clock())
            if step == "sleep":
                logs.info("model_sleeps", model=entry.name)
                self.rest(entry, "nobody asked for it")
            elif step == "wake":
                self._waking.add(entry.key)
                self.spawn(self._wake(entry))

    def _use(self, entry: Entry) -> Use:
        replicas = [self._works.fleet.replica(index) for index in entry.engines]
        since_s = self._works.admission.idle_since_s(entry.key)
        if since_s is not None:
            since_s = max([since_s, *(replica.since_s for replica in replicas)])
        waiting = self._works.admission.waiting(entry.key)
        return Use(tuple(replica.state for replica in replicas), waiting, since_s)

    async def _wake(self, entry: Entry) -> None:
        try:
            logs.info("model_wakes", model=entry.name)
            problem = await self.start(entry, list(entry.engines))
            if problem:
                logs.error("model_cannot_wake", model=entry.name, reason=problem)
                text = f"Model '{entry.name}' cannot be loaded now: {problem}."
                self._works.admission.evict(text, entry.key)
        finally:
            self._waking.discard(entry.key)

    # -- what the operator wants

    async def load(self, name: str) -> ModelView:
        """Starts a model's engines and waits until one serves.

        Raises ModelNotFound, and StartError when they do not fit or do not load: it is unloaded
        then, as before.
        """
        async with self.changing:
            entry = self.find(name)
            with held(entry):
                was_unloaded, entry.unloaded = entry.unloaded, False
                self._works.admission.open(entry.key)
                try:
                    problem = await self.start(entry, list(entry.engines))
                    if problem:
                        raise StartError(problem, EXIT_NO_MEMORY)
                    await self.serves(entry, list(entry.engines))
                except StartError:
                    if was_unloaded:
                        self._close(entry)
                        self._works.admission.evict(_unloaded(entry.name), entry.key, ModelUnloaded)
                        self.rest(entry, "it did not load")
                    raise
                logs.info("model_loaded", model=entry.name)
                return self.view(entry)

    async def unload(self, name: str) -> ModelView:
        """Takes a model's engines away once what runs has ended, or the drain limit has passed.

        Raises ModelNotFound.
        """
        async with self.changing:
            entry = self.find(name)
            with held(entry):
                self._close(entry)
                await self.finish(entry, _unloaded(entry.name), ModelUnloaded)
                self.rest(entry, "unloaded by the operator")
                await self._none_leaves(entry.engines)
                logs.info("model_unloaded", model=entry.name)
                return self.view(entry)

    def _close(self, entry: Entry) -> None:
        entry.unloaded = True
        self._works.admission.close(_unloaded(entry.name), entry.key, ModelUnloaded)

    # -- the steps that changes consist of

    def show(self, entries: Sequence[Entry]) -> None:
        """From now on clients see these."""
        self._shown = list(entries)
        self._works.table.show([entry.served for entry in entries])

    def enter(self, planned: PlannedModel) -> Entry:
        """One more model, asleep and not shown yet."""
        entry = Entry(planned, {})
        self._entries[entry.key] = entry
        gate, embedding_gate = self._works.gates(planned.served)
        self._works.admission.add(gate, embedding_gate)
        for engine in planned.engines:
            self.add_replica(entry, engine)
        return entry

    def inherit(self, old: Entry, new: Entry) -> None:
        """What the operator unloaded stays so under its name."""
        if old.unloaded:
            self._close(new)

    def add_replica(self, entry: Entry, engine: PlannedEngine) -> int:
        """One more engine of it, asleep; returns its replica's index."""
        index = self._works.fleet.add(entry.key)
        entry.engines[index] = engine
        self._works.fleet.rest(index, "it was not started yet")
        return index

    async def start(self, entry: Entry, indices: Collection[int]) -> str:
        """Starts those of its replicas that sleep; returns why it cannot, or ""."""
        await self._none_leaves(indices)
        problem = await self.lack(entry, indices)
        if problem or entry.unloaded or self._entries.get(entry.key) is not entry:
            return problem
        for index in self._sleepers(entry, indices):
            spec, epoch = entry.engines[index].spec, self._works.fleet.replica(index).epoch
            orders = msgspec.structs.replace(spec.config, replica=index, epoch=epoch)
            self._works.fleet.rouse(index)
            self._works.processes.add(index, spec._replace(config=orders))
        return ""

    async def lack(self, entry: Entry, indices: Collection[int]) -> str:
        """Why there is no memory for those of its replicas that sleep, or ""."""
        engines = [entry.engines[index] for index in self._sleepers(entry, indices)]
        for device in dict.fromkeys(engine.device for engine in engines):
            plans = [engine.plan for engine in engines if engine.device == device]
            problem = await asyncio.to_thread(self._works.planner.lack, plans, device)
            if problem:
                return problem
        return ""

    def _sleepers(self, entry: Entry, indices: Collection[int]) -> list[int]:
        fleet = self._works.fleet
        return [
            index
            for index in indices
            if index in entry.engines and fleet.replica(index).state == "asleep"
        ]

    async def serves(self, entry: Entry, indices: Collection[int]) -> None:
        """Waits until one of these replicas serves. Raises StartError when none is going to."""
        while True:
            replicas = [self._works.fleet.replica(index) for index in indices]
            if any(replica.state == "serving" for replica in replicas):
                return
            if not any(replica.state == "starting" for replica in replicas):
                reason = next((r.reason for r in replicas if r.reason), "it has no engine")
                raise StartError(f"'{entry.name}' does not load: {reason}", EXIT_FATAL)
            await asyncio.sleep(LOOK_S)

    async def finish(self, entry: Entry, reason: str, kind: Refusal) -> None:
        """Until nobody uses it, for the drain limit at most; then who is left is told `reason`."""
        admission = self._works.admission
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.drain_timeout_s):
                while admission.idle_since_s(entry.key) is None:
                    states = set(self.states(entry))
                    if states <= {"asleep", "parked"} and not await self._start_last(entry):
                        break  # nobody will serve those who wait
                    await asyncio.sleep(LOOK_S)
        admission.evict(reason, entry.key, kind)
        for index in entry.engines:
            for stream in list(self._works.streams.of_replica(index).values()):
                self._works.fleet.cut(stream, reason, "abort")

    async def _start_last(self, entry: Entry) -> bool:
        """For those who came to a sleeper just before it was taken away."""
        indices = list(entry.engines)
        if entry.unloaded or not self._sleepers(entry, indices):
            return False
        return not await self.start(entry, indices)

    def rest(self, entry: Entry, reason: str) -> None:
        """Its replicas sleep from now on; their processes end meanwhile."""
        for index in entry.engines:
            if self._works.fleet.replica(index).state != "asleep":
                self._works.fleet.rest(index, reason)
                self._leaving.add(index)
                self.spawn(self._retire(index))

    async def _retire(self, index: int) -> None:
        try:
            await self._works.processes.retire(index, GRACE_S, for_now=True)
        finally:
            self._leaving.discard(index)

    async def _none_leaves(self, indices: Collection[int]) -> None:
        while not self._leaving.isdisjoint(indices):  # noqa: ASYNC110 - several tasks end it
            await asyncio.sleep(LOOK_S)

    async def drop(self, entry: Entry, index: int, reason: str) -> None:
        """Takes one replica away for good; others of the model go on with its streams."""
        self._works.fleet.hand_over(index, reason)
        await self._none_leaves([index])
        await self._works.processes.retire(index, GRACE_S)
        del entry.engines[index]
        self._works.fleet.remove(index)

    async def leave(self, entry: Entry, reason: str, kind: Refusal) -> None:
        """Takes a whole model away that is not shown any more, after those who use it."""
        await self.finish(entry, reason, kind)
        self._works.admission.close(reason, entry.key, kind)
        for index in list(entry.engines):
            await self.drop(entry, index, reason)
        del self._entries[entry.key]
        self._works.admission.remove(entry.key)
        self._works.table.forget(entry.key)


@contextlib.contextmanager
def held(entry: Entry) -> Generator[None]:
    """The idle rule leaves it alone meanwhile."""
    entry.busy = True
    try:
        yield
    finally:
        entry.busy = False


def _unloaded(name: str) -> str:
    return (
        f"Model '{name}' was unloaded by the operator; POST /admin/models/{name}/load brings it "
        "back."
    )
