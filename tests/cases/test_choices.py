"""Cases of the kind choices: several answers, and the shape of chunks."""

from __future__ import annotations

import asyncio
from itertools import product

from tests.cases.asking import (
    CHAT,
    Scripted,
    body,
    both,
    content,
    error,
    events,
    finishes,
    joined,
    openai_client,
    user,
)
from tests.router_parts import MODEL, Play, chat, complete, text_play

HELLO = text_play("Hel", "lo")


async def test_case_061_indexes_below_n(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for ask in (chat, complete):
            answer = await ask(router.app, stream=True, n=2)
            assert {c["index"] for event in events(answer) for c in event["choices"]} == {0, 1}


async def test_case_062_each_has_role_text_and_end(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        answer = await chat(router.app, stream=True, n=2, temperature=1.9)
        assert len({submit.sampling.seed for submit in router.engines.submits}) == 2
    for index in (0, 1):
        assert joined(answer, index, "role") == "assistant"
        assert joined(answer, index) == "Hello"
        assert finishes(answer, index) == ["stop"]


async def test_case_063_role_chunks_first(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        chunks = events(await chat(router.app, stream=True, n=3))
        first = [event["choices"][0] for event in chunks[:3]]
        assert [choice["index"] for choice in first] == [0, 1, 2]
        assert all(choice["delta"]["role"] == "assistant" for choice in first)
        async with (
            openai_client(router.app) as client,
            client.chat.completions.stream(model=MODEL, messages=[user("hi")], n=3) as stream,
        ):
            final = await stream.get_final_completion()
    assert [(choice.index, choice.message.content) for choice in final.choices] == [
        (index, "Hello") for index in range(3)
    ]


async def test_case_064_in_order(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        answer = await chat(router.app, n=2)
    assert [choice["index"] for choice in body(answer)["choices"]] == [0, 1]
    assert [content(answer, index) for index in (0, 1)] == ["Hello"] * 2


async def test_case_065_none_goes_missing(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        answers = await asyncio.gather(*(chat(router.app, n=8, temperature=1) for _ in range(20)))
    for answer in answers:
        choices = body(answer)["choices"]
        assert [choice["index"] for choice in choices] == list(range(8))
        assert all(choice["message"]["content"] == "Hello" for choice in choices)


async def test_case_067_a_list_of_choices_in_every_chunk(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for n, usage, logprobs, ids in product((1, 2), (None, True), (False, True), (None, True)):
            fields = {
                "n": n,
                "stream_options": {"include_usage": usage},
                "return_token_ids": ids,
                "stream": True,
            }
            for answer in (
                await chat(router.app, logprobs=logprobs, **fields),
                await complete(router.app, logprobs=1 if logprobs else None, **fields),
                await complete(router.app, echo=True, **fields),
            ):
                assert all(isinstance(event["choices"], list) for event in events(answer))


async def test_case_068_no_success_without_a_choice(engine: Scripted) -> None:
    async with engine(Play([], error="broken")) as router:
        for ask in (chat, complete):
            assert error(await ask(router.app), 500)["code"] == "internal_error"
    async with engine(Play([])) as router:  # ends at once, which is no failure
        for ask in (chat, complete):
            assert content(await ask(router.app)) == ""


async def test_case_069_the_role_is_told_once(engine: Scripted) -> None:
    async with engine(text_play(*"Hello")) as router:
        _, streamed = await both(router.app, CHAT)
        roles = [event["choices"][0]["delta"].get("role") for event in events(streamed)]
        assert roles == ["assistant"] + [None] * (len(roles) - 1)
        async with (
            openai_client(router.app) as client,
            client.chat.completions.stream(model=MODEL, messages=[user("hi")]) as stream,
        ):
            final = await stream.get_final_completion()
    assert (final.choices[0].message.role, final.choices[0].message.content) == (
        "assistant",
        "Hello",
    )
