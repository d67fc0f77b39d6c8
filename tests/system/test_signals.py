"""Signals: drain with a deadline, at once for the second, nothing left, codes as promised.

The matrix of situations and signals (R15) is in test_lifelines.py.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.router_process import (
    FAKE_ENGINE,
    ROOT,
    RouterProcess,
    Start,
    free_port,
    text_of,
    tiny_model,
    wait_gone,
)

pytestmark = pytest.mark.slow

SLOW = {"tokens_per_s": 20, "rules": [{"match": "*", "reply": "abc ", "repeat": True}]}


class Client(threading.Thread):
    """One streamed completion in a thread of its own; `begun` is set by its first token."""

    def __init__(self, router: RouterProcess, max_tokens: int) -> None:
        super().__init__()
        self.router, self.max_tokens = router, max_tokens
        self.begun = threading.Event()
        self.events: list[Any] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.router.stream("go", max_tokens=self.max_tokens) as events:
                for event in events:
                    self.events.append(event)
                    self.begun.set()
        except httpx.HTTPError as error:
            self.error = error
        self.begun.set()

    def finish(self) -> list[Any]:
        self.join(60)
        assert not self.is_alive()
        return self.events


def begin(router: RouterProcess, number: int, max_tokens: int) -> list[Client]:
    clients = [Client(router, max_tokens) for _ in range(number)]
    for client in clients:
        assert client.begun.wait(60)
    return clients


def test_running_requests_finish_and_newcomers_are_refused(start: Start) -> None:
    router = start(script=SLOW, gpus="cpu,cpu")
    clients = begin(router, 4, max_tokens=40)
    router.signal(signal.SIGTERM)
    router.wait_for("draining")
    refused = router.complete(max_tokens=1)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["connection"] == "close"
    health = httpx.get(f"{router.url}/health/ready", trust_env=False)
    assert health.status_code == 503
    assert httpx.get(f"{router.url}/health/live", trust_env=False).status_code == 200
    for client in clients:
        events = client.finish()
        assert events[-1] == "[DONE]"
        assert text_of(events) == "abc " * 10
    assert router.wait() == 0
    assert router.leftovers() == []


def test_queued_requests_are_served_before_the_end(start: Start) -> None:
    router = start("--max-concurrency", "1", script=SLOW)
    clients = begin(router, 1, max_tokens=80)  # four seconds: the others come meanwhile
    clients += [Client(router, 4) for _ in range(2)]
    deadline_s = time.monotonic() + 60
    while router.metric("router_requests_waiting") < 2:
        assert time.monotonic() < deadline_s
    router.signal(signal.SIGTERM)
    assert [text_of(client.finish()) for client in clients] == ["abc " * 20, "abc ", "abc "]
    assert router.wait() == 0


def test_a5_the_deadline_cuts_endless_streams_with_an_error_event(start: Start) -> None:
    router = start("--drain-timeout", "0.5", script=SLOW, gpus="cpu,cpu")
    clients = begin(router, 5, max_tokens=2000)
    begin_s = time.monotonic()
    router.signal(signal.SIGTERM)
    for client in clients:
        *_, error, done = client.finish()
        assert error["error"]["code"] == "server_is_overloaded"
        assert error["error"]["message"] == "The server is stopping."
        assert done == "[DONE]"
        assert client.error is None
    assert router.wait() == 0
    assert time.monotonic() - begin_s < 60
    assert router.leftovers() == []
    assert router.events("streams_cut")[0]["streams"] == 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a5_the_second_signal_ends_endless_streams_now(
    start: Start, number: int, code: int
) -> None:
    router = start(script=SLOW, gpus="cpu,cpu")
    clients = begin(router, 5, max_tokens=2000)
    router.signal(number)
    router.wait_for("draining")
    begin_s = time.monotonic()
    router.signal(number)
    assert router.wait() == code
    assert time.monotonic() - begin_s < 60
    for client in clients:
        assert client.finish()[-1] == "[DONE]"
    assert router.leftovers() == []


@pytest.mark.parametrize("delay_s", [0.1, 0.2, 0.3, 0.4, 0.6])
def test_at_any_moment_of_the_start(start: Start, delay_s: float) -> None:
    router = start(script={}, gpus="cpu,cpu")
    time.sleep(delay_s)
    router.signal(signal.SIGTERM)
    code = router.wait()
    assert code == 0 or (code == -signal.SIGTERM and not router.log)
    assert router.leftovers() == []


@pytest.mark.parametrize("moment", ["load", "idle", "streams"])
def test_a1_kill_9_of_the_router_ends_the_engines(start: Start, moment: str) -> None:
    router = start(script={**SLOW, "load_s": 100 if moment == "load" else 0}, gpus="cpu,cpu")
    router.wait_for("engine_loading", 2)
    if moment == "streams":
        begin(router, 5, max_tokens=2000)
    elif moment == "idle":
        assert router.url
    router.popen.kill()
    router.wait()
    # Promised is 1 s (an interpreter must be up to notice): the rest is for slow machines.
    assert wait_gone(router.engine_pids, 30) == []


def test_sigusr1_logs_the_state(start: Start) -> None:
    router = start(script=SLOW)
    begin(router, 3, max_tokens=200)
    router.signal(signal.SIGUSR1)
    router.wait_for("state_tasks", 3)  # the last ones
    (state,) = router.events("state")
    assert (state["phase"], state["streams"]) == ("ready", 3)
    assert state["rss_bytes"] > 10e6
    (replica,) = router.events("state_replica")
    assert (replica["state"], replica["running"]) == ("serving", 3)
    assert (replica["pid"], replica["blocks_total"]) == (router.engine_pid(0), 4096)
    assert replica["rss_bytes"] > 10e6
    streams = router.events("state_stream")
    assert [stream["prompt_tokens"] for stream in streams] == [2, 2, 2]
    assert router.events("state_queue")[0]["used"] == 3
    assert router.events("state_descriptors")[0]["open"] > 10
    stacks = " ".join(event["stack"] for event in router.events("state_tasks"))
    assert "_pulse" in stacks
    assert '"go"' not in router.log  # a prompt


def test_sigquit_shows_all_stacks_and_aborts(start: Start) -> None:
    """Also those of an engine that is stuck in a step."""
    script = {"rules": [{"match": "*", "faults": [{"kind": "slow_step", "seconds": 600}]}]}
    router = start(script=script, gpus="cpu,cpu")
    clients = [Client(router, 5)]
    deadline_s = time.monotonic() + 60
    while router.metric("router_requests_running") == 0:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    router.signal(signal.SIGQUIT)
    assert router.wait(60) == -signal.SIGABRT
    assert "cli.py" in router.log
    said = [event["line"] for event in router.events("engine_says")]
    assert sum("Current thread" in line for line in said) == 2
    assert any("_play_on_process" in line for line in said)
    assert wait_gone(router.engine_pids, 5) == []
    clients[0].finish()


class ServiceManager:
    """What systemd would hear."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(60)

    def wait_for(self, word: str) -> None:
        while not any(word in lines for lines in self.heard):
            self.heard.append(self._socket.recv(65536).decode())

    def close(self) -> None:
        self._socket.close()


def test_the_service_manager_is_told(start: Start, tmp_path: Path) -> None:
    manager = ServiceManager(tmp_path)
    env = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "2000000"}
    config = tmp_path / "router.toml"
    config.write_text("drain-timeout = 1\n")
    router = start("--config", str(config), script={**SLOW, "load_s": 2}, env=env)
    manager.wait_for("STATUS=starting: 0 of 1 engines serve")
    manager.wait_for("EXTEND_TIMEOUT_USEC=")
    manager.wait_for("READY=1")
    manager.wait_for("STATUS=ready: 1 of 1 engines serve, 0 requests running, 0 waiting")
    manager.heard.clear()
    manager.wait_for("WATCHDOG=1")
    environ = Path(f"/proc/{router.engine_pid(0)}/environ").read_text()
    assert "NOTIFY_SOCKET" not in environ
    client = begin(router, 1, max_tokens=2000)[0]
    router.signal(signal.SIGHUP)
    manager.heard.clear()
    manager.wait_for("RELOADING=1\nMONOTONIC_USEC=")
    manager.wait_for("READY=1")
    router.signal(signal.SIGTERM)
    manager.heard.clear()
    manager.wait_for("STOPPING=1\nEXTEND_TIMEOUT_USEC=")
    client.finish()
    assert router.wait() == 0
    manager.close()


def test_r23_a_standard_error_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    port = free_port()
    script = tmp_path / "script.json"
    script.write_text("{}")
    engine = f"{sys.executable} {FAKE_ENGINE} --script {script}"
    words = ["--models", f"tiny={tiny_model(tmp_path)}", "--gpus", "cpu", "--port", str(port)]
    router = subprocess.Popen(
        [sys.executable, "-m", "router.cli", *words, "--engine-command", engine],
        cwd=ROOT,
        stderr=writer,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 5}
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            for _ in range(600):
                try:
                    if client.get("/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            for _ in range(60):  # some 12 kB of log lines
                assert client.post("/v1/completions", json=body).status_code == 200
        router.send_signal(signal.SIGTERM)
        assert router.wait(60) == 0
    finally:
        router.kill()
        router.wait()
        os.close(reader)
        os.close(writer)
