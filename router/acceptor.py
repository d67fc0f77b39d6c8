"""The listening socket: who connects is served, or told at once that there is no room.

Owns the socket's reading, the number of connections that descriptors allow, and uvicorn's server
around it. Must not know routes or engines.

A process without descriptors can neither serve nor refuse: uvloop then resets whoever waits. So
connections end at a limit below. Beyond it those that only wait for another request make room, the
longest first; where none does, a newcomer gets a 503 with Retry-After from one of the few
descriptors kept for that, and more than these wait in the kernel's queue until one of them is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Generator
from typing import Final

import msgspec
import uvicorn
from starlette.types import ASGIApp

from router import logs
from router.connection import Connection
from router.errors import Overloaded, error_body

KEEP_ALIVE_S: Final = 75  # between two requests of a connection
HTTP_GRACE_S: Final = 1  # for idle connections to close, at the very end
BACKLOG: Final = 2048
ACCEPTS_PER_WAKE: Final = 64
FAREWELLS: Final = 16  # refused connections that may be open at once
FAREWELL_S: Final = 1.0  # for a refused client to read its answer and leave
PAUSE_S: Final = 0.25  # before another try when there was no descriptor at all
REFUSED_LOG_S: Final = 10.0
RESERVE: Final = 64  # for log, wire, pipes, model files, downloads
RESERVE_PER_ENGINE: Final = 8
FEWEST: Final = 8
SURPLUS: Final = 16  # connections beyond the limit while others close, within the reserve

# A client whose machine or network vanished says nothing: after a minute without an answer to the
# kernel's own questions, or two with what was sent not taken, it is gone as if it had hung up.
_VANISHED: Final = (
    ("TCP_KEEPIDLE", 30),
    ("TCP_KEEPINTVL", 10),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 120_000),
)


def connection_limit(descriptors: int, num_engines: int) -> int:
    """How many connections may be open, so that everything else always finds a descriptor."""
    kept = RESERVE + FAREWELLS + RESERVE_PER_ENGINE * num_engines
    return max(FEWEST, descriptors - kept)


def raise_descriptor_limit() -> int:
    """Lifts the soft limit of open files to the hard one; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before any engine starts. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _VANISHED:  # connections inherit them; not every system has all
            if hasattr(socket, name):
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Acceptor:
    """Hands each new connection to `adopt`, while `has_room()`; refuses the others."""

    def __init__(
        self,
        listener: socket.socket,
        adopt: Callable[[socket.socket], None],
        has_room: Callable[[], bool],
        limit: int,
    ) -> None:
        self.refused = 0
        self._listener = listener
        self._adopt = adopt
        self._has_room = has_room
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._farewells: dict[socket.socket, asyncio.TimerHandle] = {}
        self._pause: asyncio.TimerHandle | None = None
        self._reading = False
        self._closed = False
        self._logged = (float("-inf"), 0)  # when, and how many were refused until then
        self._resume()

    @property
    def alive(self) -> bool:
        """Are connections taken now, or will they be soon?"""
        return self._reading or bool(self._farewells) or self._pause is not None

    def close(self) -> None:
        """Takes no more connections; the socket stays the caller's. May be called twice."""
        self._closed = True
        self._hold()
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        for client in list(self._farewells):
            self._dismiss(client)

    def _resume(self) -> None:
        self._pause = None
        if not self._reading and not self._closed:
            self._reading = True
            self._loop.add_reader(self._listener, self._accept)

    def _hold(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_WAKE):
            if len(self._farewells) >= FAREWELLS:
                self._hold()  # `_dismiss` resumes
                return
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._hold()
                    self._pause = self._loop.call_later(PAUSE_S, self._resume)
                    return
                continue  # that client left again
            client.setblocking(False)
            if self._has_room():
                self._adopt(client)
            else:
                self._refuse(client)

    def _refuse(self, client: socket.socket) -> None:
        """Its answer, and time to read it: a close at once would take the answer away again."""
        self.refused += 1
        self._log_refused()
        try:
            client.send(_refusal())
            client.shutdown(socket.SHUT_WR)
        except OSError:
            client.close()
            return
        self._farewells[client] = self._loop.call_later(FAREWELL_S, self._dismiss, client)
        self._loop.add_reader(client, self._drain, client)

    def _drain(self, client: socket.socket) -> None:
        """Its request is of no interest, only that it ends."""
        try:
            if client.recv(65536):
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        self._dismiss(client)

    def _dismiss(self, client: socket.socket) -> None:
        self._farewells.pop(client).cancel()
        self._loop.remove_reader(client)
        client.close()
        if self._pause is None:
            self._resume()

    def _log_refused(self) -> None:
        logged_s, told = self._logged
        now = time.monotonic()
        if now - logged_s >= REFUSED_LOG_S:
            self._logged = (now, self.refused)
            logs.warning("connections_refused", connections=self.refused - told, limit=self._limit)


def _refusal() -> bytes:
    text = "The server has too many open connections; try again in 1 s."
    error = Overloaded(text, retry_after_s=1)
    status, _, body = error_body(error)
    data = msgspec.json.encode(body)
    head = (
        f"HTTP/1.1 {status} Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling, its connections taken by an `Acceptor`."""

    def __init__(self, app: ASGIApp, listener: socket.socket, limit: int) -> None:
        """With limits on what comes before a body, and at most `limit` connections."""
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=HTTP_GRACE_S,
            )
        )
        self._listener = listener
        self._limit = limit
        self._acceptor: Acceptor | None = None
        self._arriving: set[asyncio.Task[object]] = set()  # accepted, not yet connections

    @property
    def alive(self) -> bool:
        """Are new connections taken?"""
        return self._acceptor is not None and self._acceptor.alive

    @property
    def connections(self) -> int:
        """Those that are served now."""
        return len(self.server_state.connections) + len(self._arriving)

    @property
    def answering(self) -> int:
        """Requests whose answer is not written yet."""
        return len(self.server_state.tasks)

    @property
    def refused(self) -> int:
        """Connections that found no room, since the start."""
        return 0 if self._acceptor is None else self._acceptor.refused

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are the lifecycle's."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        """Takes connections from now on."""
        await super().startup(sockets=[])
        self._acceptor = Acceptor(self._listener, self._adopt, self._has_room, self._limit)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        """Takes no more, and asks those that are there to end."""
        if self._acceptor is not None:
            self._acceptor.close()
        await super().shutdown(sockets=[self._listener])

    def _has_room(self) -> bool:
        """One more fits in, if need be in the place of one that only waits for its next request."""
        if self.connections < self._limit:
            return True
        if self.connections >= self._limit + SURPLUS:  # those told to leave are not gone yet
            return False
        here = [c for c in self.server_state.connections if isinstance(c, Connection)]
        waiting = [c for c in here if c.timeout_keep_alive_task is not None]
        if waiting:
            min(waiting, key=_waits_until_s).shutdown()
        return bool(waiting)

    def _adopt(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        arrival = asyncio.ensure_future(self._serve_connection(client))
        self._arriving.add(arrival)
        arrival.add_done_callback(self._arriving.discard)

    async def _serve_connection(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # it left again
            await loop.connect_accepted_socket(self._make_protocol, client)

    def _make_protocol(self) -> Connection:
        return Connection(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )


def _waits_until_s(connection: Connection) -> float:
    timer = connection.timeout_keep_alive_task
    return float("inf") if timer is None else timer.when()


def open_descriptors() -> dict[str, int]:
    """How many there are of each kind, as Linux names them: socket, pipe, anon_inode, file."""
    kinds: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                kind, colon, _ = os.readlink(f"/proc/self/fd/{name}").partition(":")
                kind = kind if colon and not kind.startswith("/") else "file"
                kinds[kind] = kinds.get(kind, 0) + 1
    return kinds
