"""A real `router` process for system tests: started on a free port, stopped by a signal.

    with serve("--models", str(folder), script={"rules": [...]}) as server:
        httpx.get(server.url + "/v1/models")

With `script` the engines are tools/fake_engine.py playing it. Leaving the block sends SIGTERM and
asserts that the exit code is 0 and that no process of the router is left.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
FAKE_ENGINE = ROOT / "tools" / "fake_engine.py"
START_LIMIT_S = 60.0
STOP_LIMIT_S = 60.0


def is_engine(process: psutil.Process) -> bool:
    """Of a router's children."""
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and "router.text.grammar_process" not in process.cmdline()
    except psutil.NoSuchProcess:
        return False


class Server:
    """A running router. `url` is set once it is ready."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.lines: list[str] = []
        self._known: dict[int, psutil.Process] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log lines so far that are events, as dicts."""
        found: list[dict[str, Any]] = []
        for line in list(self.lines):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and name in (None, event.get("event")):
                found.append(event)
        return found

    def engines(self) -> list[psutil.Process]:
        """The engine processes now, oldest first; none of those that compile grammars."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        children.sort(key=lambda child: child.create_time())
        self._known |= {child.pid: child for child in children}
        return [child for child in children if is_engine(child)]

    def metric(self, name: str) -> float:
        """The sum of one metric over all its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        values = [
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith((f"{name} ", f"{name}{{"))
        ]
        return sum(values)

    def wait_ready(self, limit_s: float = START_LIMIT_S) -> None:
        """Until it says that it is ready. Raises AssertionError with its log."""
        wait_for(
            lambda: bool(self.events("ready")) or self.process.poll() is not None, limit_s, self
        )
        assert self.process.poll() is None, self.log()
        self.url = self.events("ready")[0]["url"]
        self.engines()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, waits for the end, and returns the exit code; nothing may be left."""
        self.engines()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait_end()

    def wait_end(self) -> int:
        """Waits for an end that was asked for; returns the exit code. Nothing may be left."""
        code = self.process.wait(STOP_LIMIT_S)
        self._reader.join(30)
        self.assert_nothing_left()
        return code

    def assert_nothing_left(self, limit_s: float = 30.0) -> None:
        """No engine that was ever seen still runs. Kills what is, so that one failure is enough."""
        deadline_s = time.monotonic() + limit_s
        alive = list(self._known.values())
        while (alive := [p for p in alive if runs(p)]) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        for process in alive:
            process.kill()
        assert not alive, f"left running: {alive}\n{self.log()}"

    def log(self) -> str:
        """All of its standard error."""
        return "\n".join(self.lines)


def runs(process: psutil.Process) -> bool:
    """A zombie is dead: after the router only the system's first process can reap it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def serve(
    *words: str,
    script: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    ready: bool = True,
    clean: bool = True,
) -> Iterator[Server]:
    """Runs `router WORDS… --port 0`, with CPU engines unless --gpus is given.

    `clean`: it must still run at the end of the block, and end with 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "router.cli",
            *words,
            "--port",
            "0",
            "--log-format",
            "json",
        ]
        if "--gpus" not in words:
            command += ["--gpus", "cpu"]
        if script is not None:
            file = Path(folder) / "script.json"
            file.write_text(json.dumps(script))
            engine = [sys.executable, str(FAKE_ENGINE), "--script", str(file)]
            command += ["--engine-command", shlex.join(engine)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        server = Server(process)
        try:
            if ready:
                server.wait_ready()
            yield server
            if clean:
                assert process.poll() is None, server.log()
                assert server.stop() == 0, server.log()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            server.assert_nothing_left()
            assert process.stderr is not None
            server._reader.join(30)
            process.stderr.close()


def wait_for(
    condition: Callable[[], bool], limit_s: float = 60.0, server: Server | None = None
) -> None:
    """Polls until `condition()`. Raises AssertionError at the limit, with the server's log."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {limit_s} s\n{server.log() if server else ''}")
        time.sleep(0.02)
