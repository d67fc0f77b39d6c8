"""Cases of the kind fields: unknown, null, and of the hosted service only."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases.asking import Scripted, body, content
from tests.router_parts import chat, complete, text_play

HELLO = text_play("Hello")


async def test_case_191_unknown_fields(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        messages = [{"role": "user", "content": "x", "id": 1, "opts": {}}]
        assert content(await chat(router.app, messages=messages, foo=1)) == "Hello"
        assert content(await complete(router.app, foo={"bar": []})) == "Hello"


async def test_case_192_a_literal_extra_body(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        assert content(await chat(router.app, extra_body={"top_k": 1})) == "Hello"
        assert router.engines.submits[-1].sampling.top_k == 0  # ignored


async def test_case_194_null_means_absent(engine: Scripted) -> None:
    names = ("stop", "logprobs", "tools", "stream_options", "max_tokens", "temperature", "n")
    names += ("top_p", "user", "response_format", "tool_choice", "logit_bias", "stream")
    async with engine(HELLO) as router:
        for ask in (chat, complete):
            plain, nulls = await ask(router.app), await ask(router.app, **dict.fromkeys(names))
            assert body(nulls)["choices"] == body(plain)["choices"]
            assert content(await ask(router.app, seed=None)) == "Hello"
            first, second = router.engines.submits[-3:-1]
            assert (first.tokens, first.max_new) == (second.tokens, second.max_new)


async def test_case_196_metadata_in_a_message(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        messages = [{"role": "user", "content": "x", "metadata": {"_db_id": "x"}}]
        assert content(await chat(router.app, messages=messages)) == "Hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_case_197_fields_of_the_hosted_service(engine: Scripted, stream: bool) -> None:
    fields: dict[str, Any] = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "verbosity": "low",
    }
    async with engine(HELLO) as router:
        assert (await chat(router.app, stream=stream, **fields)).status == 200
        assert (await complete(router.app, stream=stream, **fields)).status == 200
