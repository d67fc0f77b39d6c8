"""The engine processes: start, watch, restart with back-off, report each crash once, stop.

Owns the processes and their standard streams. Must not know messages, HTTP or models: what it
learns (a process started, a process gone) it tells the `Engines`, which own the replica states.

Each engine is a fresh interpreter in a session of its own. Its standard input is a pipe whose only
writer is the router: one line of configuration, and its end-of-file means that the router is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from engine.config import EngineConfig, encode_config
from router import logs
from router.errors import EXIT_CONFIG, EXIT_FATAL, EXIT_NO_MEMORY, StartError
from router.metrics import Metrics
from router.streams import ReplicaState, Stream

TAIL_LINES: Final = 40
LINE_CHARS: Final = 4000
CRASH_LOOP: Final = 5  # crashes in a row without SERVICE_S of service
SERVICE_S: Final = 60.0
FIRST_DELAY_S, LONGEST_DELAY_S, JITTER = 0.5, 30.0, 0.2
KILL_S: Final = 2.0
OOM_SCORE_ADJ: Final = 500  # beyond the router's own: the kernel takes an engine, not the router

# What an engine may know of our environment: where things are, never a key, a token or a proxy.
ENVIRONMENT: Final = re.compile(
    r"PATH|HOME|LANG|LANGUAGE|LC_\w+|TMPDIR|TZ|VIRTUAL_ENV|XDG_CACHE_HOME"
    r"|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH|CC|CXX"
    r"|PYTHON(PATH|HOME|HASHSEED|DONTWRITEBYTECODE|UTF8|FAULTHANDLER|PYCACHEPREFIX)"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE)|TRANSFORMERS_OFFLINE|TORCH_HOME|TRITON_CACHE_DIR"
    r"|CUDA_(HOME|PATH|CACHE_PATH|MODULE_LOADING|LAUNCH_BLOCKING)"
    r"|ROUTER_INSTANCE|NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES)|PYTORCH_(CUDA_)?ALLOC_CONF"
)


class EngineSpec(NamedTuple):
    """How to start one replica; `config.epoch` is filled in at each start."""

    model: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    config: EngineConfig


class Engines(Protocol):
    """Who owns the replica states."""

    def start(self, index: int, epoch: int, identity: bytes) -> None: ...
    def lose(self, index: int, reason: str) -> list[Stream]: ...
    def park(self, index: int, reason: str) -> None: ...
    def last_words(self, index: int) -> tuple[str, int] | None: ...


class Death(NamedTuple):
    """How a process ended. `code` as in subprocess: negative is the signal's number."""

    code: int
    served_s: float  # 0 if it never became ready
    condemned: str  # why we killed it, or ""
    out_of_memory: bool  # the kernel's OOM killer struck meanwhile
    last_words: tuple[str, int] | None
    tail: tuple[str, ...]


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


def engine_environment(environ: Mapping[str, str], *, threads: int, device: str) -> dict[str, str]:
    """The allow-listed part of `environ`, the planned threads, and the one device it may see.

    `device` is "cpu", an index in PCI bus order, or a UUID.
    """
    kept = {name: value for name, value in environ.items() if ENVIRONMENT.fullmatch(name)}
    return {
        **kept,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device,
        "PYTHONUNBUFFERED": "1",
        # Weights and KV on huge pages: measured 3 to 6 % off a decode step on the CPU (glibc only).
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


def _oom_kills() -> int:
    """How often the kernel's OOM killer struck on this machine; 0 where it does not tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


class EngineProcess:
    """One running engine. Created by `launch`; `exited` must be awaited, which also reaps it."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.condemned = ""
        self.ready_s: float | None = None
        self.gone = asyncio.Event()
        self.oom_kills_before = _oom_kills()

    @staticmethod
    def launch(spec: EngineSpec, epoch: int) -> EngineProcess:
        """Raises OSError when the command cannot be run."""
        process = EngineProcess(
            subprocess.Popen(
                spec.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(spec.environment),
                start_new_session=True,
                bufsize=0,
            )
        )
        with contextlib.suppress(OSError):  # it may be gone already; that is seen by `exited`
            own = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
            score = str(min(1000, own + OOM_SCORE_ADJ))
            Path(f"/proc/{process.popen.pid}/oom_score_adj").write_text(score, encoding="ascii")
        with contextlib.suppress(OSError):
            assert process.popen.stdin is not None
            process.popen.stdin.write(
                encode_config(msgspec.structs.replace(spec.config, epoch=epoch))
            )
        return process

    def send_signal(self, number: int) -> None:
        """To the engine and whatever it started; not once it is gone."""
        if not self.gone.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, number)

    def condemn(self, reason: str) -> None:
        """Kill it because of `reason`."""
        self.condemned = self.condemned or reason
        self.send_signal(signal.SIGKILL)

    async def exited(self) -> int:
        """Waits for the end, kills what it left behind, reaps it; returns the code."""
        await _process_end(self.popen)
        self.send_signal(signal.SIGKILL)  # its children: the group lives as long as it is unreaped
        self.gone.set()
        code = self.popen.wait()
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        return code

    async def relay(self, sink: Callable[[str], None]) -> None:
        """Passes its output on, line by line, and remembers the last ones."""
        output = self.popen.stdout
        assert output is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), output
        )
        rest = b""
        try:
            while data := await reader.read(65536):
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > LINE_CHARS:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._line(line, sink)
            if rest:
                self._line(rest, sink)
        finally:
            transport.close()

    def _line(self, line: bytes, sink: Callable[[str], None]) -> None:
        text = line[:LINE_CHARS].decode("utf-8", "replace").rstrip()
        self.tail.append(text)
        sink(text)


async def _process_end(popen: subprocess.Popen[bytes]) -> None:
    """Returns when the process has ended, without reaping it."""
    if not hasattr(os, "pidfd_open"):
        await asyncio.to_thread(os.waitid, os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(popen.pid)
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


class _Keeper:
    """The task that keeps one replica's process. `is_first`: the router was started with it."""

    def __init__(self, *, is_first: bool) -> None:
        self.is_first = is_first
        self.stop = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


async def _end(processes: Sequence[EngineProcess], grace_s: float) -> None:
    """SIGTERM, SIGKILL after `grace_s`. One that even SIGKILL does not end (stuck in a driver) is
    left after `KILL_S`."""
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_S)):
        for process in processes:
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                for process in processes:
                    await process.gone.wait()


class Supervisor:
    """Keeps one process per spec running until it is retired, or all are stopped.

    `on_fatal(error)` is called once when the router has to end: a first load failed, or every
    replica is parked.
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
        self._specs = dict(enumerate(specs))
        self._engines = engines
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._clock = clock
        self._random = random.Random()
        self._over = asyncio.Event()  # nothing is added any more
        self._group = asyncio.TaskGroup()
        self._keepers = {index: _Keeper(is_first=True) for index in self._specs}
        self._processes: dict[int, EngineProcess] = {}
        self._parked: set[int] = set()
        self._resting: set[int] = set()
        self._loading: dict[str, asyncio.Lock] = {}  # one load at a time on a card
        self._loaders: dict[str, int] = {}  # who holds that lock
        self.failure: asyncio.Future[StartError] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Returns after `stop` or a failure, when no process is left."""
        async with self._group:
            for index in self._specs:
                self._begin(index)
            await self._over.wait()

    def add(self, index: int, spec: EngineSpec) -> None:
        """One more, or one that rested. It counts its starts from `spec.config.epoch` on.

        That it cannot load is no reason to end the router.
        """
        if self._over.is_set():
            return
        self._specs[index] = spec
        self._resting.discard(index)
        self._keepers[index] = _Keeper(is_first=False)
        self._begin(index)

    async def retire(self, index: int, grace_s: float, *, for_now: bool = False) -> None:
        """Ends its process and forgets it; `for_now`: it rests, and will be added again."""
        (self._resting.add if for_now else self._resting.discard)(index)
        keeper = self._keepers.get(index)
        if keeper is None:
            return
        keeper.stop.set()
        process = self._processes.get(index)
        if process is not None:
            await _end([process], grace_s)
        elif keeper.task is not None:
            keeper.task.cancel()  # it waits for its turn to load
        if keeper.task is not None:
            await asyncio.wait([keeper.task])
        self._keepers.pop(index, None)
        self._specs.pop(index, None)
        self._parked.discard(index)

    def _begin(self, index: int) -> None:
        self._keepers[index].task = self._group.create_task(
            self._keep(index), name=f"engine {index}"
        )

    def changed(self, index: int, state: ReplicaState, reason: str) -> None:
        """The state of a replica changed: remember its service, kill what was given up."""
        process = self._processes.get(index)
        if process is None:
            return
        if state == "serving":
            process.ready_s = self._clock()
            self._end_load(index)
        elif state in ("hung", "dead") and not process.gone.is_set():
            process.condemn(reason)

    @property
    def pids(self) -> dict[int, int]:
        """The process of each replica that has one now."""
        return {index: process.popen.pid for index, process in self._processes.items()}

    def signal_all(self, number: int) -> None:
        """One signal to every engine; also safe within a signal handler."""
        for process in list(self._processes.values()):
            process.send_signal(number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to all, SIGKILL after `grace_s`. Returns when all are gone.

        A process that even SIGKILL does not end (stuck in a driver) is left after `KILL_S`.
        """
        self._over.set()
        for keeper in self._keepers.values():
            keeper.stop.set()
        await _end(list(self._processes.values()), grace_s)

    async def _keep(self, index: int) -> None:
        spec, keeper = self._specs[index], self._keepers[index]
        epoch, streak, first_load = spec.config.epoch, 0, keeper.is_first
        while not keeper.stop.is_set():
            await self._begin_load(index)
            if keeper.stop.is_set():
                self._end_load(index)
                break
            epoch += 1
            try:
                death = await self._live(index, epoch)
            except OSError as error:
                death = Death(EXIT_CONFIG, 0.0, "", False, (_cannot_run(spec, error), 78), ())
            finally:
                self._end_load(index)
            lost = self._engines.lose(index, sentence(death))
            if keeper.stop.is_set():
                break
            first_load = first_load and death.served_s == 0
            streak = 1 if death.served_s >= SERVICE_S else streak + 1
            verdict = judge(
                streak,
                first_load=first_load,
                on_fatal=self._on_fatal,
                jitter=self._random.uniform(-1, 1),
            )
            self._report(index, epoch, death, lost, verdict)
            if verdict.action != "restart":
                self._give_up(index, death)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(verdict.delay_s):
                    await keeper.stop.wait()

    async def _live(self, index: int, epoch: int) -> Death:
        spec = self._specs[index]
        process = EngineProcess.launch(spec, epoch)
        self._processes[index] = process
        identity = msgspec.structs.replace(spec.config, epoch=epoch).identity
        self._engines.start(index, epoch, identity)
        logs.info(
            "engine_loading", replica=index, model=spec.model, epoch=epoch, pid=process.popen.pid
        )
        async with asyncio.TaskGroup() as group:
            relay = group.create_task(process.relay(lambda line: _relay_line(index, line)))
            code = await process.exited()
            await asyncio.wait([relay], timeout=0.5)  # a grandchild may hold the pipe open
            relay.cancel()
        self._processes.pop(index)
        served_s = 0.0 if process.ready_s is None else self._clock() - process.ready_s
        return Death(
            code,
            served_s,
            process.condemned,
            _oom_kills() > process.oom_kills_before,
            self._engines.last_words(index),
            tuple(process.tail),
        )

    def _report(
        self, index: int, epoch: int, death: Death, lost: list[Stream], verdict: Verdict
    ) -> None:
        """The one report of this crash."""
        model = self._specs[index].model
        self._metrics.restarts.labels(model, str(index), cause(death)).inc()
        logs.error(
            "engine_died",
            replica=index,
            model=model,
            epoch=epoch,
            cause=cause(death),
            reason=sentence(death),
            served_s=round(death.served_s, 3),
            next=verdict.action,
            delay_s=round(verdict.delay_s, 2),
            in_flight=len(lost),
            requests=" ".join(sorted({stream.request_id for stream in lost})),
            tail=" | ".join(death.tail[-8:]),
        )

    def _give_up(self, index: int, death: Death) -> None:
        self._parked.add(index)
        self._engines.park(index, sentence(death))
        everything = len(self._parked) == len(self._specs) and not self._resting
        never = death.served_s == 0 and self._keepers[index].is_first
        if self._on_fatal == "exit" and (never or everything) and not self.failure.done():
            name = self._specs[index].model
            what = f"engine {index} ({name}) failed: {sentence(death)}"
            self.failure.set_result(StartError(what, exit_code(death)))
            self._over.set()

    async def _begin_load(self, index: int) -> None:
        device = self._device(index)
        if device:
            await self._loading.setdefault(device, asyncio.Lock()).acquire()
            self._loaders[device] = index

    def _end_load(self, index: int) -> None:
        device = self._device(index)
        if self._loaders.get(device) == index:
            del self._loaders[device]
            self._loading[device].release()

    def _device(self, index: int) -> str:
        return self._specs[index].environment.get("CUDA_VISIBLE_DEVICES", "")


def _cannot_run(spec: EngineSpec, error: OSError) -> str:
    return f"--engine-command: cannot run '{spec.command[0]}' ({error.strerror})"


def _relay_line(index: int, line: str) -> None:
    if line:
        logs.info("engine_says", replica=index, line=line)
