"""Cases of the kind midstream: failures after the first byte, and silence before it."""

from __future__ import annotations

import asyncio

import openai
import pytest

from router.flow import FlowSettings
from tests.cases.asking import MAX_LEN, Scripted, error, events, joined, openai_client, user
from tests.router_parts import MODEL, Play, chat, complete, text_play
from tools.tiny_model import encode_text

BREAKS = Play([[token] for token in encode_text("abc")], error="/secret/inner.py")


async def test_case_214_a_failure_is_an_event(engine: Scripted) -> None:
    async with engine(BREAKS) as router:
        for ask in (chat, complete):
            answer = await ask(router.app, stream=True)
            assert answer.status == 200
            *_, told = events(answer)  # and [DONE] behind it
            assert set(told) == {"error"}
            assert set(told["error"]) == {"message", "type", "param", "code"}
            assert told["error"]["message"]
            assert b"secret" not in answer.body
        async with openai_client(router.app) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[user("hi")], stream=True
            )
            texts: list[str] = []

            async def read() -> None:
                async for chunk in stream:
                    texts.extend(choice.delta.content or "" for choice in chunk.choices)

            with pytest.raises(openai.APIError) as raised:
                await read()
            assert "".join(texts) == "abc"
            assert raised.value.message == told["error"]["message"]


async def test_case_215_the_response_ends(engine: Scripted) -> None:
    async with engine(BREAKS) as router:
        answer = await chat(router.app, stream=True)
    assert answer.ended
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.body.count(b"[DONE]") == 1


async def test_case_216_comments_while_nothing_comes(engine: Scripted) -> None:
    settings = FlowSettings(ping_s=0.02)
    gate = asyncio.Event()
    play = Play(text_play("late").steps, gate=gate)
    async with engine(play, settings=settings) as router:
        asyncio.get_running_loop().call_later(0.2, gate.set)
        answer = await chat(router.app, stream=True)
        assert joined(answer) == "late"
        before, _, after = answer.body.partition(b'"content":"l"')
        assert after
        assert before.count(b": ping\n\n") >= 3
        gate.clear()
        asyncio.get_running_loop().call_later(0.2, gate.set)
        async with (
            openai_client(router.app) as client,
            client.chat.completions.stream(model=MODEL, messages=[user("hi")]) as stream,
        ):
            final = await stream.get_final_completion()
    assert final.choices[0].message.content == "late"


async def test_case_217_refused_before_the_headers(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        for ask in (chat, complete):
            assert error(await ask(router.app, stream=True, top_p=9))["param"] == "top_p"
            long = await ask(router.app, "x" * MAX_LEN, stream=True)
            assert error(long)["code"] == "context_length_exceeded"
            unknown = await ask(router.app, stream=True, model="nope")
            assert error(unknown, 404)["code"] == "model_not_found"
        bad = await chat(router.app, stream=True, messages=[{"role": "banana", "content": ""}])
        assert error(bad)["param"] == "messages[0].role"
        assert not router.engines.submits
