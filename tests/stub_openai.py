"""A small OpenAI-shaped server in a thread, for tests of the load generator.

It speaks HTTP/1.1 with chunked event streams and keep-alive, counts words or ids as tokens, keeps
every request body, and misbehaves as the model's name says:

    stub             answers max_tokens tokens "a0 ", "a1 ", …
    stub-busy        503 with an error body
    stub-error       an error event after one token
    stub-cut         closes the connection after one token
    stub-truncated   ends the stream after one token, without its last events
    stub-short       one token fewer than asked for
    stub-no-usage    no token counts
    stub-hang        one token, then nothing
    stub-once        closes the connection after each answer without saying so
    stub-first-only  answers one request, refuses all others
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StubServer:
    """What the server saw: `bodies` of the POSTs in order, `connections` accepted so far."""

    def __init__(self, token_gap_s: float) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.connections = 0
        self.port = 0
        self._gap_s = token_gap_s

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection goes on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            _plain(writer, 200, {"object": "list", "data": [{"id": "stub"}]})
            return True
        length = next(
            int(line.split(":")[1])
            for line in head.lower().split("\r\n")
            if line.startswith("content-length")
        )
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        model = body["model"]
        if model == "stub-busy" or (model == "stub-first-only" and len(self.bodies) > 1):
            _plain(writer, 503, {"error": {"message": "come back later", "code": "busy"}})
            return True
        await self._stream(writer, body, chat="/chat/" in head)
        return model not in ("stub-cut", "stub-once")

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], chat: bool) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        model = body["model"]
        if chat:
            _event(writer, [_choice("", chat, role="assistant")])
        count = body["max_tokens"] - (model == "stub-short")
        for number in range(count):
            if self._gap_s:
                await asyncio.sleep(self._gap_s)
            _event(writer, [_choice(f"a{number} ", chat)])
            await writer.drain()
            if model == "stub-error":
                _chunk(writer, b'data: {"error":{"message":"the engine died"}}\n\n')
                break
            if model in ("stub-cut", "stub-truncated"):
                break
            if model == "stub-hang":
                await asyncio.sleep(60)
        if model == "stub-cut":
            return
        if model not in ("stub-truncated", "stub-error"):
            _event(writer, [_choice("", chat, finish_reason="length")])
            if model != "stub-no-usage":
                _event(writer, [], usage=_usage(body, count))
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@contextmanager
def stub_server(token_gap_s: float = 0.0) -> Iterator[StubServer]:
    """Serves on a free port of 127.0.0.1 until the block ends."""
    stub = StubServer(token_gap_s)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        await stub.serve(ready, stop)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(60)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def _choice(text: str, chat: bool, **more: Any) -> dict[str, Any]:
    finish = more.pop("finish_reason", None)
    said = {"delta": {"content": text, **more}} if chat else {"text": text}
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish}


def _usage(body: dict[str, Any], count: int) -> dict[str, Any]:
    prompt = body.get("prompt")
    if prompt is None:
        prompt = " ".join(message["content"] for message in body["messages"])
    size = len(prompt) if isinstance(prompt, list) else len(prompt.split())
    return {
        "prompt_tokens": size,
        "completion_tokens": count,
        "total_tokens": size + count,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def _event(writer: asyncio.StreamWriter, choices: list[Any], usage: Any = None) -> None:
    event = {"id": "x", "choices": choices, "usage": usage}
    _chunk(writer, b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _plain(writer: asyncio.StreamWriter, status: int, answer: Any) -> None:
    body = json.dumps(answer).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
