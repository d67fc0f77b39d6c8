"""Server-sent events: the bytes of one streamed answer.

Owns the event format and the per-stream templates: all constant bytes of a chunk are built once,
only the text is escaped per chunk. Must not know engines, text assembly or admission.
Order of events (api policy P8): role chunks, text, one finish per choice, usage, `[DONE]`.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import msgspec
from starlette.types import Send

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_encode = msgspec.json.Encoder().encode


def quote(text: str) -> bytes:
    """JSON string of `text`, free of the characters that line-splitting clients stumble over."""
    quoted = _encode(text)
    if not text.isascii():
        # NEL, LS and PS are line ends for str.splitlines, which many SSE clients use.
        for raw, escaped in _LINE_ENDS:
            if raw in quoted:
                quoted = quoted.replace(raw, escaped)
    return quoted


_LINE_ENDS = (
    ("\u0085".encode(), b"\\u0085"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)


def error_event(body: dict[str, Any]) -> bytes:
    """The event of a failure after the first byte; `DONE` follows it."""
    return b"data: " + _encode(body) + b"\n\n"


def named_event(name: str, data: dict[str, Any]) -> bytes:
    """An event with its `event:` line, for the routes whose clients go by it."""
    encoded = _encode(data)
    if not encoded.isascii():
        for raw, escaped in _LINE_ENDS:  # outside of strings JSON has none of them
            encoded = encoded.replace(raw, escaped)
    return b"event: %s\ndata: %s\n\n" % (name.encode(), encoded)


class ChunkTemplate:
    """The chunks of one stream.

    `head` are the members that all chunks share; `opening` and `closing` are the JSON around the
    text inside a choice, after its index. With `include_usage` every chunk but the last carries
    `"usage": null`.
    """

    def __init__(
        self,
        head: dict[str, Any],
        num_choices: int,
        *,
        opening: bytes,
        closing: bytes,
        include_usage: bool,
    ) -> None:
        start = b"data: " + _encode(head)[:-1]
        self._start = start
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._text_starts = [
            b'%s,"choices":[{"index":%d,%s' % (start, index, opening)
            for index in range(num_choices)
        ]
        self._text_end = closing + b',"logprobs":null,"finish_reason":null}' + self._end

    def text(self, index: int, text: str) -> bytes:
        """The usual chunk: text of one choice and nothing else."""
        return b"".join((self._text_starts[index], quote(text), self._text_end))

    def choice(self, choice: dict[str, Any], beside: dict[str, Any] | None = None) -> bytes:
        """Any other chunk of one choice, all members given; `beside` are members of the chunk."""
        extra = b"," + _encode(beside)[1:-1] if beside else b""
        return b"".join((self._start, extra, b',"choices":[', _encode(choice), self._end))

    def usage(self, usage: Any) -> bytes:
        """The chunk with empty choices and the counts."""
        return b"".join((self._start, b',"choices":[],"usage":', _encode(usage), b"}\n\n"))


class EventStream:
    """One response of type text/event-stream on an ASGI `send`."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def open(self) -> None:
        """Sends the headers; from here on a failure can only be an event."""
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    def write(self, events: bytes) -> Awaitable[None]:
        """Sends whole events, as many as are ready, in one write."""
        return self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def close(self, events: bytes = DONE) -> None:
        """Sends the last events and ends the response."""
        await self._send({"type": "http.response.body", "body": events, "more_body": False})
