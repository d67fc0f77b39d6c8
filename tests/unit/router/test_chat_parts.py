"""Thinking, tool calls and bound answers through the chat route, over scripted engines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.router_parts import MODEL, Answer, Play, Router, call, chat, router_parts, text_play
from tools.tiny_model import write_tiny_model

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 22}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% endif %}"
)


def plays(prompt: str) -> Play:
    scenes = {
        "one": text_play("I add. ", CALL),
        "two": text_play(CALL + "\n" + CALL),
        "unknown": text_play('<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>'),
        "cut": Play(text_play("x" + CALL[:45]).steps, stop=False),
        "thinks": text_play("why", "</th", "ink>", "\n\n42"),
        "both": text_play("hm</think>", CALL),
    }
    for word, play in scenes.items():
        if f"scene {word}" in prompt:
            return play
    return text_play("plain")


def thinking_model(folder: Path) -> Path:
    write_tiny_model(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture(scope="module")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinking_model(tmp_path_factory.mktemp("thinking") / MODEL)


@pytest_asyncio.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays, max_len=4096) as parts:
        yield parts


@pytest_asyncio.fixture
async def thinker(thinking_folder: Path) -> AsyncIterator[Router]:
    async with router_parts(thinking_folder, plays, max_len=4096) as parts:
        yield parts


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"scene {text}"}], **more}


def choice(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    return answer.json()["choices"][0]


def gathered(answer: Answer) -> dict[str, Any]:
    """The message that a client puts together from a stream, with the rules of case 072 checked."""
    assert answer.status == 200, answer.body
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    for event in answer.events():
        for one in event["choices"]:
            delta = one["delta"]
            assert sum(bool(delta.get(key)) for key in ("content", "reasoning_content")) <= 1
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning_content") or ""
            calls = delta.get("tool_calls") or []
            assert len({entry["index"] for entry in calls}) == len(calls)
            for entry in calls:
                if "id" in entry:
                    assert entry["type"] == "function"
                    assert entry["index"] == len(message["calls"])
                    message["calls"].append([entry["function"]["name"], ""])
                message["calls"][entry["index"]][1] += entry["function"]["arguments"]
            message["finish"] = one["finish_reason"] or message.get("finish")
    return message


@pytest.mark.parametrize(
    ("scene", "content", "num_calls", "finish"),
    [
        ("one", "I add.", 1, "tool_calls"),
        ("two", "", 2, "tool_calls"),
        ("other", "plain", 0, "stop"),
        ("unknown", '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>', 0, "stop"),
    ],
)
async def test_calls_streamed_and_whole(
    router: Router, scene: str, content: str, num_calls: int, finish: str
) -> None:
    whole = choice(await chat(router.app, **ask(scene, tools=TOOLS)))
    calls = whole["message"].get("tool_calls", [])
    assert (whole["message"]["content"] or "") == content
    assert [entry["function"]["name"] for entry in calls] == ["add"] * num_calls
    assert all(json.loads(c["function"]["arguments"]) == {"a": 1, "b": 22} for c in calls)
    assert len({entry["id"] for entry in calls}) == num_calls
    assert whole["finish_reason"] == finish
    streamed = gathered(await chat(router.app, stream=True, **ask(scene, tools=TOOLS)))
    assert streamed["content"] == content
    assert streamed["calls"] == [["add", c["function"]["arguments"]] for c in calls]
    assert streamed["finish"] == finish


async def test_without_tools_the_text_stays(router: Router) -> None:
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        whole = choice(await chat(router.app, **ask("one", **more)))
        assert whole["message"]["content"] == "I add. " + CALL
        assert whole["finish_reason"] == "stop"


async def test_one_call_where_only_one_is_wanted(router: Router) -> None:
    body = ask("two", tools=TOOLS, parallel_tool_calls=False)
    whole = choice(await chat(router.app, **body))
    assert len(whole["message"]["tool_calls"]) == 1
    assert whole["finish_reason"] == "tool_calls"
    assert len(gathered(await chat(router.app, stream=True, **body))["calls"]) == 1


async def test_a_call_cut_by_the_limit_ends_with_length(router: Router) -> None:
    body = ask("cut", tools=TOOLS)
    answer = await chat(router.app, stream=True, **body)
    assert answer.ended
    assert gathered(answer)["finish"] == "length"
    assert choice(await chat(router.app, **body))["finish_reason"] == "length"


async def test_a_forced_call_is_bound_by_a_grammar(router: Router) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    for wanted in ("required", named):
        await chat(router.app, **ask("one", tools=TOOLS, tool_choice=wanted))
        grammar = router.engines.submits[-1].grammar
        assert "add" in grammar
        assert ("stop" in grammar) == (wanted == "required")
    await chat(router.app, **ask("one", tools=TOOLS))
    assert router.engines.submits[-1].grammar == ""


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
        ),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
async def test_what_cannot_be_done_is_refused(
    router: Router, change: dict[str, Any], param: str
) -> None:
    answer = await chat(router.app, **ask("one", **change))
    assert answer.status == 400, answer.body
    assert answer.json()["error"]["param"] == param
    assert not router.engines.submits


async def test_every_route_takes_bound_answers(router: Router) -> None:
    body = {"model": MODEL, "prompt": "x", "guided_choice": ["yes", "no"]}
    answer = await call(router.app, "POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    await chat(router.app, **ask("x", response_format={"type": "json_object"}))
    assert all(submit.grammar for submit in router.engines.submits)


async def test_completions_have_no_tools(router: Router) -> None:
    answer = await call(
        router.app, "POST", "/v1/completions", {"model": MODEL, "prompt": "x", "tools": TOOLS}
    )
    assert answer.json()["error"]["param"] == "tools"


async def test_thinking_is_told_apart_088(thinker: Router) -> None:
    answer = await chat(thinker.app, **ask("thinks"))
    message = choice(answer)["message"]
    assert (message["reasoning_content"], message["content"]) == ("why", "42")
    details = answer.json()["usage"]["completion_tokens_details"]
    assert 3 <= details["reasoning_tokens"] < answer.json()["usage"]["completion_tokens"]
    streamed = gathered(await chat(thinker.app, stream=True, **ask("thinks")))
    assert (streamed["reasoning"], streamed["content"]) == ("why", "42")


@pytest.mark.parametrize(
    ("change", "reasoning", "content"),
    [
        ({"include_reasoning": False}, None, "42"),
        ({"separate_reasoning": False}, "absent", "why</think>\n\n42"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None, "why</think>\n\n42"),
        ({"reasoning_effort": "none"}, None, "why</think>\n\n42"),
    ],
)
async def test_switches_of_thinking(
    thinker: Router, change: dict[str, Any], reasoning: str | None, content: str
) -> None:
    message = choice(await chat(thinker.app, **ask("thinks", **change)))["message"]
    assert message.get("reasoning_content", "absent") == reasoning
    assert message["content"] == content


async def test_a_call_behind_thinking_090(thinker: Router) -> None:
    whole = choice(await chat(thinker.app, **ask("both", tools=TOOLS)))
    assert whole["message"]["reasoning_content"] == "hm"
    assert whole["message"]["content"] is None
    assert whole["finish_reason"] == "tool_calls"


async def test_a_bound_answer_may_be_thought_about(thinker: Router) -> None:
    await chat(thinker.app, **ask("x", response_format={"type": "json_object"}))
    assert "think" in thinker.engines.submits[-1].grammar
    await chat(
        thinker.app, **ask("x", response_format={"type": "json_object"}, reasoning_effort="none")
    )
    assert "think" not in thinker.engines.submits[-1].grammar
