"""A light HTTP/1.1 client for event streams, so that the load generator is not what is measured.

Owns connections, response framing and the timing of one stream's events. Must not know workloads,
arrival times or reports. The parsers do no I/O: bytes and the current time go in.

An event is told apart by scanning its bytes; JSON is parsed only for events that carry no text
(the role, the finish reason, usage, an error), unless the text itself is wanted.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

MAX_HEAD_BYTES = 64 * 1024
READ_LIMIT_BYTES = 64 * 1024 * 1024  # of one answer's body kept in memory (errors, whole answers)

# A non-empty string under one of the keys that carry generated text. Inside a JSON string the
# quotes are escaped, so text that looks like such a key cannot match.
_TEXT = re.compile(rb'"(?:text|content|reasoning_content|reasoning|arguments)"\s*:\s*"(?!")')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_DONE = b"[DONE]"


class ClientError(Exception):
    """A request that failed; `kind` is the short name it is counted under.

    ClientError
      ConnectFailed  "connect"       no connection
      Disconnected   "disconnected"  the connection ended before the answer did
      BadResponse    "malformed"     what came back is no HTTP/1.1 or no event stream
    """

    kind = "error"


class ConnectFailed(ClientError):
    """See `ClientError`."""

    kind = "connect"


class Disconnected(ClientError):
    """See `ClientError`."""

    kind = "disconnected"


class BadResponse(ClientError):
    """See `ClientError`."""

    kind = "malformed"


class Target(msgspec.Struct, frozen=True):
    """Where the server is: `path` is what stands before `/v1/…`, without a slash at its end."""

    host: str
    port: int
    tls: bool = False
    path: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine is meant."""
        return self.host in ("127.0.0.1", "localhost", "::1")


def parse_target(url: str, headers: tuple[tuple[str, str], ...] = ()) -> Target:
    """Reads `http://host:port[/path]`; a trailing `/v1` is dropped. Raises ValueError."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// address")
    tls = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, parts.port or (443 if tls else 80), tls, path, headers)


def build_request(target: Target, method: str, path: str, body: bytes = b"") -> bytes:
    """The whole request in one piece, to be sent with one system call."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [f"{method} {target.path}{path} HTTP/1.1", f"Host: {host}:{target.port}"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in target.headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class ResponseParser:
    """One response: head, then a body that is chunked, of known length, or ends with the stream."""

    def __init__(self) -> None:
        self.status = 0
        self.done = False
        self.keep_alive = False
        self._buffer = b""
        self._chunked = False
        self._left: int | None = None  # bytes of the body (or of the chunk) still to come

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the pieces of the body that `data` completes. Raises `BadResponse`."""
        self._buffer = self._buffer + data if self._buffer else data
        if not self.status and not self._read_head():
            return []
        if self.done:
            return []
        return self._read_chunks() if self._chunked else self._read_plain()

    def end(self) -> None:
        """The stream ended. Raises `Disconnected` if the response was not complete."""
        if self.status and not self._chunked and self._left is None:
            self.done = True
        if not self.done:
            raise Disconnected("the connection ended before the answer did")

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BadResponse("the response head has no end")
            return False
        first, *lines = self._buffer[:end].split(b"\r\n")
        self._buffer = self._buffer[end + 4 :]
        version, _, rest = first.partition(b" ")
        status = rest.partition(b" ")[0]
        if not version.startswith(b"HTTP/1.") or not status.isdigit():
            raise BadResponse(f"no HTTP/1.1 status line: {first[:80]!r}")
        headers: dict[bytes, bytes] = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        if int(status) < 200:  # "100 Continue" and the like: the answer follows
            return self._read_head()
        self._read_framing(int(status), version, headers)
        return True

    def _read_framing(self, status: int, version: bytes, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self._chunked = headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        length = headers.get(b"content-length", b"")
        if not self._chunked and length.isdigit():
            self._left = int(length)
        if status in (204, 304):
            self._left = 0
        self.done = self._left == 0 and not self._chunked
        framed = self._chunked or self._left is not None
        wish = headers.get(b"connection", b"").lower()
        self.keep_alive = framed and b"close" not in wish and version != b"HTTP/1.0"

    def _read_plain(self) -> list[bytes]:
        piece, self._buffer = self._buffer, b""
        if self._left is not None:
            piece = piece[: self._left]
            self._left -= len(piece)
            self.done = self._left == 0
        return [piece] if piece else []

    def _read_chunks(self) -> list[bytes]:
        pieces: list[bytes] = []
        buffer, at = self._buffer, 0
        while True:
            line_end = buffer.find(b"\r\n", at)
            if line_end < 0:
                break
            size = _chunk_size(buffer[at:line_end])
            start = line_end + 2
            if size == 0:
                # The last chunk: trailers, if any, end with an empty line.
                if buffer.startswith(b"\r\n", start) or buffer.find(b"\r\n\r\n", start) >= 0:
                    self.done = True
                    at = len(buffer)
                break
            if len(buffer) < start + size + 2:
                break
            pieces.append(buffer[start : start + size])
            at = start + size + 2
        self._buffer = buffer[at:] if at else buffer
        return pieces


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        size = int(digits, 16)
    except ValueError:
        raise BadResponse(f"no chunk size: {line[:40]!r}") from None
    if not 0 <= size <= READ_LIMIT_BYTES:
        raise BadResponse(f"a chunk of {size} bytes")
    return size


class Usage(msgspec.Struct, frozen=True):
    """Token counts as the server states them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class StreamTally:
    """What one event stream said and when, from bytes that arrive in any cut.

    `first_at` is the arrival of the first event with text in it (a role alone is none), `last_at`
    of the last event that has a choice; `gaps_s` are the times between events with text. Events
    that arrive in one read have the same time. All times are in seconds on the caller's clock.
    """

    def __init__(self, keep_text: bool = False) -> None:
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.gaps_s: list[float] = []
        self.num_text_events = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.done = False
        self.text: list[str] = []
        self._keep_text = keep_text
        self._text_at = 0.0
        self._usage_event: bytes | None = None
        self._rest = b""

    def feed(self, piece: bytes, now: float) -> None:
        """Takes the next bytes of the body. Raises `BadResponse` on an event that is no JSON."""
        if self._rest:
            piece = self._rest + piece
        *lines, self._rest = piece.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def usage(self) -> Usage | None:
        """The last token counts seen, None if there were none. Raises `BadResponse`."""
        if self._usage_event is None:
            return None
        found = _parse(self._usage_event)["usage"]
        details = found.get("prompt_tokens_details") or {}
        return Usage(
            int(found.get("prompt_tokens", 0)),
            int(found.get("completion_tokens", 0)),
            int(details.get("cached_tokens") or 0),
        )

    def _event(self, event: bytes, now: float) -> None:
        if event == _DONE:
            self.done = True
            return
        if _USAGE.search(event):
            self._usage_event = event
        if _TEXT.search(event):
            if self.num_text_events:
                self.gaps_s.append(now - self._text_at)
            else:
                self.first_at = now
            self.num_text_events += 1
            self.last_at = self._text_at = now
            if self._keep_text or _FINISH.search(event):
                self._read(_parse(event))
            return
        parsed = _parse(event)
        if "error" in parsed:
            self.error = _error_text(parsed["error"])
        elif parsed.get("choices"):
            self.last_at = now
            self._read(parsed)

    def _read(self, parsed: dict[str, Any]) -> None:
        for choice in parsed.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if self._keep_text and text:
                self.text.append(text)


def _parse(event: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(event, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadResponse(f"an event that is no JSON object: {event[:80]!r}") from error


def _error_text(error: object) -> str:
    if isinstance(error, dict):
        return str(error.get("message") or error)  # pyright: ignore[reportUnknownArgumentType]
    return str(error)


def error_message(body: bytes) -> str:
    """The human sentence of an error body, or its first bytes if there is none."""
    try:
        return _error_text(_parse(body).get("error", body[:200]))
    except BadResponse:
        return body[:200].decode("utf-8", "replace")


Sink = Callable[[bytes, float], None]


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight.

    The transport belongs to it; whoever cancels `exchange` must `close` it, since the rest of the
    cancelled answer is still on its way.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._sink: Sink | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.num_exchanges = 0
        self.answered = False  # whether anything of the present answer has arrived

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, sink: Callable[[int], Sink]) -> int:
        """Sends one request and returns the status once the whole body went to the sink.

        `sink` is called with the status when the first body bytes are there, and gives what takes
        them. Raises `ClientError`.
        """
        if self._transport is None or self._transport.is_closing():
            raise Disconnected("the connection was closed")
        parser = self._parser = ResponseParser()
        self.answered = False
        self._waiter = asyncio.get_running_loop().create_future()
        self._sink = lambda piece, now: self._open_sink(sink, piece, now)
        self._transport.write(request)
        try:
            await self._waiter
        finally:
            self._sink = self._waiter = None
        self.num_exchanges += 1
        if not parser.keep_alive:
            self.close()
        return parser.status

    def close(self) -> None:
        """Ends the connection at once; closing twice is harmless."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        now = self._clock()
        if self._waiter is None or self._waiter.done():
            self.close()  # nobody asked for these bytes
            return
        self.answered = True
        try:
            for piece in self._parser.feed(data):
                if self._sink is not None:
                    self._sink(piece, now)
        except ClientError as error:
            self._fail(error)
            return
        if self._parser.done:
            self._waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        if self._waiter is None or self._waiter.done():
            return
        try:
            self._parser.end()
        except Disconnected as error:
            error.__cause__ = exc
            self._fail(error)
        else:
            self._waiter.set_result(None)

    def _open_sink(self, sink: Callable[[int], Sink], piece: bytes, now: float) -> None:
        self._sink = sink(self._parser.status)
        self._sink(piece, now)

    def _fail(self, error: ClientError) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        self.close()


class ConnectionPool:
    """Idle keep-alive connections to one target, the last used first; grows as needed."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tls = ssl.create_default_context() if target.tls else None
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, sink: Callable[[int], Sink]) -> int:
        """As `Connection.exchange`, on a fresh or idle connection.

        An idle connection that the server closed meanwhile costs one retry on a fresh one, as
        long as nothing of the answer had arrived. Raises `ClientError`.
        """
        while True:
            connection = self._take_idle() or await self._connect()
            reused = connection.num_exchanges > 0
            try:
                status = await connection.exchange(request, sink)
            except Disconnected:
                if reused and not connection.answered:
                    continue
                raise
            except asyncio.CancelledError:
                connection.close()
                raise
            if connection.usable:
                self._idle.append(connection)
            return status

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _transport, connection = await loop.create_connection(
                Connection, self._target.host, self._target.port, ssl=self._tls
            )
        except OSError as error:
            address = f"{self._target.host}:{self._target.port}"
            raise ConnectFailed(f"no connection to {address}: {error}") from error
        return connection


async def fetch(pool: ConnectionPool, request: bytes) -> tuple[int, bytes]:
    """One request whose whole body is wanted: (status, body). Raises `ClientError`."""
    pieces: list[bytes] = []
    status = await pool.exchange(request, lambda _: lambda piece, _now: pieces.append(piece))
    return status, b"".join(pieces)
