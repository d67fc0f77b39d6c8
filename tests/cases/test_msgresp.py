"""Cases of the kind msgresp: Anthropic's /v1/messages and OpenAI's /v1/responses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.cases.asking import (
    CALL,
    CITY,
    OPENS,
    Scripted,
    anthropic_client,
    body,
    openai_client,
    post,
    templated,
    user,
)
from tests.router_parts import MODEL, Answer, call, text_play

HELLO = text_play("Hel", "lo")
KEYS = (hashlib.sha256(b"the-key").digest(),)
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
ASKED: dict[str, Any] = {"max_tokens": 100, "messages": [user("hi")]}


def named_events(answer: Answer) -> list[Any]:
    """The events of a stream whose events have names, which their types repeat."""
    assert answer.status == 200, answer.body
    assert answer.ended
    found: list[Any] = []
    for block in answer.body.decode().split("\n\n"):
        if not block or block.startswith(":") or block == "data: [DONE]":
            continue
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def test_case_229_the_start_knows_the_input_tokens(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        first, *events = named_events(await post(router.app, MESSAGES, {**ASKED, "stream": True}))
        counted = body(
            await post(router.app, f"{MESSAGES}/count_tokens", {"messages": [user("hi")]})
        )
        whole = body(await post(router.app, MESSAGES, ASKED))
    assert first["type"] == "message_start"
    assert first["message"]["usage"]["input_tokens"] == counted["input_tokens"] > 0
    (last,) = [event for event in events if event["type"] == "message_delta"]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 6


async def test_case_230_arguments_come_as_deltas(engine: Scripted) -> None:
    tools = [{"name": "look", "input_schema": CITY}]
    async with engine(text_play(*CALL)) as router:
        events = named_events(
            await post(router.app, MESSAGES, {**ASKED, "tools": tools, "stream": True})
        )
        async with (
            anthropic_client(router.app) as client,
            client.messages.stream(model=MODEL, tools=tools, **ASKED) as stream,
        ):
            final = await stream.get_final_message()
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    pieces = [each["partial_json"] for each in deltas if each["type"] == "input_json_delta"]
    assert pieces
    assert json.loads("".join(pieces)) == {"city": "Paris"}
    (last,) = [event for event in events if event["type"] == "message_delta"]
    assert last["delta"]["stop_reason"] == "tool_use"
    assert (final.content[0].type, final.stop_reason) == ("tool_use", "tool_use")
    assert final.content[0].input == {"city": "Paris"}


async def test_case_232_reasoning_and_text_through_the_sdk(
    engine: Scripted, tmp_path: Path
) -> None:
    folder = templated(tmp_path / "opens", OPENS)
    async with (
        engine(text_play("wh", "y</th", "ink>4", "2"), folder=folder) as router,
        openai_client(router.app) as client,
    ):
        deltas: list[str] = []
        indexes: set[int] = set()
        async with client.responses.stream(model=MODEL, input="hi") as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    deltas.append(event.delta)
                if hasattr(event, "content_index"):
                    indexes.add(event.content_index)
            final = await stream.get_final_response()
    assert final.output_text == "".join(deltas) == "42"
    assert indexes == {0}
    assert [item.type for item in final.output] == ["reasoning", "message"]


async def test_case_233_input_as_a_list(engine: Scripted) -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    async with engine(HELLO) as router:
        counts = {
            body(await post(router.app, RESPONSES, {"input": given}))["usage"]["input_tokens"]
            for given in ("hi", items, [user("hi")])
        }
        first, *others = (submit.tokens for submit in router.engines.submits)
    assert len(counts) == 1
    assert all(tokens == first for tokens in others)


async def test_case_234_the_order_of_events(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        answer = await post(router.app, RESPONSES, {"input": "hi", "stream": True})
    events = named_events(answer)
    types = [event["type"].removeprefix("response.") for event in events]
    texts = types.count("output_text.delta")
    assert texts
    assert types == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * texts,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(e["delta"] for e in events if e["type"].endswith("text.delta")) == "Hello"


async def test_case_237_errors_in_the_form_of_the_route(engine: Scripted) -> None:
    async with engine(HELLO, keys=KEYS) as router:
        for key, fields, status, kind in (
            ("the-key", {**ASKED, "max_tokens": 0}, 400, "invalid_request_error"),
            ("wrong", ASKED, 401, "authentication_error"),
            ("the-key", {**ASKED, "model": "nope"}, 404, "not_found_error"),
        ):
            answer = await post(router.app, MESSAGES, fields, headers={"x-api-key": key})
            assert answer.status == status
            told = answer.json()
            assert (told["type"], told["error"]["type"]) == ("error", kind)
            assert told["error"]["message"]
            assert answer.headers["request-id"]
        async with anthropic_client(router.app, api_key="wrong") as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(model=MODEL, **ASKED)


async def test_case_238_both_headers_for_keys(engine: Scripted) -> None:
    async with engine(HELLO, keys=KEYS) as router:
        for name, start in (("x-api-key", ""), ("authorization", "Bearer ")):
            for key, status in (("the-key", 200), ("wrong", 401), ("", 401)):
                headers = {name: start + key}
                asked = {"model": MODEL, **ASKED}
                answer = await call(router.app, "POST", MESSAGES, asked, headers=headers)
                assert answer.status == status
        for keys in ({"api_key": "the-key"}, {"auth_token": "the-key"}):
            async with anthropic_client(router.app, **keys) as client:
                told = await client.messages.create(model=MODEL, **ASKED)
                assert told.content[0].text == "Hello"  # type: ignore[union-attr]


async def test_case_239_thinking_in_the_history(engine: Scripted) -> None:
    thought = {"type": "thinking", "thinking": "well ..", "signature": ""}
    history = [
        user("hi"),
        {"role": "assistant", "content": [thought, {"type": "text", "text": "hello"}]},
        user("and now?"),
    ]
    async with engine(HELLO) as router:
        answer = await post(router.app, MESSAGES, {**ASKED, "messages": history})
    assert body(answer)["content"] == [{"type": "text", "text": "Hello"}]
