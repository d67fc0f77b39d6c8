"""Reports of engines that were misjudged, of strangers at their socket and of floods in the log."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import zmq

from engine import protocol
from router.link import IpcLink
from tests.router_process import RouterProcess, Start, text_of, tiny_model, until
from tests.serving import wait_for

HANG_S = 30.0
TEXT = "The quick brown fox jumps over the lazy dog. " * 2


def listening_on(router: RouterProcess) -> str:
    """Its URL, also before it is ready."""

    def url() -> str:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes():
                return f"http://127.0.0.1:{int(fields[1].split(':')[1], 16)}"
        return ""

    def inodes() -> set[str]:
        found: set[str] = set()
        for each in Path(f"/proc/{router.popen.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.readlink(each))
        return found

    router.wait_for("engine_loading")
    wait_for(lambda: bool(url()), HANG_S)
    return url()


# -- A8: busy is not dead


def test_a8_a_long_load_and_a_long_step_are_not_deaths(start: Start) -> None:
    step = {"kind": "slow_step", "seconds": 2.0, "announce": True}
    rule = {"match": {"contains": "long"}, "reply": TEXT, "faults": [step]}
    script = {"rules": [rule], "load_s": 1.5}
    router = start("--hang-timeout", "0.5", script=script)
    base = listening_on(router)
    slowest_s = 0.0
    seen: list[tuple[int, ...]] = []

    def probe() -> None:
        nonlocal slowest_s
        codes: list[int] = []
        for name in ("live", "ready", "started"):
            begin_s = time.monotonic()
            codes.append(httpx.get(f"{base}/health/{name}", trust_env=False).status_code)
            slowest_s = max(slowest_s, time.monotonic() - begin_s)
        if codes not in map(list, seen[-1:]):
            seen.append(tuple(codes))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        while not router.events("ready"):
            probe()
        running = pool.submit(router.complete, "long", max_tokens=80)
        while not running.done():
            probe()
        assert running.result().json()["choices"][0]["text"] == TEXT[:80]
    assert seen[0] == (200, 503, 503)
    assert seen[-1] == (200, 200, 200)
    assert all(live == 200 for live, _, _ in seen)
    sys.stdout.write(f"A8: slowest probe {slowest_s * 1e3:.0f} ms\n")
    assert slowest_s < 10
    assert router.events("engine_died") == []


# -- A12: what is wrong with a model is said by name


def test_a12_each_model_tells_its_own_state(start: Start, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    faults = [
        {"kind": "fatal", "reason": "unknown layer", "code": 78, "replica": 1},
        {"kind": "never_ready", "replica": 2},
    ]
    models = ("--models", f"good={model},bad={model},late={model}")
    router = start(
        "--on-fatal", "wait", *models, script={"start_faults": faults}, gpus="cpu,cpu,cpu"
    )
    base = listening_on(router)

    def ask(name: str) -> httpx.Response:
        body = {"model": name, "prompt": "hi", "max_tokens": 2}
        return httpx.post(f"{base}/v1/completions", json=body, trust_env=False, timeout=60)

    wait_for(lambda: ask("good").status_code == 200, HANG_S)
    for name, states in (("bad", ("dead", "starting", "parked")), ("late", ("starting",))):
        answer = ask(name)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        message = answer.json()["error"]["message"]
        assert message.startswith(f"Model '{name}' is ")
        assert any(f" is {state} since " in message for state in states), message
    wait_for(lambda: "unknown layer" in str(router.events("engine_died")), HANG_S)
    assert ask("nobody").status_code == 404
    assert ask("good").status_code == 200


# -- A18: strangers at the doors


def strange_frames() -> Iterator[list[bytes]]:
    """Messages that no engine of ours would send."""
    stats = protocol.Stats()
    yield [b""]
    yield [os.urandom(300)]
    yield [b"GET / HTTP/1.1\r\n\r\n"]
    yield [b"", b"", b"x"]
    yield [protocol.encode(protocol.Pong(1, 1, stats))]
    yield [protocol.encode(protocol.Fatal(1, "made up", 70))]
    yield [protocol.encode(protocol.Pong(1, 1, stats))[:-3]]
    yield [bytes(2**20)]


def test_a18_strangers_get_nothing_and_change_nothing(start: Start) -> None:
    rules = [{"match": "*", "reply": TEXT, "tokens_per_s": 100}]
    router = start(script={"rules": rules})
    assert router.url
    (path,) = (each for each in router.runtime.rglob("*") if each.is_socket())
    door = str(path.parent.relative_to(router.runtime) / path.name)
    short = f"{router._link}/{door}"
    lines = len(router.log.splitlines())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(streamed, router) for _ in range(4)]
        wait_for(lambda: router.metric("router_requests_running") == 4, HANG_S)
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(short)
                with contextlib.suppress(OSError):
                    raw.sendall(os.urandom(2000))
        with zmq.Context() as context:
            for identity in (b"stranger", protocol_identity(1), protocol_identity(2)):
                with context.socket(zmq.DEALER) as peer:
                    peer.setsockopt(zmq.IDENTITY, identity)
                    peer.linger = 500
                    peer.connect(f"ipc://{short}")
                    for parts in strange_frames():
                        peer.send_multipart(parts)
                    assert peer.poll(200) == 0  # nobody answers
        for garbage in (
            os.urandom(500),
            b"\x16\x03\x01" + bytes(200),
            b"SSH-2.0-x\r\n",
            b"\r\n" * 50,
        ):
            for _ in range(5):
                with contextlib.suppress(OSError), socket.create_connection(door_of(router)) as raw:
                    raw.sendall(garbage)
        for stream in streams:
            assert text_of(stream.result(60)) == TEXT
    assert router.events("engine_died") == []
    assert router.metric("router_ipc_stale_frames_total") >= 8
    assert len(router.log.splitlines()) - lines < 15  # four of them for the requests
    assert router.complete("after").json()["choices"][0]["text"] == TEXT[:16]


def door_of(router: RouterProcess) -> tuple[str, int]:
    url = urlsplit(router.url)
    return url.hostname or "", url.port or 0


def protocol_identity(epoch: int) -> bytes:
    """The name of replica 0's engine, known to whoever read the source."""
    from engine.config import EngineConfig

    return EngineConfig(
        endpoint="", replica=0, epoch=epoch, model="", device="cpu", threads=1
    ).identity


def streamed(router: RouterProcess) -> list[Any]:
    with router.stream("go", max_tokens=200) as events:
        return list(events)


# -- A24: what a socket does with messages that nobody takes


async def test_a24_unsent_messages_hold_up_neither_the_router_nor_its_end(tmp_path: Path) -> None:
    """See also the tests of the link: a full queue is told, and no message is lost."""
    short = Path("/tmp") / f"qa{os.getpid()}"
    short.symlink_to(tmp_path)
    link = IpcLink()
    try:
        endpoint = link.open([short])
        context = zmq.Context()
        peer = context.socket(zmq.DEALER)
        peer.setsockopt(zmq.IDENTITY, b"e")
        peer.linger = 0
        peer.connect(endpoint)
        await until(lambda: link.send(b"e", b"0") == "sent")
        sent = 0
        while link.send(b"e", bytes(2000)) == "sent":  # it never reads
            sent += 1
            assert sent < 50_000
        assert link.send(b"e", b"x") == "full"
        peer.close()
        context.term()
        # what it did not take may stay "full"; its successor has another name, and is reached
        with zmq.Context() as context, context.socket(zmq.DEALER) as next_one:
            next_one.setsockopt(zmq.IDENTITY, b"e2")
            next_one.linger = 0
            next_one.connect(endpoint)
            await until(lambda: link.send(b"e2", b"hello") == "sent")
            assert await asyncio.to_thread(next_one.recv) == b"hello"
    finally:
        begin_s = time.monotonic()
        await asyncio.wait_for(asyncio.to_thread(link.close), HANG_S)
        took_s = time.monotonic() - begin_s
        sys.stdout.write(f"A24: closed in {took_s:.3f} s after {sent} frames\n")
        short.unlink()


# -- A26: logs that drown


def test_a26_probes_are_silent_and_a_crash_is_one_report(start: Start) -> None:
    slow = {"match": "*", "reply": TEXT, "tokens_per_s": 20, "faults": []}
    router = start("--max-concurrency", "8", script={"rules": [slow]})
    assert router.url
    lines = len(router.log.splitlines())
    with httpx.Client(base_url=router.url, trust_env=False) as client:
        for _ in range(100):
            for path in ("/health", "/health/live", "/metrics", "/v1/models"):
                assert client.get(path).status_code == 200
    assert len(router.log.splitlines()) == lines
    # 40 wait or run as the engine dies; then they leave
    bodies = [{"model": "tiny", "prompt": f"{n}", "max_tokens": 400} for n in range(40)]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:

        def post(body: dict[str, Any]) -> None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{router.url}/v1/completions", json=body, trust_env=False, timeout=2)

        running = [pool.submit(post, body) for body in bodies]
        wait_for(lambda: router.metric("router_requests_waiting") >= 20, HANG_S)
        os.kill(router.engine_pid(0), signal.SIGKILL)
        for each in running:
            each.result(60)
    wait_for(lambda: len(router.events("request")) == 40, HANG_S)
    log = router.log.splitlines()[lines:]
    assert "Traceback" not in router.log
    assert len(router.events("engine_died")) == 1
    assert len(log) <= 40 + 5


def test_a26_equal_warnings_are_counted(shared: RouterProcess) -> None:
    before = len(shared.log.splitlines())
    for _ in range(200):
        with socket.create_connection(door_of(shared)) as raw:
            raw.sendall(b"no http at all\r\n\r\n")
            assert b" 400 " in raw.recv(4096)
    assert len(shared.log.splitlines()) - before <= 3


@pytest.mark.parametrize("parent", ["runtime", "tmpdir"])
def test_a20_long_paths(tmp_path: Path, start: Start, parent: str) -> None:
    """A socket's path ends at 107 bytes: folders of the user's choice must not make it longer."""
    long = tmp_path / ("l" * 120)
    long.mkdir()
    folder = tmp_path / ("m" * 200) / "models"
    folder.mkdir(parents=True)
    name = {"runtime": "XDG_RUNTIME_DIR", "tmpdir": "TMPDIR"}[parent]
    router = start("--models", f"tiny={tiny_model(folder)}", script={}, env={name: str(long)})
    assert router.complete("hello", max_tokens=5).json()["choices"][0]["text"] == "hello"
    router.signal(signal.SIGTERM)
    assert router.wait(HANG_S) == 0
    assert list(long.iterdir()) == []
