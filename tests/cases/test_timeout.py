"""Cases of the kind timeout: who is cut when, and who is not."""

from __future__ import annotations

import asyncio

import pytest

from router.config import Options, resolve
from router.flow import FlowSettings
from tests.cases.asking import (
    CHAT,
    COMPLETIONS,
    Scripted,
    assert_alive,
    body,
    content,
    error,
    events,
    joined,
    long_play,
)
from tests.router_parts import Play, Router, chat, complete, text_play
from tests.router_process import until


async def until_running(router: Router, number: int) -> None:
    await until(lambda: len(router.engines.running) == number)


async def test_case_245_the_queue_has_its_own_limit(engine: Scripted) -> None:
    settings = FlowSettings(max_concurrency=1, queue_timeout_s=0.1)
    gate = asyncio.Event()
    async with engine(Play(text_play("ok").steps, gate=gate), settings=settings) as router:
        first = asyncio.ensure_future(chat(router.app))
        await until_running(router, 1)
        for queued in await asyncio.gather(chat(router.app), chat(router.app, stream=True)):
            assert error(queued, 503)["code"] == "server_is_overloaded"
            assert int(queued.headers["retry-after"]) >= 1
        assert not first.done()  # what runs is not touched, however long it takes
        gate.set()
        assert content(await first) == "ok"
        await assert_alive(router.app)
    assert resolve(Options(queue_timeout=2.0)).limits.queue_timeout_s == 2


async def test_case_245_a_stream_that_was_told_to_wait(engine: Scripted) -> None:
    """After `ping_s` in the queue it is open, so that the refusal is an event."""
    settings = FlowSettings(max_concurrency=1, queue_timeout_s=0.2, ping_s=0.02)
    gate = asyncio.Event()
    async with engine(Play(text_play("ok").steps, gate=gate), settings=settings) as router:
        first = asyncio.ensure_future(chat(router.app))
        await until_running(router, 1)
        queued = await chat(router.app, stream=True)
        assert b": ping\n\n" in queued.body
        assert events(queued)[-1]["error"]["code"] == "server_is_overloaded"
        gate.set()
        assert content(await first) == "ok"


async def test_case_246_each_of_hundreds_is_answered(engine: Scripted) -> None:
    settings = FlowSettings(max_concurrency=8)
    async with engine(text_play("o", "k"), replicas=2, settings=settings, max_queue=150) as router:
        answers = await asyncio.gather(
            *(chat(router.app, f"{i}", stream=i % 2 == 0) for i in range(200))
        )
        assert {answer.status for answer in answers} <= {200, 503}
        for number, answer in enumerate(answers):
            if answer.status == 503:
                error(answer, 503)
            elif number % 2 == 0:
                assert joined(answer) == "ok"
            else:
                assert content(answer) == "ok"
        assert sum(answer.status == 200 for answer in answers) >= 150


@pytest.mark.parametrize("ask", [chat, complete], ids=[CHAT, COMPLETIONS])
async def test_case_247_no_limit_unless_one_is_set(engine: Scripted, ask: object) -> None:
    assert resolve(Options()).limits.request_timeout_s == 0
    gate = asyncio.Event()
    play = Play(text_play("late").steps, gate=gate)
    request = chat if ask is chat else complete
    async with engine(play) as router:
        waiting = asyncio.ensure_future(request(router.app))
        await until_running(router, 1)
        gate.set()
        assert content(await waiting) == "late"
    async with engine(
        long_play(3, waits=True), settings=FlowSettings(request_timeout_s=0.1)
    ) as router:
        told = error(await request(router.app), 504)
        assert told["code"] == "request_timeout"
        assert not router.engines.running
        streamed = await request(router.app, stream=True)
        assert events(streamed)[-1]["error"]["code"] == "request_timeout"
        assert not router.engines.running
    async with engine(text_play("ok"), settings=FlowSettings(request_timeout_s=600)) as router:
        assert body(await request(router.app))
