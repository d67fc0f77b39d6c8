"""Request bodies and answers at the ASGI level.

Owns the limits on bodies, the content-type rule and the watch for clients that leave. Must not
know what is in a body, nor any engine. Nothing here is per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec
from starlette.types import Message, Receive, Scope, Send

from router.connection import TOO_SLOW
from router.errors import (
    BadRequest,
    BodyTimeout,
    ClientGone,
    Overloaded,
    PayloadTooLarge,
    SlowClient,
    UnsupportedMediaType,
)

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_HELD_BYTES: Final = 16 * MAX_BODY_BYTES  # of all bodies whose requests are not over
BODY_S: Final = 120.0  # for a body to arrive

# Keys of the ASGI scope, set by the boundary.
REPLY: Final = "router.reply"
SHARE: Final = "router.body_share"

T = TypeVar("T")


def header(scope: Scope, name: bytes) -> str | None:
    """The first value of header `name` (lower case), as latin-1 text."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


class BodyRoom:
    """The memory that bodies may take together: many large ones are refused, not fatal."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._free_bytes = max_bytes

    @contextmanager
    def share(self) -> Generator[Callable[[int], None]]:
        """What to call with the size of each part of one request's body; all is free at the end.

        That call raises Overloaded.
        """
        taken_bytes = 0

        def take(num_bytes: int) -> None:
            nonlocal taken_bytes
            if num_bytes > self._free_bytes:
                raise Overloaded("Too many large bodies are being worked on.")
            self._free_bytes -= num_bytes
            taken_bytes += num_bytes

        try:
            yield take
        finally:
            self._free_bytes += taken_bytes


async def read_json_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body, at most MAX_BODY_BYTES of it.

    Raises UnsupportedMediaType, PayloadTooLarge and Overloaded (before more is read),
    BodyTimeout, ClientGone.
    """
    _check_headers(scope)
    try:
        async with asyncio.timeout(BODY_S):
            return await _read_body(receive, scope.get(SHARE))
    except TimeoutError as error:
        raise BodyTimeout(f"The body did not arrive within {BODY_S:g} s.") from error


def _check_headers(scope: Scope) -> None:
    media_type = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(
            "Send the body as JSON, with the header Content-Type: application/json."
        )
    if (header(scope, b"content-encoding") or "identity").lower() != "identity":
        raise UnsupportedMediaType("Compressed request bodies are not supported.")
    announced = header(scope, b"content-length") or "0"
    if not announced.isdecimal():
        raise BadRequest("The Content-Length header is not a number.")
    if len(announced) > 12 or int(announced) > MAX_BODY_BYTES:
        raise _too_large()


async def _read_body(receive: Receive, take: Callable[[int], None] | None) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        if take is not None:
            take(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB.")


class Reply:
    """An ASGI `send` that adds the common headers and remembers what has gone out."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0  # 0 until the headers are out
        self.is_stream = False
        self.id_headers: tuple[bytes, ...] = (b"x-request-id",)  # routes may add their clients'

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            self.status = message["status"]
            self.is_stream = any(value.startswith(b"text/event-stream") for _, value in headers)
            request_id = self._request_id.encode("latin-1")
            headers += [(name, request_id) for name in self.id_headers]
            headers.append((b"x-content-type-options", b"nosniff"))
            message = {**message, "headers": headers}
        await self._send(message)


async def while_connected(scope: Scope, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end, unless the client leaves or its connection is ended as too slow.

    Then `work` is cancelled, and has ended when this raises ClientGone or SlowClient.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when="FIRST_COMPLETED")
        if not task.done():
            raise SlowClient if scope.get(TOO_SLOW) else ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, value: Any, status: int = 200) -> None:
    """One JSON answer."""
    await send_bytes(send, msgspec.json.encode(value), b"application/json", status)


async def send_parts(send: Send, parts: Iterable[bytes], content_type: bytes) -> None:
    """One answer, made and sent a part at a time; the event loop turns after each."""
    headers = [(b"content-type", content_type)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_bytes(send: Send, body: bytes, content_type: bytes, status: int = 200) -> None:
    """One whole answer."""
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
