"""Cases of the kind context: how much fits."""

from __future__ import annotations

from tests.cases.asking import (
    CHAT,
    COMPLETIONS,
    MAX_LEN,
    Scripted,
    assert_alive,
    body,
    both,
    content,
    error,
    long_play,
)
from tests.router_parts import chat, complete, text_play

TOO_LONG = "x" * (MAX_LEN + 88)


async def test_case_138_refused_before_the_headers(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        for route in (CHAT, COMPLETIONS):
            whole, streamed = await both(router.app, route, TOO_LONG)
            assert error(streamed)["code"] == "context_length_exceeded"
            assert streamed.body == whole.body


async def test_case_139_the_true_numbers(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        told = error(await complete(router.app, TOO_LONG))
        assert (told["code"], told["param"]) == ("context_length_exceeded", "prompt")
        assert str(MAX_LEN) in told["message"]
        assert str(len(TOO_LONG)) in told["message"]
        told = error(await chat(router.app, TOO_LONG))
        assert (told["code"], told["param"]) == ("context_length_exceeded", "messages")
        for room in (0, 1):  # exactly full, and one token left
            answer = await complete(router.app, "x" * (MAX_LEN - room))
            assert answer.status == (200 if room else 400)


async def test_case_141_max_tokens_is_a_cap(engine: Scripted) -> None:
    async with engine(long_play(MAX_LEN)) as router:
        answer = await complete(router.app, "x" * (MAX_LEN // 2), max_tokens=65535)
        assert body(answer)["usage"]["total_tokens"] == MAX_LEN
        assert router.engines.submits[-1].max_new == MAX_LEN // 2
        chatted = await chat(router.app, "x" * (MAX_LEN // 2), max_tokens=65535)
        assert body(chatted)["usage"]["total_tokens"] == MAX_LEN


async def test_case_142_others_are_not_held_up(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        error(await complete(router.app, "x" * 10**6))
        assert not router.engines.submits
        assert content(await complete(router.app, "short")) == "ok"
        await assert_alive(router.app)


async def test_case_144_max_completion_tokens_and_the_defaults(engine: Scripted) -> None:
    async with engine(long_play(MAX_LEN)) as router:
        both_given = await chat(router.app, max_completion_tokens=5, max_tokens=50)
        assert body(both_given)["usage"]["completion_tokens"] == 5
        assert body(await chat(router.app))["usage"]["total_tokens"] == MAX_LEN
        assert body(await complete(router.app))["usage"]["completion_tokens"] == 16
