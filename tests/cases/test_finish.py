"""Cases of the kind finish: why a choice ended."""

from __future__ import annotations

import pytest

from tests.cases.asking import (
    CALL,
    CHAT,
    LOOK,
    Scripted,
    body,
    both,
    call_deltas,
    content,
    events,
    finishes,
    long_play,
    openai_client,
    user,
)
from tests.router_parts import MODEL, chat, complete, text_play

CALLS = text_play(CALL)


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_case_038_a_call_ends_with_tool_calls(engine: Scripted, choice: str) -> None:
    async with engine(CALLS) as router:
        whole, streamed = await both(router.app, CHAT, tools=[LOOK], tool_choice=choice)
    assert body(whole)["choices"][0]["finish_reason"] == "tool_calls"
    assert finishes(streamed) == ["tool_calls"]


async def test_case_039_the_sdk_knows_the_word(engine: Scripted) -> None:
    async with engine(CALLS) as router, openai_client(router.app) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=[user("hi")], tools=[LOOK]
        )
        assert type(answer).model_validate(answer.model_dump(), strict=True)
        assert answer.choices[0].finish_reason == "tool_calls"


async def test_case_042_length_means_max_tokens(engine: Scripted) -> None:
    async with engine(long_play(100)) as router:
        for ask in (chat, complete):
            answer = body(await ask(router.app, max_tokens=50))
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 50
            assert content(await ask(router.app, max_tokens=50)) == "x" * 50
    async with engine(text_play("short")) as router:
        answer = body(await chat(router.app, max_tokens=50))
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] < 50


@pytest.mark.parametrize("n", [1, 3])
async def test_case_043_one_finish_a_choice_at_its_end(engine: Scripted, n: int) -> None:
    async with engine(text_play("a", "b")) as router:
        for ask in (chat, complete):
            answer = await ask(router.app, stream=True, n=n)
            for index in range(n):
                assert finishes(answer, index) == ["stop"]
                choices = [c for e in events(answer) for c in e["choices"] if c["index"] == index]
                assert choices[-1]["finish_reason"] == "stop"


async def test_case_045_also_with_logprobs(engine: Scripted) -> None:
    async with engine(text_play("a", "b")) as router:
        answer = await chat(router.app, stream=True, logprobs=True, top_logprobs=1)
        assert finishes(answer) == ["stop"]
        assert finishes(await complete(router.app, stream=True, logprobs=1)) == ["stop"]


async def test_case_046_a_call_that_is_cut(engine: Scripted) -> None:
    cut = CALL.index("Paris") + 2  # inside the arguments
    async with engine(text_play(*CALL)) as router:
        whole, streamed = await both(router.app, CHAT, tools=[LOOK], max_tokens=cut)
    assert body(whole)["choices"][0]["finish_reason"] == "length"
    assert finishes(streamed) == ["length"]
    assert not any("error" in event for event in events(streamed))
    arguments = "".join(e["function"].get("arguments", "") for e in call_deltas(streamed))
    assert arguments == '{"city": "Pa'
