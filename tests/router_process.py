"""A whole router as a process for system tests: real HTTP, real sockets, real (fake) engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tools.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
FAKE_ENGINE = ROOT / "tools" / "fake_engine.py"
START_S = 60.0


class RouterProcess:
    """`python -m router.cli` with `arguments`; its log goes to a file in `folder`.

    `script` makes tools/fake_engine.py the engine, with a tiny model written into `folder`.
    `shell` is run by sh just before, in the same process: limits, closed descriptors. `log` is
    where the router is told to write its log; its standard error is not the log then.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        script: dict[str, Any] | None = None,
        gpus: str = "cpu",
        env: dict[str, str] | None = None,
        shell: str = "",
        log: Path | None = None,
    ) -> None:
        self._url = ""
        self.log_path = folder / f"router-{time.monotonic_ns()}.log"
        self.runtime = folder / "run"
        self.runtime.mkdir(exist_ok=True)
        words = ["sh", "-c", f'{shell}; exec "$@"', "sh"] if shell else []
        words += [sys.executable, "-m", "router.cli", "--port", "0", "--gpus", gpus]
        words += ["--log-format", "json"]
        if script is not None:
            script_path = folder / f"script-{time.monotonic_ns()}.json"
            script_path.write_text(json.dumps(script))
            engine = f"{sys.executable} {FAKE_ENGINE} --script {script_path}"
            words += ["--engine-command", engine]
            if not {"--models", "--config"} & set(arguments):
                words += ["--models", f"tiny={tiny_model(folder)}"]
        environ = {**os.environ, "XDG_RUNTIME_DIR": self._runtime_dir(), **(env or {})}
        if log is not None:
            words += ["--log-file", str(log)]
        with self.log_path.open("wb") as output:
            self.popen = subprocess.Popen(
                [*words, *arguments], cwd=ROOT, stderr=output, stdout=output, env=environ
            )
        self.output_path = self.log_path
        if log is not None:
            self.log_path = log

    def _runtime_dir(self) -> str:
        """pytest's folders are too long for a socket: a short link to ours."""
        self._link = Path("/tmp") / f"rt{os.getpid()}-{time.monotonic_ns() % 10**9}"
        self._link.symlink_to(self.runtime)
        return str(self._link)

    # -- the log

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def events(self, name: str) -> list[dict[str, Any]]:
        """The logged events of that name, in order."""
        lines = [line for line in self.log.splitlines() if line.startswith("{")]
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in found if event["event"] == name]

    def wait_for(self, name: str, count: int = 1, limit_s: float = START_S) -> list[dict[str, Any]]:
        """Until that event was logged `count` times."""
        end_s = time.monotonic() + limit_s
        while len(events := self.events(name)) < count:
            if self.popen.poll() is not None and len(self.events(name)) < count:
                raise AssertionError(f"the router left with {self.popen.returncode}:\n{self.log}")
            if time.monotonic() > end_s:
                raise AssertionError(f"no {count} events {name!r} in {limit_s} s:\n{self.log}")
            time.sleep(0.02)
        return events

    @property
    def url(self) -> str:
        """Where it is ready."""
        self._url = self._url or str(self.wait_for("ready")[0]["url"])
        return self._url

    @property
    def engine_pids(self) -> list[int]:
        """Of all engines that were ever started."""
        return [int(event["pid"]) for event in self.events("engine_loading")]

    def engine_pid(self, replica: int) -> int:
        """Of the replica's latest engine."""
        events = [e for e in self.events("engine_loading") if e["replica"] == replica]
        return int(events[-1]["pid"])

    # -- requests

    def complete(self, prompt: str = "hello", **fields: Any) -> httpx.Response:
        """One plain completion."""
        body = {"model": "tiny", "prompt": prompt, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, trust_env=False)

    @contextlib.contextmanager
    def stream(self, prompt: str, **fields: Any) -> Iterator[Iterator[Any]]:
        """The events of one streamed completion, "[DONE]" included."""
        body = {"model": "tiny", "prompt": prompt, "stream": True, **fields}
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
            response.raise_for_status()
            yield sse_events(response)

    def metric(self, name: str) -> float:
        """Sum over all series of that exact name."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for value in values)

    # -- the end

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def wait(self, limit_s: float = 60.0) -> int:
        return self.popen.wait(limit_s)

    def leftovers(self) -> list[str]:
        """What must not be there after the end: engine processes and files."""
        left = [f"engine {pid}" for pid in self.engine_pids if is_running(pid)]
        return left + [str(path) for path in self.runtime.iterdir()]

    def close(self) -> None:
        """Kills what a failed test left."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        for pid in self.engine_pids:
            if is_running(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._link.unlink(missing_ok=True)


Start = Callable[..., RouterProcess]


def starting(folder: Path) -> Iterator[Start]:
    """For a fixture: starts routers, and ends those that a test leaves."""
    routers: list[RouterProcess] = []

    def make(*arguments: str, **options: Any) -> RouterProcess:
        routers.append(RouterProcess(folder, *arguments, **options))
        return routers[-1]

    try:
        yield make
    finally:
        for router in routers:
            router.close()


def sse_events(response: httpx.Response) -> Iterator[Any]:
    """Decoded `data:` lines; the last one is the text "[DONE]"."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def text_of(events: list[Any]) -> str:
    """The text of a streamed completion."""
    chunks = [e for e in events if isinstance(e, dict) and "choices" in e]
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"])


def is_running(pid: int) -> bool:
    """Is there such a process that is no zombie?"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_gone(pids: list[int], limit_s: float) -> list[int]:
    """Those of `pids` that still run after `limit_s`."""
    end_s = time.monotonic() + limit_s
    while (alive := [pid for pid in pids if is_running(pid)]) and time.monotonic() < end_s:
        time.sleep(0.01)
    return alive


async def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Waits for a condition that other tasks or processes bring about."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - it may depend on other processes
            await asyncio.sleep(0.01)


def tiny_model(folder: Path) -> Path:
    """A model folder with one token per byte."""
    path = folder / "tiny"
    return path if path.exists() else write_tiny_model(path)


def free_port() -> int:
    """A port that was free a moment ago, and that no other test's `--port 0` is given meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)  # below those that the kernel gives out
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_router(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, float]:
    """(exit code, output, seconds) of a command line that is expected to end by itself."""
    begin_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "router.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin_s
