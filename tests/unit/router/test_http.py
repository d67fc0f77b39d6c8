"""Bodies and the watch for clients that leave, at the ASGI level."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.api import http
from router.api.http import REPLY, SHARE, BodyRoom, Reply, read_json_body, while_connected
from router.connection import TOO_SLOW
from router.errors import BodyTimeout, ClientGone, Overloaded, SlowClient


async def silent() -> Any:
    await asyncio.Event().wait()


def scope_of(send: Any) -> dict[str, Any]:
    return {REPLY: Reply(send, "id"), "headers": [(b"content-type", b"application/json")]}


async def test_the_result_of_the_work() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    assert await while_connected(scope_of(None), silent, work()) == 5


async def test_its_error_too() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await while_connected(scope_of(None), silent, work())


async def test_a_lost_client_cancels_the_work() -> None:
    ended = asyncio.Event()
    asked = [{"type": "http.request"}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        await asyncio.sleep(0.001)
        return asked.pop(0)

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    with pytest.raises(ClientGone):
        await while_connected(scope_of(None), receive, work())
    assert ended.is_set()


async def test_cancelled_from_outside_the_work_ends_too() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.ensure_future(while_connected(scope_of(None), silent, work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_client_that_reads_too_little_is_told_apart() -> None:
    scope = {**scope_of(None), TOO_SLOW: True}  # the connection's mark; see test_connection.py

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    with pytest.raises(SlowClient) as raised:
        await while_connected(scope, receive, asyncio.sleep(60))
    assert (raised.value.status, raised.value.code) == (499, "slow_client")


async def test_a_client_that_leaves_within_its_body() -> None:
    parts = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return parts.pop(0)

    with pytest.raises(ClientGone):
        await read_json_body(scope_of(None), receive)


async def test_a_body_in_parts() -> None:
    parts = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.request", "body": b"}", "more_body": False},
    ]

    async def receive() -> Any:
        return parts.pop(0)

    assert await read_json_body(scope_of(None), receive) == b"{}"


async def test_bodies_share_a_room() -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": b"12345", "more_body": False}

    room = BodyRoom(max_bytes=12)
    with room.share() as first, room.share() as second:
        for share in (first, second):
            assert await read_json_body({**scope_of(None), SHARE: share}, receive) == b"12345"
        with room.share() as third, pytest.raises(Overloaded):
            await read_json_body({**scope_of(None), SHARE: third}, receive)
    with room.share() as again:  # all is free again
        again(12)


async def test_a_body_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.01)
    with pytest.raises(BodyTimeout):
        await read_json_body(scope_of(None), silent)
