"""The router under test: its process, its engines, its numbers.

Owns reading them: metrics over HTTP, memory and descriptors from /proc, events from its log.
`tests/serving.py` starts and stops it. Must not know what is asked of the router.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from tests.serving import Server, serve

SETTLE_S: Final = 30.0  # for what is promised at once: the rest is for a busy machine
RESTART_S: Final = 180.0
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
_MEMORY = re.compile(r"^(?:RssAnon|VmSwap):\s+(\d+) kB$", re.MULTILINE)


class Sample(dict[str, dict[str, float]]):
    """One scrape: by the metric's name, by its labels as they are written."""

    def total(self, name: str) -> float:
        """Over all labels; 0 if there is none."""
        return sum(self.get(name, {}).values())

    def with_label(self, name: str, label: str) -> float:
        """Over the labels that contain `label`."""
        return sum(value for labels, value in self.get(name, {}).items() if label in labels)


def parse(text: str) -> Sample:
    """The text exposition format."""
    sample = Sample()
    for line in text.splitlines():
        if found := _SAMPLE.match(line):
            sample.setdefault(found[1], {})[found[2] or ""] = float(found[3])
    return sample


def busy(sample: Sample) -> bool:
    """Does any request run or wait, or hold a permit or a block?"""
    names = ("permits_used", "requests_waiting", "requests_running", "kv_blocks_held")
    return any(sample.total(f"router_{name}") for name in names)


class Router:
    """A router process that is ready."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = server.url
        self.pid = server.process.pid
        self._lines_read = 0
        self._events: dict[str, list[dict[str, Any]]] = {}

    def events(self, name: str) -> list[dict[str, Any]]:
        """The logged events of that name, in order; each line is read once."""
        lines = self.server.lines
        while self._lines_read < len(lines):
            line = lines[self._lines_read]
            self._lines_read += 1
            if not line.startswith("{") or '"request_id"' in line:
                continue  # many, and no row asks for them
            try:
                event = json.loads(line)
            except ValueError:
                continue
            self._events.setdefault(event.get("event", ""), []).append(event)
        return self._events.get(name, [])

    async def kill(self, replica: int) -> float:
        """SIGKILL to the replica's engine, which must run; returns the moment.

        Comes back when the router knows of it: until then it counts the replica among those that
        serve, and who looked for the next victim could find this one.
        """
        pid = await self._engine(replica)
        if pid is None:
            raise ValueError(f"replica {replica} has no engine to kill")
        now_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(SETTLE_S):
            while await self._engine(replica) == pid:  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.005)
        return now_s

    async def _engine(self, replica: int) -> int | None:
        """The process of its engine, as the router knows it now."""
        async with httpx.AsyncClient(trust_env=False, timeout=SETTLE_S) as client:
            rows = (await client.get(f"{self.url}/admin/replicas")).json()["data"]
        return next(row["pid"] for row in rows if row["id"] == replica)

    async def sample(self) -> Sample:
        """A scrape of its metrics."""
        async with httpx.AsyncClient(trust_env=False, timeout=SETTLE_S) as client:
            return parse((await client.get(f"{self.url}/metrics")).text)

    async def serving(self) -> int:
        """Replicas that take requests now."""
        return int((await self.sample()).with_label("router_engine_state", 'state="serving"'))

    async def until_serving(self, count: int, limit_s: float = RESTART_S) -> float:
        """Waits for so many replicas; returns the seconds. Raises TimeoutError."""
        began_s = time.monotonic()
        async with asyncio.timeout(limit_s):
            while await self.serving() < count:  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.05)
        return time.monotonic() - began_s

    async def until_idle(self, limit_s: float = SETTLE_S) -> float:
        """Waits until nothing runs or waits; returns the seconds. Raises TimeoutError."""
        began_s = time.monotonic()
        async with asyncio.timeout(limit_s):
            while busy(await self.sample()):  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.05)
        return time.monotonic() - began_s

    async def tasks(self) -> int:
        """Tasks of its event loop, as the dump of its state tells."""
        before = len(self.events("state"))
        self.server.process.send_signal(signal.SIGUSR1)
        async with asyncio.timeout(SETTLE_S):
            while len(self.events("state")) <= before:  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.02)
        return int(self.events("state")[-1].get("tasks", 0))

    def resident_bytes(self) -> int:
        """Its own memory: RssAnon + VmSwap."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii", errors="replace")
        return 1024 * sum(int(kib) for kib in _MEMORY.findall(status))

    def descriptors(self) -> int:
        """That it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def running(
    *words: str, script: Mapping[str, Any] | None = None, clean: bool = True
) -> Iterator[Router]:
    """A router with these arguments; at the end it must stop in order, with nothing left."""
    with serve(*words, script=script, clean=clean) as server:
        yield Router(server)


def paced(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Says "row done/total" once a minute, and never more often."""
    told_s = time.monotonic()

    def progress(done: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= 60:
            told_s = time.monotonic()
            say(f"{done:,} of {total:,}")

    return progress
