"""The engine's end of the wire: router socket, signals and parent pipe, read in one place.

Owns the DEALER socket and the one poller. Everything that can happen to an engine from outside
becomes an item of `receive`, so that the loop has a single wait and no callbacks. Must not know
the scheduler, the device or what the messages mean.

No engine outlives its router by more than a second, and a step or a load may keep the process for
longer: see `leave_with_parent`, which the kernel executes. No threads here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import math
import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType

import zmq

from engine.config import EngineConfig
from engine.inbox import EXIT_PARENT_GONE, Item, ParentGone, Skipped, Terminate
from engine.protocol import (
    MAX_FRAME_BYTES,
    BadFrame,
    ToEngine,
    ToRouter,
    decode_to_engine,
    encode,
)

# Frames queued per direction. A full one makes `send` wait: back-pressure, never a lost frame.
HIGH_WATER_FRAMES = 4096
# One `receive` reads at most so many frames, so that a flood cannot keep the batch from stepping.
_MAX_FRAMES_PER_RECEIVE = 1024
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STDERR = 2


class RouterLink:
    """`EngineLink` over ZeroMQ.

    `signal_fd` comes from `catch_signals`, `parent_fd` is the pipe whose other end only the router
    holds. `report` takes one line for the operator. The socket stays the caller's to close.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        signal_fd: int,
        parent_fd: int,
        epoch: int,
        report: Callable[[str], None],
    ) -> None:
        self._socket = socket
        self._signal_fd = signal_fd
        self._parent_fd = parent_fd
        self._epoch = epoch
        self._report = report
        self._reported_bad_frame = False
        self._poller = zmq.Poller()
        for source in (socket, signal_fd, parent_fd):
            self._poller.register(source, zmq.POLLIN)

    def receive(self, timeout_s: float | None) -> list[Item]:
        """See `EngineLink.receive`. Messages of another epoch are dropped without a trace."""
        items: list[Item] = []
        timeout_ms = None if timeout_s is None else math.ceil(timeout_s * 1e3)
        for source, _event in self._poller.poll(timeout_ms):
            if source is self._socket:
                self._read_frames(items)
            elif source == self._signal_fd:
                items += [Terminate(n) for n in os.read(self._signal_fd, 64) if n in _SIGNALS]
            elif not os.read(self._parent_fd, 4096):  # bytes on the pipe have no meaning
                items.append(ParentGone())
        return items

    def send(self, message: ToRouter) -> None:
        """See `EngineLink.send`. Raises ValueError for a frame above `MAX_FRAME_BYTES`."""
        send(self._socket, message)

    def _read_frames(self, items: list[Item]) -> None:
        for _ in range(_MAX_FRAMES_PER_RECEIVE):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = _decode(parts)
            except BadFrame as error:
                items.append(Skipped(sum(map(len, parts))))
                self._report_once(error)
                continue
            if message.epoch == self._epoch:
                items.append(message)

    def _report_once(self, error: BadFrame) -> None:
        if not self._reported_bad_frame:
            self._reported_bad_frame = True
            self._report(f"frame skipped (later ones are only counted): {error}")


def _decode(parts: list[bytes]) -> ToEngine:
    if len(parts) != 1:
        raise BadFrame(f"{sum(map(len, parts))} bytes: {len(parts)} parts instead of one")
    if len(parts[0]) > MAX_FRAME_BYTES:
        raise BadFrame(f"{len(parts[0])} bytes: more than a message may have")
    return decode_to_engine(parts[0])


def send(socket: zmq.Socket[bytes], message: ToRouter) -> None:
    """`RouterLink.send` for the time before there is a link to listen on."""
    frame = encode(message)
    if len(frame) > MAX_FRAME_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(frame)} bytes is too large to send")
    socket.send(frame)


def connect(context: zmq.Context[zmq.Socket[bytes]], config: EngineConfig) -> zmq.Socket[bytes]:
    """The engine's socket; the router need not be there yet. Raises zmq.ZMQError.

    Closing it drops what is unsent, unless `close` is given a time to linger. ZMQ_MAXMSGSIZE is not
    set: on the connecting side libzmq ends the session for good over one large frame, and leaves
    an engine that can be neither heard nor told. `receive` skips such a frame instead.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, config.identity)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_FRAMES)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_FRAMES)
    socket.connect(config.endpoint)
    return socket


def catch_signals() -> int:
    """From now on SIGTERM and SIGINT only make the returned descriptor readable.

    Each puts its number there as one byte. To be called once, from the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, _only_wake)  # SIG_IGN would not write to the descriptor
    return reader


def _only_wake(number: int, frame: FrameType | None) -> None:
    del number, frame


def show_stacks_on_demand() -> None:
    """From now on SIGQUIT and SIGUSR1 write the stacks of all threads to standard error.

    They end nothing and need no interpreter: also what is stuck in a step answers.
    """
    for number in (signal.SIGQUIT, signal.SIGUSR1):
        with contextlib.suppress(OSError):  # standard error is closed
            faulthandler.register(number, file=_STDERR, all_threads=True)


def leave_with_parent(parent_fd: int) -> None:
    """From now on the kernel kills this process when the other end of the pipe is closed.

    Signal-driven I/O, with SIGKILL for its signal: that needs neither a thread nor the GIL, and
    ends a long step, a load or a stopped process within milliseconds. (PR_SET_PDEATHSIG would
    already fire when the thread that started us ends.) Nothing may be written to the pipe any
    more, it would have the same effect. On systems without it `ParentGone` has to do, which is
    seen between two steps.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):  # a sandbox may lack it too
        fcntl.fcntl(parent_fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(parent_fd, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(parent_fd, fcntl.F_GETFL)
        fcntl.fcntl(parent_fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    before = select.poll()
    before.register(parent_fd, 0)  # a hang-up is reported without being asked for
    if before.poll(0):
        os._exit(EXIT_PARENT_GONE)
