"""The engine processes: start, watch, restart with back-off, report each crash once, stop.

Owns which process belongs to which replica, and what each replica's processes have come to. Must
not know messages, HTTP or models: what it learns (a process started, a process gone) it tells the
`Engines`, which own the replica states. How an end is judged is in `crash`, one process in
`engine_process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from router import logs
from router.crash import (
    SERVICE_S,
    CrashReport,
    Death,
    exit_code,
    is_from_outside,
    judge,
    report,
    sentence,
)
from router.engine_process import EngineProcess, EngineSpec, end_all, oom_kills
from router.errors import EXIT_CONFIG, StartError
from router.metrics import Metrics
from router.streams import Remains, ReplicaState, Stream

GRACE_S: Final = 5.0  # between SIGTERM and SIGKILL
KEPT_REPORTS: Final = 5  # of each replica

# What an engine may know of our environment: where things are, never a key, a token or a proxy.
ENVIRONMENT: Final = re.compile(
    r"PATH|HOME|LANG|LANGUAGE|LC_\w+|TMPDIR|TZ|VIRTUAL_ENV|XDG_CACHE_HOME"
    r"|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH|CC|CXX"
    r"|PYTHON(PATH|HOME|HASHSEED|DONTWRITEBYTECODE|UTF8|FAULTHANDLER|PYCACHEPREFIX)"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE)|TRANSFORMERS_OFFLINE|TORCH_HOME|TRITON_CACHE_DIR"
    r"|CUDA_(HOME|PATH|CACHE_PATH|MODULE_LOADING|LAUNCH_BLOCKING)"
    r"|ROUTER_INSTANCE|NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES)|PYTORCH_(CUDA_)?ALLOC_CONF"
)


class Engines(Protocol):
    """Who owns the replica states."""

    def start(self, index: int, epoch: int, identity: bytes) -> None: ...
    def lose(self, index: int, reason: str, *, outside: bool = False) -> list[Stream]: ...
    def park(self, index: int, reason: str) -> None: ...
    def rouse(self, index: int) -> None: ...
    def remains(self, index: int) -> Remains: ...


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What any process of ours may know: the allow-listed part of `environ`."""
    return {name: value for name, value in environ.items() if ENVIRONMENT.fullmatch(name)}


def engine_environment(environ: Mapping[str, str], *, threads: int, device: str) -> dict[str, str]:
    """That, the planned threads, and the one device it may see.

    `device` is "cpu", an index in PCI bus order, or a UUID.
    """
    return {
        **child_environment(environ),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device,
        "PYTHONUNBUFFERED": "1",
        # Weights and KV on huge pages: measured 3 to 6 % off a decode step on the CPU (glibc only).
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


Wish = Literal["run", "park", "end"]


class Life(NamedTuple):
    """What a replica's processes have come to. `pid` is None while there is none."""

    pid: int | None = None
    device: str = ""
    restarts: int = 0
    crashes_in_a_row: int = 0
    crashes: tuple[CrashReport, ...] = ()  # the latest ones, oldest first


class _Keeper:
    """One replica's processes, and what is wanted of them.

    `is_first`: the router was started with it, so that it ends with a load that fails.
    """

    def __init__(self, spec: EngineSpec, *, is_first: bool) -> None:
        self.spec = spec
        self.is_first = is_first
        self.epoch = spec.config.epoch
        self.starts = 0
        self.streak = 0  # crashes without SERVICE_S of service in between
        self.has_served = False
        self.crashes: deque[CrashReport] = deque(maxlen=KEPT_REPORTS)
        self.wish: Wish = "run"
        self.reason = ""  # of the wish
        self.asked = asyncio.Event()  # since the last start: its end is no crash then
        self.process: EngineProcess | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def device(self) -> str:
        """The card it may see, empty for the CPU."""
        return self.spec.environment.get("CUDA_VISIBLE_DEVICES", "")

    def ask(self, wish: Wish, reason: str) -> None:
        """From now on this is wanted."""
        self.wish = wish
        self.reason = reason
        self.asked.set()


class Supervisor:
    """Keeps one process per replica running until it is parked or retired, or all are stopped.

    `failure` is set once when the router has to end: a first load failed, or every replica is
    parked.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        engines: Engines,
        metrics: Metrics,
        *,
        on_fatal: Literal["exit", "wait"],
        clock: Callable[[], float],
    ) -> None:
        """Replica i is started as specs[i] says."""
        self._engines = engines
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._clock = clock
        self._random = random.Random()
        self._over = asyncio.Event()  # nothing is added any more
        self._group = asyncio.TaskGroup()
        self._keepers = {i: _Keeper(spec, is_first=True) for i, spec in enumerate(specs)}
        self._resting: set[int] = set()
        self._loading: dict[str, asyncio.Lock] = {}  # one load at a time on a card
        self._loaders: dict[str, int] = {}  # who holds that lock
        self.failure: asyncio.Future[StartError] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Returns after `stop`, when no process is left."""
        async with self._group:
            for index in self._keepers:
                self._begin(index)
            await self._over.wait()

    def life(self, index: int) -> Life:
        """What is known of its processes; nothing of one that rests."""
        keeper = self._keepers.get(index)
        if keeper is None:
            return Life()
        pid = None if keeper.process is None else keeper.process.popen.pid
        restarts = max(0, keeper.starts - 1)
        device = keeper.device or "cpu"
        return Life(pid, device, restarts, keeper.streak, tuple(keeper.crashes))

    def keeps(self, index: int) -> bool:
        """Can `restart` and `park` be asked for?"""
        keeper = self._keepers.get(index)
        return keeper is not None and keeper.wish != "end"

    # -- what is wanted

    def add(self, index: int, spec: EngineSpec) -> None:
        """One more, or one that rested. It counts its starts from `spec.config.epoch` on.

        That it cannot load is no reason to end the router.
        """
        if self._over.is_set():
            return
        self._resting.discard(index)
        self._keepers[index] = _Keeper(spec, is_first=False)
        self._begin(index)

    async def retire(self, index: int, grace_s: float, *, for_now: bool = False) -> None:
        """Ends its process and forgets it; `for_now`: it rests, and will be added again."""
        (self._resting.add if for_now else self._resting.discard)(index)
        keeper = self._keepers.get(index)
        if keeper is None:
            return
        keeper.ask("end", "it is not needed any more")
        if keeper.process is not None:
            await end_all([keeper.process], grace_s)
        elif keeper.task is not None:
            keeper.task.cancel()  # it waits for its turn to load, or is parked
        if keeper.task is not None:
            await asyncio.wait([keeper.task])
        self._keepers.pop(index, None)

    def restart(self, index: int, reason: str = "a restart was asked for") -> None:
        """A new process in place of the one it has (SIGTERM, SIGKILL after `GRACE_S`).

        One that waits after a crash, or is parked, starts at once; earlier crashes are forgiven.
        Raises KeyError for one that is not kept.
        """
        self._ask(index, "run", reason)
        self._keepers[index].streak = 0

    def park(self, index: int, reason: str) -> None:
        """Its process ends, and none is started until `restart`. Raises KeyError as that."""
        self._ask(index, "park", reason)

    def _ask(self, index: int, wish: Wish, reason: str) -> None:
        keeper = self._keepers[index]
        if self._over.is_set() or keeper.wish == "end":
            return
        keeper.ask(wish, reason)
        if keeper.process is not None:
            self._group.create_task(end_all([keeper.process], GRACE_S), name=f"end {index}")

    def changed(self, index: int, state: ReplicaState, reason: str) -> None:
        """The state of a replica changed: remember its service, kill what was given up."""
        keeper = self._keepers.get(index)
        if keeper is None or keeper.process is None:
            return
        if state == "serving":
            keeper.process.ready_s = self._clock()
            self._end_load(index)
        elif state in ("hung", "dead") and not keeper.process.gone.is_set():
            keeper.process.condemn(reason)

    @property
    def pids(self) -> dict[int, int]:
        """The process of each replica that has one now."""
        return {i: each.process.popen.pid for i, each in self._keepers.items() if each.process}

    def signal_all(self, number: int) -> None:
        """One signal to every engine; also safe within a signal handler."""
        for keeper in list(self._keepers.values()):
            if keeper.process is not None:
                keeper.process.send_signal(number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to all, SIGKILL after `grace_s`. Returns when all are gone.

        A process that even SIGKILL does not end (stuck in a driver) is given up: nobody waits for
        it any more.
        """
        self._over.set()
        for keeper in self._keepers.values():
            keeper.ask("end", "the server is stopping")
        await end_all([k.process for k in self._keepers.values() if k.process], grace_s)
        for keeper in self._keepers.values():
            if keeper.task and keeper.process and not keeper.process.gone.is_set():
                keeper.task.cancel()

    # -- one replica

    def _begin(self, index: int) -> None:
        keeper = self._keepers[index]
        keeper.task = self._group.create_task(self._keep(index, keeper), name=f"engine {index}")

    async def _keep(self, index: int, keeper: _Keeper) -> None:
        while keeper.wish != "end":
            if keeper.wish == "park":
                await self._rest(index, keeper)
                continue
            await self._begin_load(index)
            try:
                if keeper.wish != "run":
                    continue
                keeper.asked.clear()
                death = await self._live(index, keeper)
            except OSError as error:
                death = Death(
                    EXIT_CONFIG, 0.0, "", False, (_cannot_run(keeper.spec, error), 78), ()
                )
            finally:
                self._end_load(index)
            keeper.has_served = keeper.has_served or death.served_s > 0
            if keeper.asked.is_set():
                self._engines.lose(index, keeper.reason)
            else:
                self._engines.lose(index, sentence(death), outside=is_from_outside(death))
                await self._after_crash(index, keeper, death)

    async def _rest(self, index: int, keeper: _Keeper) -> None:
        """Parked, until something else is wanted."""
        keeper.asked.clear()
        self._engines.park(index, keeper.reason)
        await keeper.asked.wait()
        if keeper.wish == "run":
            self._engines.rouse(index)

    async def _live(self, index: int, keeper: _Keeper) -> Death:
        """From the start of a process to its end."""
        spec = keeper.spec
        keeper.epoch += 1
        keeper.starts += 1
        process = keeper.process = EngineProcess.launch(spec, keeper.epoch)
        identity = msgspec.structs.replace(spec.config, epoch=keeper.epoch).identity
        self._engines.start(index, keeper.epoch, identity)
        pid = process.popen.pid
        logs.info("engine_loading", replica=index, model=spec.model, epoch=keeper.epoch, pid=pid)
        async with asyncio.TaskGroup() as group:
            relay = group.create_task(process.relay(lambda line: _relay_line(index, line)))
            watch = group.create_task(process.watch())
            code = await process.exited()
            await asyncio.wait([relay], timeout=0.5)  # a grandchild may hold the pipe open
            relay.cancel()
            watch.cancel()
        keeper.process = None
        return Death(
            code,
            0.0 if process.ready_s is None else self._clock() - process.ready_s,
            process.condemned,
            oom_kills() > process.oom_kills_before,
            self._engines.remains(index).words,
            tuple(process.tail),
            process.memory,
        )

    async def _after_crash(self, index: int, keeper: _Keeper, death: Death) -> None:
        """Judges and reports it, and waits as long as that says."""
        keeper.streak = 1 if death.served_s >= SERVICE_S else keeper.streak + 1
        verdict = judge(
            keeper.streak,
            first_load=keeper.is_first and not keeper.has_served,
            on_fatal=self._on_fatal,
            jitter=self._random.uniform(-1, 1),
        )
        remains = self._engines.remains(index)
        told = report(death, remains, verdict, epoch=keeper.epoch, now=self._clock())
        keeper.crashes.append(told)
        model = keeper.spec.model
        self._metrics.restarts.labels(model, str(index), told.cause).inc()
        logs.error("engine_died", replica=index, model=model, **told.fields())
        if verdict.action != "restart":
            keeper.ask("park", sentence(death))
            self._judge_all(index, keeper, death)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(verdict.delay_s):
                await keeper.asked.wait()

    def _judge_all(self, index: int, keeper: _Keeper, death: Death) -> None:
        """One replica is given up: is that the end of the router?"""
        parked = all(each.wish == "park" for each in self._keepers.values())
        everything = parked and not self._resting
        never = death.served_s == 0 and keeper.is_first
        if self._on_fatal == "exit" and (never or everything) and not self.failure.done():
            what = f"engine {index} ({keeper.spec.model}) failed: {sentence(death)}"
            self.failure.set_result(StartError(what, exit_code(death)))

    async def _begin_load(self, index: int) -> None:
        device = self._keepers[index].device
        if device:
            await self._loading.setdefault(device, asyncio.Lock()).acquire()
            self._loaders[device] = index

    def _end_load(self, index: int) -> None:
        device = self._keepers[index].device
        if self._loaders.get(device) == index:
            del self._loaders[device]
            self._loading[device].release()


def _cannot_run(spec: EngineSpec, error: OSError) -> str:
    return f"--engine-command: cannot run '{spec.command[0]}' ({error.strerror})"


def _relay_line(index: int, line: str) -> None:
    if line:
        logs.info("engine_says", replica=index, line=line)
