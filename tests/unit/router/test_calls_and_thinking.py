"""Tools, thinking and bound answers on /v1/responses and /v1/messages, in one process over scripted
engines: from the body to the prompt, and from the text to blocks and items.

Numbers in test names are cases of the project's API corpus.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.protocol import unpack_tokens
from tests.router_parts import MODEL, Answer, Play, Router, call, router_parts, text_play
from tools.tiny_model import write_tiny_model

# Short, as every byte is a token and the scripted engines have few.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments.city }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Par'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def plays(prompt: str) -> Play:
    """Scenes by a word anywhere in the prompt."""
    texts = ["<th", "ink>why</think>I see.", CALL, 'is"}}\n</tool_call>']
    if "<think>" in prompt:
        texts = ["why</think>I see.", CALL, 'is"}}\n</tool_call>']
    return text_play("plain") if "plain" in prompt else text_play(*texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)
    settings = made / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content["chat_template"] = TEMPLATE
    settings.write_text(json.dumps(content))
    return made


@pytest_asyncio.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays) as made:
        yield made


RESPONSE_TOOLS = [{"type": "function", "name": "look", "parameters": SCHEMA}]
MESSAGE_TOOLS = [{"name": "look", "input_schema": SCHEMA}]


async def respond(router: Router, input: Any = "hi", **fields: Any) -> Answer:
    body = {"model": MODEL, "input": input, "tools": RESPONSE_TOOLS, **fields}
    return await call(router.app, "POST", "/v1/responses", body)


async def send(router: Router, messages: Any = "hi", **fields: Any) -> Answer:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {"model": MODEL, "max_tokens": 200, "messages": messages, "tools": MESSAGE_TOOLS}
    return await call(router.app, "POST", "/v1/messages", {**body, **fields})


def events_of(answer: Answer) -> list[Any]:
    blocks = answer.body.decode().split("\n\n")[:-1]
    return [json.loads(block.partition("\ndata: ")[2]) for block in blocks if block[0] != ":"]


def prompt_of(router: Router) -> str:
    return router.model.tokenizer.decode(
        list(unpack_tokens(router.engines.submits[-1].tokens)), skip_special=False
    )


async def test_a_response_with_thinking_and_a_call(router: Router) -> None:
    answer = (await respond(router)).json()
    reasoning, message, called = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "why"}]
    assert message["content"][0]["text"] == "I see."
    assert (called["type"], called["name"]) == ("function_call", "look")
    assert json.loads(called["arguments"]) == {"city": "Paris"}
    assert answer["status"] == "completed"
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert answer["tools"] == RESPONSE_TOOLS
    events = events_of(await respond(router, stream=True))
    last = events[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["reasoning", "message", "function_call"]
    for kind, text in (
        ("response.reasoning_text", "why"),
        ("response.output_text", "I see."),
        ("response.function_call_arguments", called["arguments"]),
    ):
        deltas = [event["delta"] for event in events if event["type"] == f"{kind}.delta"]
        assert "".join(deltas) == text


async def test_case_230_a_message_with_thinking_and_a_call(router: Router) -> None:
    answer = (await send(router)).json()
    thinking, text, called = answer["content"]
    assert thinking == {"type": "thinking", "thinking": "why", "signature": ""}
    assert text == {"type": "text", "text": "I see."}
    assert (called["type"], called["name"], called["input"]) == (
        "tool_use",
        "look",
        {"city": "Paris"},
    )
    assert answer["stop_reason"] == "tool_use"
    events = events_of(await send(router, stream=True))
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    partial = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
    assert json.loads("".join(partial)) == {"city": "Paris"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_what_was_answered_may_be_sent_again(router: Router) -> None:
    output = (await respond(router)).json()["output"]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "sunny"}
    first = {"role": "user", "content": "plain"}
    assert (await respond(router, [first, *output, result])).status == 200
    prompt = prompt_of(router)
    assert "sunny" in prompt
    assert "Paris" in prompt
    content = (await send(router)).json()["content"]
    results = [{"type": "tool_result", "tool_use_id": content[-1]["id"], "content": "sunny"}]
    history = [
        first,
        {"role": "assistant", "content": content},
        {"role": "user", "content": results},
    ]
    assert (await send(router, history)).status == 200
    assert prompt_of(router) == prompt


async def test_the_switch_for_thinking(router: Router) -> None:
    for thinking, opened in (({"type": "enabled", "budget_tokens": 9}, True), (None, False)):
        answer = (await send(router, thinking=thinking)).json()
        assert prompt_of(router).endswith("<think>\n") == opened
        assert answer["content"][0] == {"type": "thinking", "thinking": "why", "signature": ""}
    hidden = (await send(router, thinking={"type": "enabled", "display": "omitted"})).json()
    assert [block["type"] for block in hidden["content"]] == ["text", "tool_use"]
    answer = (await respond(router, reasoning={"effort": "low"})).json()
    assert prompt_of(router).endswith("<think>\n")
    assert answer["output"][0]["content"][0]["text"] == "why"


async def test_thinking_that_the_limit_cuts(router: Router) -> None:
    answer = (await respond(router, max_output_tokens=9)).json()
    (item,) = answer["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")
    assert item["content"][0]["text"]


async def test_a_call_that_must_come_is_bound(router: Router) -> None:
    for choice in ("required", {"type": "function", "name": "look"}):
        assert (await respond(router, tool_choice=choice)).status == 200
        assert router.engines.submits[-1].grammar
    for choice in ({"type": "any"}, {"type": "tool", "name": "look"}):
        assert (await send(router, tool_choice=choice)).status == 200
        assert router.engines.submits[-1].grammar
    for choice in ("auto", "none"):
        assert (await respond(router, tool_choice=choice)).status == 200
        assert not router.engines.submits[-1].grammar


async def test_tools_that_may_not_be_called(router: Router) -> None:
    tools = [*RESPONSE_TOOLS, {"type": "function", "name": "other"}]
    only = [{"type": "function", "name": "other"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": only}
    answer = (await respond(router, tools=tools, tool_choice=choice)).json()
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert answer["tool_choice"] == choice
    for none in (await respond(router, tool_choice="none"), await respond(router, tools=None)):
        assert [item["type"] for item in none.json()["output"]] == ["reasoning", "message"]


async def test_a_form_that_must_be_kept_is_bound(router: Router) -> None:
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    assert (await respond(router, tools=None, text={"format": form})).status == 200
    assert router.engines.submits[-1].grammar
    form = {"type": "json_schema", "schema": SCHEMA}
    assert (await send(router, tools=None, output_config={"format": form})).status == 200
    assert router.engines.submits[-1].grammar


async def test_errors_of_schemas_and_tools_name_the_routes_own_fields(router: Router) -> None:
    bad = {"type": "json_schema", "name": "x", "schema": {"type": "strng"}}
    error = (await respond(router, tools=None, text={"format": bad})).json()["error"]
    assert error["param"].startswith("text.format")
    assert "response_format" not in error["message"]
    told = (await send(router, tools=None, output_config={"format": bad})).json()["error"]
    assert told["type"] == "invalid_request_error"
    assert "response_format" not in told["message"]
    error = (await respond(router, tools=[{"type": "function"}])).json()["error"]
    assert error["param"] == "tools[0].name"
    told = (await send(router, tools=[{"input_schema": SCHEMA}])).json()["error"]
    assert "'tools[0].name'" in told["message"]
    told = (await send(router, tools=[{"name": "f", "input_schema": 5}])).json()["error"]
    assert "'tools[0].input_schema'" in told["message"]
    for choice, param in (
        ({"type": "function", "name": "x"}, "tool_choice.name"),
        ({"type": "mcp"}, "tool_choice.type"),
        ({"type": "allowed_tools", "mode": "x", "tools": [{}]}, "tool_choice.mode"),
        ({"type": "allowed_tools", "tools": [{"name": "x"}]}, "tool_choice.tools[0].name"),
    ):
        error = (await respond(router, tool_choice=choice)).json()["error"]
        assert error["param"] == param
    error = (await respond(router, tools=[{"type": "web_search"}])).json()["error"]
    assert error["param"] == "tools[0].type"
    assert "web_search" in error["message"]
