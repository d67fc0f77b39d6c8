"""POST /v1/messages in one process: real routes and flow over scripted engines.

Numbers in test names are cases of the project's API corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.protocol import unpack_tokens
from router.api.messages_input import chat_of
from router.api.messages_schema import MessagesRequest
from router.api.schemas import ChatRequest, decode_body
from router.errors import BadRequest
from router.flow import FlowSettings
from tests.router_parts import MAX_LEN, MODEL, Answer, Play, Router, call, router_parts, text_play
from tools.tiny_model import encode_text, write_tiny_model


def plays(prompt: str) -> Play:
    """Scenes by a word anywhere in the prompt."""
    scenes = {
        "breaks": Play([encode_text("abc")] * 40, error="/secret/path.py"),
        "broken": Play([], error="/secret/path.py"),
        "nothing": Play([]),
        "silent": Play([], waits=True),
        "endless": Play([encode_text("x")] * MAX_LEN, stop=False),
    }
    for word, play in scenes.items():
        if word in prompt:
            return play
    return text_play("Hel", "lo ", "wörld")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


@pytest_asyncio.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays) as made:
        yield made


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


async def send(router: Router, content: Any = "hi", **fields: Any) -> Answer:
    body = {"model": MODEL, "max_tokens": 100, "messages": user(content), **fields}
    return await call(router.app, "POST", "/v1/messages", body)


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """The events; their names are checked."""
    events: list[dict[str, Any]] = []
    for block in answer.body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def chat_from(**body: Any) -> ChatRequest:
    given = {"model": MODEL, "max_tokens": 9, "messages": user("hi"), **body}
    return chat_of(decode_body(json.dumps(given).encode(), MessagesRequest))


def refused(**body: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        chat_from(**body)
    return caught.value


# -- answers


async def test_whole(router: Router) -> None:
    answer = await send(router, metadata={"user_id": "u"})
    assert answer.status == 200
    body = answer.json()
    assert body["id"].startswith("msg_")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", MODEL)
    assert body["content"] == [{"type": "text", "text": "Hello wörld"}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert body["usage"]["output_tokens"] == len("Hello wörld".encode()) + 1
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_case_229_counts_of_the_stream(router: Router) -> None:
    fields: dict[str, Any] = {"system": "Be kind."}
    answer = await send(router, stream=True, **fields)
    events = events_of(answer)
    assert [event["type"] for event in events] == [
        "message_start",
        *["ping"] * (events[1]["type"] == "ping"),
        "content_block_start",
        *["content_block_delta"] * sum(e["type"] == "content_block_delta" for e in events),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    body = {"model": MODEL, "messages": user("hi"), **fields}
    counted = await call(router.app, "POST", "/v1/messages/count_tokens", body)
    start = events[0]["message"]
    assert counted.json() == {"input_tokens": start["usage"]["input_tokens"]}
    assert start["usage"]["input_tokens"] > 0
    assert (start["content"], start["stop_reason"]) == ([], None)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == "Hello wörld"
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    whole = (await send(router, **fields)).json()
    assert events[-2]["usage"] == whole["usage"]


async def test_why_it_ended(router: Router) -> None:
    cut = (await send(router, max_tokens=4)).json()
    assert (cut["stop_reason"], cut["content"][0]["text"]) == ("max_tokens", "Hell")
    stopped = (await send(router, stop_sequences=["zz", "wö"])).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "wö")
    assert stopped["content"][0]["text"] == "Hello "
    streamed = events_of(await send(router, stop_sequences=["zz", "wö"], stream=True))
    assert streamed[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "wö"}
    full = (await send(router, "endless", max_tokens=10_000)).json()
    assert full["stop_reason"] == "model_context_window_exceeded"
    assert full["usage"]["input_tokens"] + full["usage"]["output_tokens"] == MAX_LEN


async def test_an_answer_without_words(router: Router) -> None:
    assert (await send(router, "nothing")).json()["content"] == [{"type": "text", "text": ""}]


async def test_the_answer_goes_on_with_the_assistant_s_last_words(router: Router) -> None:
    messages = [*user("hi"), {"role": "assistant", "content": "The answer is ("}]
    answer = await send(router, messages=messages)
    assert answer.status == 200
    prompt = unpack_tokens(router.engines.submits[-1].tokens)
    text = router.model.tokenizer.decode(list(prompt), skip_special=False)
    assert text.endswith("<|im_start|>assistant\nThe answer is (")


async def test_case_239_thinking_in_the_history(router: Router) -> None:
    history = [
        *user("hi"),
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "..", "signature": ""},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "yes", "cache_control": {"type": "ephemeral"}},
            ],
        },
        *user("more"),
    ]
    assert (await send(router, messages=history)).status == 200


async def test_a_silent_wait_is_told_by_pings(folder: Path) -> None:
    async with router_parts(folder, plays, settings=FlowSettings(ping_s=0.01)) as router:
        body = {"model": MODEL, "max_tokens": 9, "messages": user("silent"), "stream": True}
        answer = await call(router.app, "POST", "/v1/messages", body, leave_after=4)
        assert {event["type"] for event in events_of(answer)} == {"message_start", "ping"}
        assert router.engines.running == set()


async def test_a_failure_in_the_stream(router: Router) -> None:
    answer = await send(router, "breaks", max_tokens=300, stream=True)
    error = events_of(answer)[-1]
    assert error["type"] == "error"
    assert error["error"]["type"] == "api_error"
    assert "secret" not in error["error"]["message"]
    assert error["request_id"] == answer.headers["request-id"]
    whole = await send(router, "broken")
    assert (whole.status, whole.json()["error"]["type"]) == (500, "api_error")


async def test_case_237_errors_have_anthropic_s_form(folder: Path) -> None:
    keys = (hashlib.sha256(b"secret").digest(),)
    async with router_parts(folder, plays, keys=keys) as router:

        async def error(path: str, body: Any, key: str = "secret", method: str = "POST") -> Any:
            headers = {"authorization": f"Bearer {key}", "x-request-id": "abc"}
            answer = await call(router.app, method, path, body, headers=headers)
            assert answer.headers["request-id"] == answer.headers["x-request-id"] == "abc"
            told = answer.json()
            assert set(told) == {"type", "error", "request_id"}
            assert (told["type"], told["request_id"]) == ("error", "abc")
            assert set(told["error"]) == {"type", "message"}
            return answer.status, told["error"]["type"]

        good = {"model": MODEL, "max_tokens": 5, "messages": user("hi")}
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            assert await error(path, good, "wrong") == (401, "authentication_error")
            assert await error(path, {**good, "model": "x"}) == (404, "not_found_error")
            assert await error(path, {**good, "messages": []}) == (400, "invalid_request_error")
            assert await error(path, None, method="GET") == (405, "invalid_request_error")
        zero = {**good, "max_tokens": 0}
        assert await error("/v1/messages", zero) == (400, "invalid_request_error")
        del zero["max_tokens"]
        assert await error("/v1/messages", zero) == (400, "invalid_request_error")
        long = {**good, "messages": user("x" * MAX_LEN)}
        assert await error("/v1/messages", long) == (400, "invalid_request_error")


# -- requests


def test_blocks_become_messages() -> None:
    chat = chat_from(
        system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "c"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                    {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "r"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "bad"}],
                    },
                    {"type": "text", "text": "d"},
                ],
            },
        ],
    )
    assert [message.role for message in chat.messages] == [
        *("system", "user", "assistant", "tool", "tool", "user")
    ]
    assistant = chat.messages[2]
    assert (assistant.content, assistant.reasoning_content) == ("c", "hm")
    assert assistant.tool_calls == [
        {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "t2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    results = chat.messages[3:5]
    assert [(message.tool_call_id, message.content) for message in results] == [
        ("t1", "r"),
        ("t2", "bad"),
    ]
    assert chat.continue_final_message is False


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (user([{"type": "text", "text": "a"}, {"type": "image"}]), "messages[0].content[1].type"),
        (user([{"type": "document"}]), "messages[0].content[0].type"),
        (user([{"type": "tool_use", "id": "x"}]), "messages[0].content[0].type"),
        (user([{"type": "tool_result"}]), "messages[0].content[0].tool_use_id"),
        (user([{"type": "text"}]), "messages[0].content[0].text"),
        (user([]), "messages[0].content"),
        (
            user([{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}]),
            "messages[0].content[0].content[0].type",
        ),
        (
            user([{"type": "tool_result", "tool_use_id": "t", "content": 5}]),
            "messages[0].content[0].content",
        ),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "assistant", "content": [{"type": "redacted_thinking"}]}], "messages"),
        (
            [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f"}]}],
            "messages[0].content[0].input",
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}],
                }
            ],
            "messages",
        ),
    ],
)
def test_messages_that_are_refused(messages: list[Any], param: str) -> None:
    assert refused(messages=messages).param == param


def test_tools_and_choices() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"name": "f", "description": "d", "input_schema": schema, "type": "custom"}]
    chat = chat_from(tools=tools)
    function = {"name": "f", "description": "d", "parameters": schema}
    assert chat.tools == [{"type": "function", "function": function}]
    assert (chat.tool_choice, chat.parallel_tool_calls) == (None, True)
    for given, wanted in (
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ):
        chat = chat_from(tools=tools, tool_choice={**given, "disable_parallel_tool_use": True})
        assert (chat.tool_choice, chat.parallel_tool_calls) == (wanted, False)
    assert refused(tools=[{"type": "bash_20250124", "name": "bash"}]).param == "tools[0].type"
    assert refused(tools=["x"]).param == "tools[0]"
    assert refused(tool_choice="auto").param == "tool_choice"
    assert refused(tool_choice={"type": ["x"]}).param == "tool_choice.type"


def test_thinking_effort_and_format() -> None:
    assert chat_from().chat_template_kwargs == {}
    for kind, wanted in (("enabled", True), ("adaptive", True), ("disabled", False)):
        chat = chat_from(thinking={"type": kind, "budget_tokens": 2000})
        assert chat.chat_template_kwargs == {"enable_thinking": wanted}
        assert chat.include_reasoning is True
    hidden = chat_from(thinking={"type": "adaptive", "display": "omitted"})
    assert hidden.include_reasoning is False
    own = chat_from(
        thinking={"type": "disabled"},
        chat_template_kwargs={"enable_thinking": True},
        output_config={"effort": "low"},
    )
    assert own.chat_template_kwargs == {"enable_thinking": True, "reasoning_effort": "low"}
    assert refused(thinking={"type": "x"}).param == "thinking.type"
    assert refused(output_config={"effort": "x"}).param == "output_config.effort"
    form = {"type": "json_schema", "schema": {"type": "object"}}
    bound = chat_from(output_config={"format": form})
    assert bound.response_format["json_schema"]["schema"] == {"type": "object"}
    wrong = refused(output_config={"format": {"type": "text"}})
    assert wrong.param == "output_config.format.type"
    assert refused(n=2).param == "n"
