"""Cases of the kind tools: calls, and histories that hold them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.cases.asking import (
    CALL,
    CHAT,
    LOOK,
    TINY,
    Scripted,
    body,
    both,
    call_deltas,
    content,
    events,
    finishes,
    joined,
    openai_client,
    prompt_ids,
    streamed_calls,
    templated,
    user,
    whole_calls,
)
from tests.router_parts import MODEL, Play, chat, text_play
from tests.serving import Server
from tools.tiny_model import decode_tokens, encode_text

OK = text_play("ok")
PARIS = ("look", '{"city": "Paris"}')
NAMED = {"type": "function", "function": {"name": "look"}}
MADE = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add_up", "arguments": '{"a": 3, "b": 4}'},
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "seven"}
# a template of the kind that walks over a call's arguments
WALKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}]"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def history(**assistant: Any) -> list[Any]:
    """A user, an assistant that called a function, and its result."""
    return [user("3 + 4?"), {"role": "assistant", "tool_calls": [MADE], **assistant}, RESULT]


async def test_case_072_id_type_and_name_once(engine: Scripted) -> None:
    at = CALL.index("Paris")
    play = text_play(CALL[: at - 12], CALL[at - 12 : at + 2], CALL[at + 2 : at + 5], CALL[at + 5 :])
    async with engine(play) as router:
        streamed = await chat(router.app, stream=True, tools=[LOOK])
        async with (
            openai_client(router.app) as client,
            client.chat.completions.stream(
                model=MODEL, messages=[user("hi")], tools=[LOOK]
            ) as stream,
        ):
            final = await stream.get_final_completion()
    first, *rest = call_deltas(streamed)
    assert first["id"]
    assert (first["type"], first["function"]["name"]) == ("function", "look")
    assert rest
    for entry in rest:
        assert set(entry) == {"index", "function"}
        assert set(entry["function"]) == {"arguments"}
    assert streamed_calls(streamed) == [PARIS]
    (made,) = final.choices[0].message.tool_calls or []
    assert (made.function.name, made.function.arguments) == PARIS
    assert made.id.startswith("call_")
    assert made.id.count("call_") == 1


async def test_case_073_one_entry_per_index_in_a_chunk(engine: Scripted) -> None:
    tokens = encode_text(CALL)
    play = Play([tokens[at : at + 5] for at in range(0, len(tokens), 5)])
    async with engine(play) as router:
        streamed = await chat(router.app, stream=True, tools=[LOOK])
    for event in events(streamed):
        entries = event["choices"][0]["delta"].get("tool_calls") or []
        assert len({entry["index"] for entry in entries}) == len(entries)
    assert streamed_calls(streamed) == [PARIS]


async def test_case_075_a_named_call_streams_its_type(engine: Scripted) -> None:
    async with engine(text_play(*CALL)) as router:
        streamed = await chat(router.app, stream=True, tools=[LOOK], tool_choice=NAMED)
        assert router.engines.submits[-1].grammar
        async with (
            openai_client(router.app) as client,
            client.chat.completions.stream(
                model=MODEL, messages=[user("hi")], tools=[LOOK], tool_choice=NAMED
            ) as stream,
        ):
            final = await stream.get_final_completion()
    first = call_deltas(streamed)[0]
    assert first["id"]
    assert (first["type"], first["function"]["name"]) == ("function", "look")
    (made,) = final.choices[0].message.tool_calls or []
    assert (made.type, made.function.name, made.function.arguments) == ("function", *PARIS)


async def test_case_076_a_required_call_streams(engine: Scripted) -> None:
    async with engine(text_play(*CALL)) as router:
        streamed = await chat(router.app, stream=True, tools=[LOOK], tool_choice="required")
        assert router.engines.submits[-1].grammar
    assert streamed_calls(streamed) == [PARIS]
    assert finishes(streamed) == ["tool_calls"]
    assert joined(streamed) == ""


@pytest.mark.slow
def test_case_076_a_real_model_is_bound_to_call(real: Server) -> None:
    """Its weights are random, and the temperature is 1: nothing but the grammar makes it."""
    choice = {"type": "string", "enum": ["Rome", "Oslo"]}
    schema = {"type": "object", "properties": {"city": choice}, "required": ["city"]}
    tool = {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {**schema, "additionalProperties": False},
        },
    }
    asked = {"model": TINY, "messages": [user("A poem, please.")], "tools": [tool]}
    for seed in range(3):
        fields = {"tool_choice": NAMED, "seed": seed, "max_tokens": 200}
        answer = httpx.post(real.url + CHAT, json={**asked, **fields}, timeout=60)
        assert answer.status_code == 200, answer.text
        (given,) = answer.json()["choices"]
        assert given["finish_reason"] == "tool_calls"
        (made,) = given["message"]["tool_calls"]
        assert made["function"]["name"] == "look"
        assert json.loads(made["function"]["arguments"])["city"] in choice["enum"]


async def test_case_078_streamed_and_whole_are_the_same(engine: Scripted) -> None:
    scripts = (CALL, f"Let me see. {CALL}\n{CALL}", "no call", f"{CALL} and words behind it")
    for text in scripts:
        async with engine(text_play(*text)) as router:
            whole, streamed = await both(router.app, CHAT, tools=[LOOK])
        assert streamed_calls(streamed) == whole_calls(whole)
        assert joined(streamed) == (body(whole)["choices"][0]["message"]["content"] or "")
        assert finishes(streamed) == [body(whole)["choices"][0]["finish_reason"]]
    assert whole_calls(whole) == [PARIS]


async def test_case_080_one_call_only(engine: Scripted) -> None:
    async with engine(text_play(*("\n".join([CALL] * 3)))) as router:
        whole, streamed = await both(router.app, CHAT, tools=[LOOK])
        assert whole_calls(whole) == streamed_calls(streamed) == [PARIS] * 3
        whole, streamed = await both(router.app, CHAT, tools=[LOOK], parallel_tool_calls=False)
    assert whole_calls(whole) == streamed_calls(streamed) == [PARIS]
    assert finishes(streamed) == ["tool_calls"]


async def test_case_082_null_content_beside_calls(engine: Scripted) -> None:
    async with engine(OK) as router:
        assert (await chat(router.app, messages=history(content=None))).status == 200


async def test_case_083_no_content_beside_calls(engine: Scripted) -> None:
    async with engine(OK) as router:
        null = body(await chat(router.app, messages=history(content=None)))
        without = body(await chat(router.app, messages=history()))
        first, second = router.engines.submits
    assert first.tokens == second.tokens
    assert null["usage"] == without["usage"]


async def test_case_084_the_call_and_its_result_are_in_the_prompt(
    engine: Scripted, tmp_path: Any
) -> None:
    async with engine(OK, folder=templated(tmp_path / "walks", WALKING)) as router:
        prompt = decode_tokens(await prompt_ids(router.app, history(content=None)))
    assert "add_up" in prompt
    assert "seven" in prompt


async def test_case_085_arguments_are_a_mapping(engine: Scripted, tmp_path: Any) -> None:
    async with engine(OK, folder=templated(tmp_path / "walks", WALKING)) as router:
        assert (await chat(router.app, messages=history(content=None))).status == 200
        prompt = decode_tokens(await prompt_ids(router.app, history(content=None)))
    assert "[add_up a=3 b=4]" in prompt


async def test_case_087_text_where_tools_were_offered(engine: Scripted) -> None:
    async with engine(text_play("just ", "text")) as router:
        whole, streamed = await both(router.app, CHAT, tools=[LOOK])
    assert content(whole) == joined(streamed) == "just text"
    assert finishes(streamed) == ["stop"]
    assert not any("error" in event for event in events(streamed))
    assert call_deltas(streamed) == whole_calls(whole) == []
