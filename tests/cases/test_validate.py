"""Cases of the kind validate: types, ranges, numbers that are none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases.asking import (
    CHAT,
    COMPLETIONS,
    Scripted,
    assert_alive,
    content,
    error,
    user,
)
from tests.router_parts import MODEL, call, chat, complete, text_play

HELLO = text_play("Hello")
NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999")


def raw(field: str, value: str) -> bytes:
    """A chat whose JSON holds that value as it is written."""
    start = f'{{"model":"{MODEL}","messages":[{{"role":"user","content":"hi"}}]'
    return f'{start},"{field}":{value}}}'.encode()


@pytest.mark.parametrize("value", NO_NUMBERS)
async def test_case_121_numbers_that_are_none(engine: Scripted, value: str) -> None:
    async with engine(HELLO) as router:
        error(await call(router.app, "POST", CHAT, raw=raw("temperature", value)))
        assert not router.engines.submits
        await assert_alive(router.app)


@pytest.mark.parametrize("value", NO_NUMBERS)
async def test_case_122_the_answer_is_strict_json(engine: Scripted, value: str) -> None:
    async with engine(HELLO) as router:
        for field in ("top_p", "presence_penalty", "frequency_penalty", "min_p"):
            error(await call(router.app, "POST", CHAT, raw=raw(field, value)))


async def refused(engine: Scripted, param: str, **fields: Any) -> None:
    """Both routes say 400 and name the field; no engine hears of it; the next request works."""
    async with engine(HELLO) as router:
        for ask in (chat, complete):
            assert error(await ask(router.app, **fields))["param"] == param
        assert not router.engines.submits
        await assert_alive(router.app)


async def test_case_124_a_bias_for_a_word(engine: Scripted) -> None:
    await refused(engine, "logit_bias", logit_bias={"AI": -100})


async def test_case_125_a_bias_outside_the_vocabulary(engine: Scripted) -> None:
    await refused(engine, "logit_bias", logit_bias={"9999999": -100})
    await refused(engine, "logit_bias", logit_bias={"272": 1})


async def test_case_126_a_negative_id_or_a_large_bias(engine: Scripted) -> None:
    await refused(engine, "logit_bias", logit_bias={"-1": 1})
    await refused(engine, "logit_bias", logit_bias={"5": 101})
    await refused(engine, "logit_bias", logit_bias={"5": -101})


async def test_case_127_no_choices(engine: Scripted) -> None:
    await refused(engine, "n", n=0)
    await refused(engine, "n", n=0, stream=True)


async def test_case_128_a_boolean_as_a_string(engine: Scripted) -> None:
    await refused(engine, "stream", stream="False")


async def test_case_130_options_of_a_stream_that_is_none(engine: Scripted) -> None:
    await refused(engine, "stream_options", stream_options={"include_usage": True})


async def test_case_131_temperature_zero(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for temperature in (0, 0.0):
            assert content(await chat(router.app, temperature=temperature)) == "Hello"
            assert router.engines.submits[-1].sampling.temperature == 0  # greedy


async def test_case_132_top_p_one_and_zero(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for top_p in (1.0, 1):
            assert content(await chat(router.app, top_p=top_p)) == "Hello"
            assert router.engines.submits[-1].sampling.temperature == 1
        assert content(await chat(router.app, top_p=0)) == "Hello"
        assert router.engines.submits[-1].sampling.temperature == 0  # greedy


async def test_case_135_no_messages(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        assert error(await chat(router.app, messages=[]))["param"] == "messages"
        missing = await call(router.app, "POST", CHAT, {"model": MODEL})
        assert error(missing)["param"] == "messages"
        assert content(await chat(router.app, messages=[user("hi")])) == "Hello"


async def test_case_137_logprobs_of_everything(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        prompt = "x" * 500
        for value in (-1, 10**6):
            answer = await call(
                router.app,
                "POST",
                COMPLETIONS,
                {"model": MODEL, "prompt": prompt, "prompt_logprobs": value},
            )
            assert error(answer)["param"] == "prompt_logprobs"
        assert not router.engines.submits
