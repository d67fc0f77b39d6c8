"""One engine process: its start, its output, what it holds, its end.

Owns the process and its standard streams. Must not know replicas' states, messages or when to
start anew. Each engine is a fresh interpreter in a session of its own. Its standard input is a
pipe whose only writer is the router: one line of configuration, and its end-of-file means that the
router is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from engine.config import EngineConfig, encode_config
from router.crash import Memory
from router.memory import free_memory_bytes

TAIL_LINES: Final = 40
LINE_CHARS: Final = 4000
KILL_S: Final = 2.0
LOOK_S: Final = 1.0
OOM_SCORE_ADJ: Final = 500  # beyond the router's own: the kernel takes an engine, not the router


class EngineSpec(NamedTuple):
    """How to start one replica; `config.epoch` is filled in at each start."""

    model: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    config: EngineConfig


def oom_kills() -> int:
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
        self.oom_kills_before = oom_kills()
        self.memory = Memory()  # at the last look

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
        with contextlib.suppress(OSError, ValueError):  # it may be gone: that is seen by `exited`
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

    async def watch(self) -> None:
        """Looks at its memory again and again: once it is gone there is nothing to see any more."""
        while True:
            self.memory = memory_of(str(self.popen.pid)) or self.memory
            await asyncio.sleep(LOOK_S)

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


async def end_all(processes: Sequence[EngineProcess], grace_s: float) -> None:
    """SIGTERM, SIGKILL after `grace_s`. One that even SIGKILL does not end (stuck in a driver) is
    left after `KILL_S`."""
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_S)):
        for process in processes:
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                for process in processes:
                    await process.gone.wait()


def memory_of(pid: str) -> Memory | None:
    """Of a process ("self": ours); None if there is none, or none that still has memory."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (
            Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        ):
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                sizes[name] = int(value.split()[0]) * 1024
    if "VmRSS" not in sizes:
        return None
    return Memory(sizes["VmRSS"], sizes.get("VmHWM", 0), free_memory_bytes())
