"""Signals: drain with a deadline, at once for the second, nothing left, codes as promised."""

from __future__ import annotations

import fcntl
import os
import signal
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_idle(start: Start, number: int) -> None:
    router = start(script={}, gpus="cpu,cpu")
    assert router.url
    router.signal(number)
    assert router.wait() == 0
    assert router.leftovers() == []


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
    clients = begin(router, 1, max_tokens=80)  # four seconds for the others to arrive
    clients += [Client(router, 4) for _ in range(2)]
    deadline_s = time.monotonic() + 60
    while router.metric("router_requests_waiting") < 2:
        assert time.monotonic() < deadline_s
    router.signal(signal.SIGTERM)
    assert [text_of(client.finish()) for client in clients] == ["abc " * 20, "abc ", "abc "]
    assert router.wait() == 0


def test_the_deadline_cuts_with_an_error_event(start: Start) -> None:
    router = start("--drain-timeout", "0.5", script=SLOW, gpus="cpu,cpu")
    clients = begin(router, 4, max_tokens=2000)
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
    assert router.events("streams_cut")[0]["streams"] == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_it_now(start: Start, number: int, code: int) -> None:
    router = start(script=SLOW, gpus="cpu,cpu")
    clients = begin(router, 4, max_tokens=2000)
    router.signal(number)
    router.wait_for("draining")
    begin_s = time.monotonic()
    router.signal(number)
    assert router.wait() == code
    assert time.monotonic() - begin_s < 60
    for client in clients:
        assert client.finish()[-1] == "[DONE]"
    assert router.leftovers() == []


def test_during_the_load(start: Start) -> None:
    router = start(script={"load_s": 100})
    router.wait_for("engine_loading")
    router.signal(signal.SIGTERM)
    assert router.wait() == 0
    assert router.leftovers() == []


@pytest.mark.parametrize("delay_s", [0.1, 0.2, 0.3, 0.4, 0.6])
def test_at_any_moment_of_the_start(start: Start, delay_s: float) -> None:
    router = start(script={}, gpus="cpu,cpu")
    time.sleep(delay_s)
    router.signal(signal.SIGTERM)
    code = router.wait()
    assert code == 0 or (code == -signal.SIGTERM and not router.log)
    assert router.leftovers() == []


def test_while_an_engine_hangs(start: Start) -> None:
    """It heeds no SIGTERM: it is killed after five seconds."""
    rule = {"match": "*", "faults": [{"kind": "hang"}]}
    router = start("--drain-timeout", "0.3", script={"rules": [rule]})
    assert router.url
    client = Client(router, 5)
    while router.metric("router_requests_running") == 0:
        time.sleep(0.02)
    router.signal(signal.SIGTERM)
    assert router.wait() == 0
    assert client.finish()[-1] == "[DONE]" or client.error is not None
    assert router.leftovers() == []


def test_while_an_engine_restarts(start: Start) -> None:
    router = start("--on-fatal", "wait", script={"start_faults": [{"kind": "crash"}]})
    router.wait_for("engine_died", 3)
    router.signal(signal.SIGTERM)
    assert router.wait() == 0
    assert router.leftovers() == []


def test_a_client_that_never_reads_does_not_hold_the_end(start: Start) -> None:
    script = {"rules": [{"match": "*", "reply": "x" * 64, "repeat": True}]}
    router = start("--drain-timeout", "0.5", script=script)
    with router.stream("go", max_tokens=2000):
        router.signal(signal.SIGTERM)
        assert router.wait() == 0
    assert router.leftovers() == []


@pytest.mark.parametrize("moment", ["load", "idle", "streams"])
def test_kill_9_of_the_router_ends_the_engines(start: Start, moment: str) -> None:
    router = start(script={**SLOW, "load_s": 100 if moment == "load" else 0}, gpus="cpu,cpu")
    router.wait_for("engine_loading", 2)
    if moment == "streams":
        begin(router, 4, max_tokens=2000)
    elif moment == "idle":
        assert router.url
    router.popen.kill()
    router.wait()
    # Promised is 1 s (an interpreter must be up to notice): the rest is for slow machines.
    assert wait_gone(router.engine_pids, 30) == []


def test_sigusr1_logs_the_state(start: Start) -> None:
    router = start(script={})
    assert router.url
    router.signal(signal.SIGUSR1)
    router.wait_for("state_queue")
    assert router.events("state_replica")[0]["state"] == "serving"


def test_a_standard_error_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
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
