"""The router's end of the wire: one ZeroMQ ROUTER socket in a private folder.

Owns the socket, its folder and its reading. Must not know what the frames mean or who sends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal, cast

import zmq

from engine.protocol import MAX_FRAME_BYTES
from router.leftovers import FOLDER_PREFIX, private_folder

HIGH_WATER_FRAMES: Final = 4096  # queued per engine and direction; a full queue says "full"
FRAMES_PER_WAKE: Final = 64
READABLE: Final = int(zmq.POLLIN)  # the flag itself is ten times as slow
MAX_ENDPOINT_BYTES: Final = 100  # a Unix socket path ends at 107


class IpcLink:
    """A transport as the fleet sees it, and its life: `open`, `listen`, `close`.

    The socket is read from the event loop: its descriptor only says "something changed", so each
    wake-up, and each send, reads until nothing is left. The peers speak first.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self._folder: Path | None = None
        self._lock_fd = -1
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._receive: Callable[[bytes, bytes], None] = lambda _identity, _frame: None
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, parents: Iterable[Path]) -> str:
        """Makes the folder in the first of `parents` that works and binds; returns the endpoint.

        Raises OSError when none of them is writable or short enough.
        """
        self._folder, self._lock_fd = _private_folder(parents)
        self.endpoint = f"ipc://{self._folder}/r"
        self._context = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_FRAMES)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_FRAMES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.bind(self.endpoint)
        self._socket = socket
        return self.endpoint

    @property
    def instance(self) -> str:
        """The name of this router's folder, by which its engines are marked; "" before `open`."""
        return "" if self._folder is None else self._folder.name

    def listen(self, receive: Callable[[bytes, bytes], None]) -> None:
        """From now on `receive(identity, frame)` is called by the running event loop."""
        if self._socket is None:
            raise RuntimeError("the link is not open")
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self.drain)

    def send(self, identity: bytes, frame: bytes) -> Literal["sent", "full", "gone"]:
        """Queue one frame; never waits. "full": try later; "gone": nobody of that name is there."""
        if self._socket is None:
            return "gone"
        try:
            self._socket.send_multipart((identity, frame), zmq.NOBLOCK)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return "gone"
        if self._loop is not None and self._socket.poll(0):
            self._loop.call_soon(self.drain)  # sending may have swallowed the wake-up
        return "sent"

    def drain(self) -> None:
        """Read what is there, at most a batch, then let others run."""
        for _ in range(FRAMES_PER_WAKE):
            socket = self._socket
            if socket is None:
                return
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._receive(parts[0], parts[1] if len(parts) == 2 else b"")
            # asking costs half of the exception; the receiver may have closed the socket
            if socket.closed or not cast("int", socket.getsockopt(zmq.EVENTS)) & READABLE:
                return
        if self._loop is not None:
            self._loop.call_soon(self.drain)

    def close(self) -> None:
        """Leaves no socket and no file. May be called twice."""
        if self._socket is not None and self._context is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._socket.FD)
            self._socket.close(linger=0)
            self._context.term()
            self._socket = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock_fd)
            self._folder = None


def _private_folder(parents: Iterable[Path]) -> tuple[Path, int]:
    """In the first of `parents` that works and is short enough. Raises OSError."""
    for parent in parents:
        if len(f"ipc://{parent}/{FOLDER_PREFIX}0123456789/r".encode()) >= MAX_ENDPOINT_BYTES:
            continue
        with contextlib.suppress(OSError):
            return private_folder(parent)
    raise OSError("no folder for the engines' socket: $XDG_RUNTIME_DIR and /tmp are not writable")
