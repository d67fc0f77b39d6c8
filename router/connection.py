"""One HTTP connection: uvicorn's protocol, with limits on what comes before a request's body.

Owns the limits on heads (request line and headers) and on the time that one may take. Must not know
routes. Answers what never becomes a request, in the form of all other errors.
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
HEAD_S: Final = 30.0  # from a connection's begin, or a request's first byte, to the head's end


class Connection(HttpToolsProtocol):
    """A parser that gives up on endless heads, where uvicorn's reads on."""

    _head_bytes = 0  # of a head that is not complete
    _head_timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client may connect early, but not stay without a word."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """No more timers."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head are counted while it is not complete."""
        if self._refused:
            return
        timer = self._head_timer
        super().data_received(data)
        if timer is not None and timer is self._head_timer:  # still the same head
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge())

    def on_message_begin(self) -> None:
        """Starts the time of a head."""
        super().on_message_begin()
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

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


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
