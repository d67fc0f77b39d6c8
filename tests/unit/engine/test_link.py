"""RouterLink over real sockets, descriptors and signals of this process."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from engine.config import EngineConfig
from engine.inbox import EXIT_PARENT_GONE, ParentGone, Skipped, Terminate
from engine.link import RouterLink, catch_signals, connect
from engine.protocol import (
    MAX_FRAME_BYTES,
    Abort,
    Drain,
    Ping,
    Pong,
    StepOutput,
    ToEngine,
    decode_to_router,
    encode,
)

ROOT = Path(__file__).parents[3]
EPOCH = 4


class Wire:
    """A link and everything at its other ends."""

    def __init__(self, folder: str) -> None:
        self.context = zmq.Context()
        endpoint = f"ipc://{folder}/s"
        self.config = EngineConfig(endpoint=endpoint, replica=0, epoch=EPOCH, model="none")
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.bind(endpoint)
        self.parent_fd, self.parent_end = os.pipe()
        self.signal_fd, self.signal_end = os.pipe()
        self.socket = connect(self.context, self.config)
        self.reports: list[str] = []
        self.link = RouterLink(
            self.socket, self.signal_fd, self.parent_fd, EPOCH, self.reports.append
        )
        self.link.send(Pong(EPOCH, 0))  # the engine speaks first: now the router knows it
        assert self.heard() == Pong(EPOCH, 0)

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self.send_parts(encode(message))

    def send_parts(self, *parts: bytes) -> None:
        self.router.send_multipart([self.config.identity, *parts])

    def heard(self) -> object:
        assert self.router.poll(60_000)
        identity, frame = self.router.recv_multipart()
        assert identity == self.config.identity
        return decode_to_router(frame)

    def receive(self, count: int) -> list[object]:
        """So many items: they may come in several goes, between which one may bring none (a message
        that came alone and is for nobody)."""
        items: list[object] = []
        until_s = time.monotonic() + 60.0
        while len(items) < count:
            assert time.monotonic() < until_s, f"only {items}"
            items += self.link.receive(1.0)
        return items

    def close(self) -> None:
        self.socket.close()
        self.router.close()
        self.context.term()
        for fd in (self.parent_fd, self.parent_end, self.signal_fd, self.signal_end):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def wire() -> Iterator[Wire]:
    folder = tempfile.mkdtemp(prefix="l-")
    wire = Wire(folder)
    yield wire
    wire.close()
    shutil.rmtree(folder)


def test_messages_in_order(wire: Wire) -> None:
    messages: list[ToEngine] = [Ping(EPOCH, n) for n in range(300)]
    wire.send(*messages, Abort(EPOCH, (1, 2)))
    assert wire.receive(301) == [*messages, Abort(EPOCH, (1, 2))]
    assert wire.link.receive(0) == []


def test_nothing_there(wire: Wire) -> None:
    assert wire.link.receive(0) == []
    assert wire.link.receive(0.001) == []


def test_blocks_until_something_arrives(wire: Wire) -> None:
    wire.send(Drain(EPOCH))
    assert wire.link.receive(None) == [Drain(EPOCH)]


def test_bad_frames_are_skipped_and_reported_once(wire: Wire) -> None:
    wire.send_parts(b"\xc1" * 40)
    wire.send_parts(b"")
    wire.send_parts(encode(Ping(EPOCH, 1)), b"second part")
    wire.send_parts(encode(Pong(EPOCH, 1)))  # a message of the other direction
    wire.send(Ping(EPOCH, 2))
    items = wire.receive(5)
    assert [type(item) for item in items] == [Skipped] * 4 + [Ping]
    assert items[0] == Skipped(40)
    assert len(wire.reports) == 1
    assert "40 bytes" in wire.reports[0]


def test_other_epochs_change_nothing(wire: Wire) -> None:
    wire.send(Drain(EPOCH - 1), Abort(EPOCH + 1, (1,)), Ping(EPOCH, 5))
    assert wire.receive(1) == [Ping(EPOCH, 5)]
    assert wire.reports == []


def test_a_flood_is_read_in_portions(wire: Wire) -> None:
    wire.send(*(Ping(EPOCH, n) for n in range(1500)))
    first = wire.link.receive(10.0)
    assert len(first) <= 1024
    rest = wire.receive(1500 - len(first))
    assert [*first, *rest] == [Ping(EPOCH, n) for n in range(1500)]


def test_signals_become_items(wire: Wire) -> None:
    os.write(wire.signal_end, bytes((signal.SIGTERM, signal.SIGCHLD, signal.SIGINT)))
    assert wire.receive(2) == [Terminate(signal.SIGTERM), Terminate(signal.SIGINT)]


def test_end_of_the_parent_pipe(wire: Wire) -> None:
    os.write(wire.parent_end, b"bytes on the pipe mean nothing")
    assert wire.link.receive(10.0) == []
    os.close(wire.parent_end)
    wire.parent_end = -1
    assert wire.link.receive(None) == [ParentGone()]


def test_all_sources_at_once(wire: Wire) -> None:
    wire.send(Ping(EPOCH, 1))
    os.write(wire.signal_end, bytes((signal.SIGTERM,)))
    assert sorted(map(repr, wire.receive(2))) == ["Ping(epoch=4, n=1)", "Terminate(signal=15)"]


def test_send(wire: Wire) -> None:
    output = StepOutput(EPOCH, 1, (1,), (), b"abcd")
    wire.link.send(output)
    assert wire.heard() == output


def test_too_large_to_send(wire: Wire) -> None:
    with pytest.raises(ValueError, match="StepOutput of"):
        wire.link.send(StepOutput(EPOCH, 1, (1,), (), bytes(MAX_FRAME_BYTES)))
    wire.link.send(Pong(EPOCH, 1))
    assert wire.heard() == Pong(EPOCH, 1)


def test_socket_options(wire: Wire) -> None:
    assert wire.socket.getsockopt(zmq.LINGER) == 0
    assert wire.socket.getsockopt(zmq.SNDHWM) == wire.socket.getsockopt(zmq.RCVHWM) > 0


def test_a_frame_above_the_limit_is_skipped(wire: Wire) -> None:
    """And the connection lives on, which it would not with ZMQ_MAXMSGSIZE."""
    wire.send_parts(encode(Ping(EPOCH, 1)) + bytes(MAX_FRAME_BYTES))
    wire.send(Ping(EPOCH, 2))
    items = wire.receive(2)
    assert [type(item) for item in items] == [Skipped, Ping]
    wire.link.send(Pong(EPOCH, 2))
    assert wire.heard() == Pong(EPOCH, 2)


def test_caught_signals() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(-1)
    fd = catch_signals()
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert os.read(fd, 8) == bytes((signal.SIGINT, signal.SIGTERM))
        with pytest.raises(BlockingIOError):
            os.read(fd, 8)
    finally:
        os.close(signal.set_wakeup_fd(wakeup))
        os.close(fd)
        for number, action in before.items():
            signal.signal(number, action)


LEAVES = "from engine.link import leave_with_parent\nleave_with_parent(0)\n"
BUSY = {
    "asleep": "import time; time.sleep(100)",
    "computing": "while True: pass",
    "keeping the GIL": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the loop alone watches the pipe")
@pytest.mark.parametrize("end", ["pipe", "socket"])
@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY.keys())
def test_any_process_leaves_with_its_parent(busy: str, end: str) -> None:
    """Whatever it does. asyncio and uvloop give a child a socket for a pipe."""
    ours, theirs = socket.socketpair() if end == "socket" else map(open_fd, os.pipe()[::-1])
    with theirs:
        process = start_python(f"{LEAVES}print('ready', flush=True)\n{busy}", theirs.fileno())
    with ours, process:
        assert process.stdout
        assert process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        ours.close()
        assert process.wait(60) == -signal.SIGKILL


def test_a_parent_that_is_gone_before_the_first_line_of_python() -> None:
    with open(os.devnull) as nothing, start_python(LEAVES, nothing.fileno()) as process:
        assert process.wait(60) == 0  # no pipe at all: nobody to leave with
    reader, writer = os.pipe()
    os.close(writer)
    with open_fd(reader), start_python(f"{LEAVES}while True: pass", reader) as process:
        assert process.wait(60) == EXIT_PARENT_GONE


def open_fd(fd: int) -> io.FileIO:
    return io.FileIO(fd, "w")


def start_python(code: str, stdin: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, stdin=stdin, stdout=subprocess.PIPE, cwd=ROOT)
