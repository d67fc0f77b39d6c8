"""One HTTP connection: uvicorn's protocol, with an end to everything that a client can draw out.

Owns the limits on heads (request line and headers), and on the time that a client may take for one,
for what is left of a body that was answered already, between two requests, and to read what was
written. Must not know routes. Answers what never becomes a request, in the form of all other
errors. How long a body may take that somebody reads is `api/http.py`'s.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.errors import BadRequest, HeadTooLarge, RequestError, error_body

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_HEADERS: Final = 128
HEAD_S: Final = 10.0  # from a connection's begin, or a request's first byte, to the head's end
REST_S: Final = 30.0  # for the rest of a body whose request is answered: nobody reads it
STALL_S: Final = 30.0  # a client that reads less than STALL_BYTES in that time is as good as gone
STALL_BYTES: Final = 8 * 1024
TOO_SLOW: Final = "router.too_slow"  # set in the ASGI scope when the connection ends for that


class Connection(HttpToolsProtocol):
    """A parser that gives up on endless heads, bodies and readers, where uvicorn's goes on."""

    _head_bytes = 0  # of a head that is not complete
    _head_timer: asyncio.TimerHandle | None = None
    _rest_timer: asyncio.TimerHandle | None = None  # while an answered request's body comes in
    _read_timer: asyncio.TimerHandle | None = None  # while the client has something to read
    _unread_bytes = 0  # when that timer was set
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client may connect early, but not stay without a word."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """No more timers."""
        self._end_head()
        self._end_rest()
        self._end_watch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head are counted while it is not complete."""
        if self._refused:
            return
        timer, pause = self._head_timer, self.timeout_keep_alive_task
        super().data_received(data)
        if pause is not None and self._head_timer is None and self.cycle.response_complete:
            self._resume_pause(pause.when())  # uvicorn ends a pause with any byte, as an empty line
        if timer is not None and timer is self._head_timer:  # still the same head
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge())

    def on_message_begin(self) -> None:
        """Starts the time of a head."""
        super().on_message_begin()
        self._end_rest()
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def on_headers_complete(self) -> None:
        """Goes to the application, or, when it is too large, to an answer that says so."""
        self._end_head()
        size = len(self.url) + sum([len(name) + len(value) for name, value in self.headers])
        app = self.app
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self.app = _answer_too_large
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def on_message_complete(self) -> None:
        """All of a body is there."""
        super().on_message_complete()
        self._end_rest()

    def on_response_complete(self) -> None:
        """What is left of the body, and the reading of the answer, may not take for ever."""
        super().on_response_complete()
        unfinished = self.cycle.response_complete and self.cycle.more_body
        if unfinished and self._rest_timer is None:
            self._rest_timer = self.loop.call_later(REST_S, self.transport.close)
        self._watch_reading()

    def pause_writing(self) -> None:
        """The client is behind."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """It caught up, as far as there is more to come."""
        super().resume_writing()
        self._end_watch()
        if self.transport.is_closing() or self.cycle.response_complete:
            self._watch_reading()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's sentence
        """What is no HTTP gets an answer of ours."""
        if not self._refused:
            self._refuse(BadRequest("This is no valid HTTP request.", code="invalid_http"))

    def _refuse(self, error: RequestError) -> None:
        """The answer to what is no request, and the end of the connection."""
        self._refused = True
        self._end_head()
        status, _, body = error_body(error)
        data = msgspec.json.encode(body)
        head = (
            f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + data)
        self.transport.close()
        self._watch_reading()

    def _watch_reading(self) -> None:
        """From now on the client must read what is written, also of a connection that is closed."""
        self._unread_bytes = self.transport.get_write_buffer_size()
        if self._unread_bytes and self._read_timer is None:
            self._read_timer = self.loop.call_later(STALL_S, self._check_reading)

    def _check_reading(self) -> None:
        self._read_timer = None
        read_bytes = self._unread_bytes - self.transport.get_write_buffer_size()
        if read_bytes >= min(STALL_BYTES, self._unread_bytes):
            self._watch_reading()
            return
        scope: Any = self.scope  # None where there never was a request
        if scope is not None:
            scope[TOO_SLOW] = True
        self.transport.abort()  # closing would wait for the client

    def _resume_pause(self, end_s: float) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_at(end_s, self.timeout_keep_alive_handler)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_rest(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _end_watch(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


async def _answer_too_large(_scope: Scope, _receive: Receive, send: Send) -> None:
    status, _, body = error_body(HeadTooLarge())
    data = msgspec.json.encode(body)
    headers: list[Any] = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(data)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": False})
