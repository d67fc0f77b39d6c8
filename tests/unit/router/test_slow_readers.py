"""R12 and A27 with sockets that hold little: what is not read must wait in the router."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from router import streams
from router.acceptor import HttpServer, bind
from tests.aborts import connected, request_bytes
from tests.router_parts import Play, router_parts
from tests.router_process import until
from tools.tiny_model import encode_text, write_tiny_model

SLOW_READERS = 20
SMALL_BYTES = 4096


async def test_r12_a_reader_that_falls_behind_too_far_is_told_so_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is told at once; who reads on still gets all that was made, and the reason."""
    bound_bytes = 16 * 1024
    monkeypatch.setattr(streams, "UNREAD_BYTES", bound_bytes)
    tokens = encode_text("x" * 8000)

    def plays(prompt: str) -> Play:
        return Play([[token] for token in (tokens if "flood" in prompt else tokens[:50])])

    async with router_parts(write_tiny_model(tmp_path / "tiny"), plays, max_len=9000) as router:
        with bind("127.0.0.1", 0) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BYTES)
            server = HttpServer(router.app, listener, 100)
            task = asyncio.ensure_future(server.serve())
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            try:
                answers = await asyncio.gather(
                    *(read_late(url, router.engines.aborted) for _ in range(SLOW_READERS)),
                    read_at_once(url),
                )
            finally:
                server.should_exit = True
                await task
        *slow, quick = answers
        assert quick.count(b"data: [DONE]") == 1
        assert b"slow_client" not in quick
        for answer in slow:
            assert answer.count(b'"code":"slow_client"') == 1
            assert answer.count(b"data: [DONE]") == 1
            assert 0 < answer.count(b'"text":"x') < 8000
        text = router.metrics.render().decode()
        assert f'router_errors_total{{code="slow_client"}} {SLOW_READERS}.0' in text


async def read_late(url: str, aborted: list[int]) -> bytes:
    """All of a stream, read once the engine was told to stop."""
    fields = {"prompt": "flood", "max_tokens": 8500, "stream": True, "ignore_eos": True}
    async with connected(url) as (reader, writer):
        raw: Any = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
        writer.transport.pause_reading()
        writer.write(request_bytes(url, fields, "Connection: close"))
        await until(lambda: len(aborted) >= SLOW_READERS, 60)
        writer.transport.resume_reading()
        async with asyncio.timeout(60):
            return await reader.read()


async def read_at_once(url: str) -> bytes:
    async with connected(url) as (reader, writer):
        fields = {"prompt": "short", "max_tokens": 50, "stream": True}
        writer.write(request_bytes(url, fields, "Connection: close"))
        async with asyncio.timeout(60):
            return await reader.read()
