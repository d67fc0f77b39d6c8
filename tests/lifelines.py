"""Ends of a router, wanted and unwanted, and what they may leave: for tests and for long runs.

`shut_down` plays one cell of the matrix of situations and signals, `kill_router_once` one SIGKILL
at a random moment. Both return what was measured; who calls them judges. Everything runs on the
fake engine, in a folder of the caller's.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.router_process import RouterProcess, wait_gone
from tests.serving import wait_for

DRAIN_S: Final = 1.0
HANG: Final = {"rules": [{"match": "*", "faults": [{"kind": "hang"}]}]}
SLOW: Final = {"tokens_per_s": 20, "rules": [{"match": "*", "reply": "abc ", "repeat": True}]}
FAST: Final = {"rules": [{"match": "*", "reply": "abc ", "repeat": True}]}
FATAL: Final = {"start_faults": [{"kind": "crash"}]}

ENDINGS: Final[Mapping[str, tuple[signal.Signals, ...]]] = {
    "TERM": (signal.SIGTERM,),
    "INT": (signal.SIGINT,),
    "HUP": (signal.SIGHUP,),
    "INT INT": (signal.SIGINT, signal.SIGINT),
    "TERM TERM": (signal.SIGTERM, signal.SIGTERM),
}


def measured(text: str) -> None:
    """A figure for who runs the tests with -s."""
    sys.stdout.write(f"\n{text}\n")


class RawClient:
    """A streamed completion on a bare socket: sent, and read only by `read`."""

    def __init__(self, router: RouterProcess, **fields: Any) -> None:
        body = {"model": "tiny", "prompt": "go", "stream": True, "max_tokens": 2000, **fields}
        data = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(60)
        self._socket.connect(("127.0.0.1", int(router.url.rpartition(":")[2])))
        self._socket.sendall(head.encode() + data)

    def read(self) -> bytes:
        """All that came until the end; a reset is an end, too."""
        parts: list[bytes] = []
        try:
            while part := self._socket.recv(65536):
                parts.append(part)
        except OSError:
            pass
        self._socket.close()
        return b"".join(parts)

    def close(self) -> None:
        """Whatever it still was to get."""
        self._socket.close()


@dataclass(frozen=True)
class Situation:
    """How to bring a router into a state: its command line, its engines' script, what to await.

    `decided`: a second signal always comes before the first one's end. `cut`: its streams end with
    an error and [DONE].
    """

    script: Mapping[str, Any]
    enter: Callable[[RouterProcess], list[RawClient]]
    words: tuple[str, ...] = ()
    gpus: str = "cpu"
    decided: bool = False
    cut: bool = False


def _idle(router: RouterProcess) -> list[RawClient]:
    assert router.url
    return []


def _load(router: RouterProcess) -> list[RawClient]:
    clients = [RawClient(router) for _ in range(5)]
    wait_for(lambda: router.metric("router_requests_running") == 5, 60)
    return clients


def _loading(router: RouterProcess) -> list[RawClient]:
    router.wait_for("engine_loading")
    return []


def _restarting(router: RouterProcess) -> list[RawClient]:
    router.wait_for("engine_died", 2)
    return []


def _hung(router: RouterProcess) -> list[RawClient]:
    clients = [RawClient(router)]
    wait_for(lambda: router.metric("router_requests_running") == 1, 60)
    return clients


def _full_queue(router: RouterProcess) -> list[RawClient]:
    clients = [RawClient(router) for _ in range(4)]  # one of them is refused
    wait_for(lambda: router.metric("router_requests_waiting") == 2, 60)
    return clients


def _slow_reader(router: RouterProcess) -> list[RawClient]:
    clients = [RawClient(router, n=16, logprobs=5, max_tokens=4000)]  # 3.7 MB at least
    time.sleep(1)
    assert router.events("request") == []  # it would have ended, if it were read
    return clients


SITUATIONS: Final[Mapping[str, Situation]] = {
    "idle": Situation({}, _idle, gpus="cpu,cpu"),
    "load": Situation(SLOW, _load, decided=True, cut=True),
    "loading": Situation({"load_s": 60}, _loading),
    "restarting": Situation(FATAL, _restarting, ("--on-fatal", "wait")),
    "hung": Situation(HANG, _hung, decided=True, cut=True),
    "full queue": Situation(
        SLOW, _full_queue, ("--max-concurrency", "1", "--max-queue", "2"), decided=True
    ),
    "slow reader": Situation(FAST, _slow_reader, decided=True),
}


@dataclass(frozen=True)
class Shutdown:
    """One cell of the matrix. `left` names processes and files that should not be there."""

    situation: str
    ending: str
    code: int
    codes: tuple[int, ...]  # as promised
    took_s: float  # from the last signal on
    limit_s: float  # deadline + 2 s
    left: list[str]
    unfinished: int  # streams without their end


def shut_down(folder: Path, situation: str, ending: str) -> Shutdown:
    """Starts a router in `folder`, brings it into the situation, and ends it."""
    folder.mkdir(exist_ok=True)
    place, numbers = SITUATIONS[situation], ENDINGS[ending]
    words = ("--drain-timeout", str(DRAIN_S), *place.words)
    router = RouterProcess(folder, *words, script=dict(place.script), gpus=place.gpus)
    try:
        clients = place.enter(router)
        router.signal(numbers[0])
        if len(numbers) > 1 and place.decided:
            router.wait_for("draining")
        for number in numbers[1:]:
            router.signal(number)
        begin_s = time.monotonic()
        code = router.wait(120)
        took_s = time.monotonic() - begin_s
        answers = [client.read() for client in clients]
        ends = (b"[DONE]", b"HTTP/1.1 503")
        unfinished = sum(not any(end in answer for end in ends) for answer in answers)
        clean, forced = (0,), (128 + numbers[-1],)
        codes = clean if len(numbers) == 1 else forced if place.decided else clean + forced
        limit_s = (0 if len(numbers) > 1 and place.decided else DRAIN_S) + 2
        left = router.leftovers()
        checks = unfinished if place.cut else 0
        return Shutdown(situation, ending, code, codes, took_s, limit_s, left, checks)
    finally:
        router.close()


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of a router."""

    after_s: float  # of its life
    engines: int  # that it had then
    gone_s: float  # until none was left
    left: list[int]  # engines that were not gone in time


def kill_router_once(folder: Path, rng: Random, limit_s: float = 60.0) -> Kill:
    """Starts a router, kills it at a random moment of its start or of its work, awaits its engines.

    The runtime folder is the same each time, so that each start finds what the last kill left.
    """
    router = RouterProcess(folder, script=SLOW, gpus="cpu,cpu")
    begin_s = time.monotonic()
    clients: list[RawClient] = []
    try:
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 3))
        else:
            clients = [RawClient(router) for _ in range(4)]
            time.sleep(rng.uniform(0, 0.5))
        router.popen.kill()
        killed_s = time.monotonic()
        router.wait()
        engines = {*marked_engines(router.runtime), *router.engine_pids}
        left = wait_gone(sorted(engines), limit_s)
        return Kill(killed_s - begin_s, len(engines), time.monotonic() - killed_s, left)
    finally:
        for client in clients:
            client.close()
        router.close()


def marked_engines(runtime: Path) -> list[int]:
    """Processes that carry the mark of any instance whose folder is in `runtime`."""
    marks = {f"ROUTER_INSTANCE={folder.name}".encode() for folder in runtime.glob("router-*")}
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            entries = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if marks & set(entries):
            found.append(int(process.name))
    return found
