"""POST /v1/responses in one process: real routes and flow over scripted engines.

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
from router.api.responses_input import NAMES, chat_of
from router.api.responses_schema import ResponsesRequest
from router.api.schemas import ChatRequest, decode_body
from router.errors import BadRequest
from tests.router_parts import MAX_LEN, MODEL, Answer, Play, Router, call, router_parts, text_play
from tools.tiny_model import encode_text, write_tiny_model


def plays(prompt: str) -> Play:
    """Scenes by a word anywhere in the prompt."""
    scenes = {
        "breaks": Play([encode_text("abc")] * 40, error="/secret/path.py"),
        "broken": Play([], error="/secret/path.py"),
        "nothing": Play([]),
        "silent": Play([], waits=True),
    }
    for word, play in scenes.items():
        if word in prompt:
            return play
    return text_play("Hel", "lo ", "wörld\u2028")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


@pytest_asyncio.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays) as made:
        yield made


async def respond(router: Router, input: Any = "hi", **fields: Any) -> Answer:
    body = {"model": MODEL, "input": input, **fields}
    return await call(router.app, "POST", "/v1/responses", body)


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """The events; names and numbers are checked."""
    events: list[dict[str, Any]] = []
    for block in answer.body.decode().split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def chat_from(**body: Any) -> ChatRequest:
    return chat_of(decode_body(json.dumps({"model": MODEL, **body}).encode(), ResponsesRequest))


def refused(**body: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        chat_from(**{"input": "hi", **body})
    return caught.value


# -- answers


async def test_whole(router: Router) -> None:
    answer = await respond(router, metadata={"a": "b"}, store=True, temperature=0.5)
    assert answer.status == 200
    body = answer.json()
    assert body["object"] == "response"
    assert body["id"].startswith("resp_")
    assert body["status"] == "completed"
    assert body["completed_at"] >= body["created_at"] > 0
    assert (body["error"], body["incomplete_details"]) == (None, None)
    assert (body["store"], body["metadata"], body["temperature"]) == (False, {"a": "b"}, 0.5)
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == ([], "auto", True)
    assert body["text"] == {"format": {"type": "text"}, "verbosity": None}
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    part = {"type": "output_text", "text": "Hello wörld\u2028", "annotations": [], "logprobs": []}
    assert item["content"] == [part]
    usage = body["usage"]
    assert usage["output_tokens"] == len("Hello wörld\u2028".encode()) + 1
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"]["cached_tokens"] >= 0
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


async def test_case_234_order_of_events(router: Router) -> None:
    answer = await respond(router, stream=True)
    assert "\u2028" not in answer.body.decode()
    events = events_of(answer)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * (len(events) - 8),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event["delta"] for event in events[4:-4])
    whole = (await respond(router)).json()
    last = events[-1]["response"]
    assert text == events[-4]["text"] == last["output"][0]["content"][0]["text"]
    assert text == whole["output"][0]["content"][0]["text"]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert {event["response"]["id"] for event in events if "response" in event} == {last["id"]}
    item_id = last["output"][0]["id"]
    assert {event["item_id"] for event in events if "item_id" in event} == {item_id}
    assert {event.get("content_index", 0) for event in events} == {0}
    assert events[0]["response"]["status"] == "in_progress"
    assert (events[2]["item"]["content"], events[2]["item"]["status"]) == ([], "in_progress")
    assert events[-2]["item"] == last["output"][0]


async def test_an_answer_without_words(router: Router) -> None:
    body = (await respond(router, "nothing")).json()
    assert [part["text"] for part in body["output"][0]["content"]] == [""]
    types = [event["type"] for event in events_of(await respond(router, "nothing", stream=True))]
    assert types[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert types[-1] == "response.completed"


async def test_the_token_limit_makes_it_incomplete(router: Router) -> None:
    body = (await respond(router, max_output_tokens=4)).json()
    assert (body["status"], body["completed_at"]) == ("incomplete", None)
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete"
    assert body["output"][0]["content"][0]["text"] == "Hell"
    last = events_of(await respond(router, max_output_tokens=4, stream=True))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_logprobs(router: Router) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = (await respond(router, **fields)).json()
    told = body["output"][0]["content"][0]["logprobs"]
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == "Hello wörld\u2028"
    assert {len(entry["top_logprobs"]) for entry in told} == {2}
    events = events_of(await respond(router, stream=True, **fields))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == told
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == told


async def test_case_233_items_are_the_same_prompt_as_a_string(router: Router) -> None:
    parts = [{"type": "input_text", "text": "hi"}]
    for given in (
        "hi",
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": parts}],
        [{"type": "message", "role": "user", "content": parts}],
    ):
        answer = await respond(router, given)
        assert answer.status == 200, answer.json()
        prompt = router.engines.submits[-1].tokens
        assert prompt == router.engines.submits[0].tokens
        counted = await call(
            router.app, "POST", "/v1/responses/input_tokens", {"model": MODEL, "input": given}
        )
        size = answer.json()["usage"]["input_tokens"]
        assert counted.json() == {"object": "response.input_tokens", "input_tokens": size}


async def test_a_failure_in_the_stream(router: Router) -> None:
    events = events_of(await respond(router, "breaks", stream=True))
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    error, failed = events[-2:]
    assert (error["code"], error["param"]) == ("internal_error", None)
    assert "secret" not in error["message"]
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    (item,) = failed["response"]["output"]
    assert item["status"] == "incomplete"
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert item["content"][0]["text"] == "".join(deltas)
    answer = await respond(router, "broken")
    assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")


async def test_a_client_that_leaves_frees_its_sequence(router: Router) -> None:
    body = {"model": MODEL, "input": "silent", "stream": True}
    await call(router.app, "POST", "/v1/responses", body, leave_after=1)
    assert router.engines.running == set()


async def test_errors_name_this_route_s_fields(router: Router) -> None:
    for fields, param in (
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"reasoning": {"effort": "immense"}}, "reasoning.effort"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"input": "x" * MAX_LEN}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"n": 2}, "n"),
        ({"model": "nope"}, "model"),
    ):
        answer = await respond(router, **fields)
        error = answer.json()["error"]
        assert answer.status in (400, 404)
        assert error["param"] == param, error
        assert "messages" not in error["message"]


async def test_truncation_drops_the_oldest_turns(router: Router) -> None:
    turns = [
        {"role": role, "content": f"{i:03} " + "x" * 60}
        for i in range(20)
        for role in ("user", "assistant")
    ]
    turns.append({"role": "user", "content": "the last"})
    refused = await respond(router, turns, truncation="disabled")
    assert (refused.status, refused.json()["error"]["param"]) == (400, "input")
    answer = await respond(router, turns, truncation="auto", instructions="Be short.")
    assert answer.status == 200
    assert answer.json()["truncation"] == "auto"
    assert MAX_LEN - 200 < answer.json()["usage"]["input_tokens"] < MAX_LEN
    prompt = router.model.tokenizer.decode(_ids(router), skip_special=False)
    assert prompt.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n01")
    assert "the last" in prompt
    too_long = await respond(router, "y" * MAX_LEN, truncation="auto")
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def _ids(router: Router) -> list[int]:
    return list(unpack_tokens(router.engines.submits[-1].tokens))


# -- requests


def test_items_become_messages() -> None:
    chat = chat_from(
        instructions="Be kind.",
        input=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "sum"}],
                "content": [{"type": "reasoning_text", "text": "hm"}],
            },
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "a", "annotations": []},
                    {"type": "refusal", "refusal": "no"},
                ],
            },
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "r"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "s"}],
            },
        ],
    )
    assert [message.role for message in chat.messages] == [
        *("system", "developer", "user", "assistant", "tool", "tool")
    ]
    assistant = chat.messages[3]
    assert assistant.reasoning_content == "hm"
    assert assistant.tool_calls == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    ]
    assert [message.content for message in chat.messages[4:]] == ["r", "s"]
    assert [message.tool_call_id for message in chat.messages[4:]] == ["c1", "c2"]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "web_search_call", "id": "w", "action": {}}, "input[0].type"),
        ({"type": "item_reference", "id": "m"}, "input[0].type"),
        ({"type": "computer_call_output", "output": {"type": "x"}}, "input[0].type"),
        ({"role": "banana", "content": "x"}, "input[0].role"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": 5}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0].type"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input[0].call_id"),
        ({"type": "function_call", "name": "f", "arguments": {}}, "input[0].arguments"),
        ({"type": "function_call_output", "call_id": "c"}, "input[0].output"),
    ],
)
def test_items_that_are_refused(item: dict[str, Any], param: str) -> None:
    error = refused(input=[item])
    assert error.param == param
    if param == "input[0].type":
        assert item["type"] in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", {"id": "conv_1"}),
        ("background", True),
        ("prompt", {"id": "pmpt_1"}),
    ],
)
def test_what_needs_memory_is_refused(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert error.param == field
    assert "keeps nothing" in error.message


def test_what_is_only_given_back_is_bounded() -> None:
    for metadata in ({"k" * 65: "v"}, {"k": "v" * 513}, {str(i): "v" for i in range(17)}):
        assert refused(metadata=metadata).param == "metadata"
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        assert refused(**{name: "x" * 513}).param == name


def test_format_effort_and_extras() -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    chat = chat_from(input="hi", text={"format": form}, reasoning={"effort": "low"}, top_k=3)
    inner = {"name": "x", "schema": {"type": "object"}, "strict": True}
    assert chat.response_format == {"type": "json_schema", "json_schema": inner}
    assert (chat.reasoning_effort, chat.top_k) == ("low", 3)
    plain = chat_from(input="hi", text={"format": {"type": "json_object"}})
    assert plain.response_format == {"type": "json_object"}
    assert chat_from(input="hi", text={"verbosity": "low"}).response_format is None
    both = refused(text={"format": form}, response_format={"type": "text"})
    assert both.param == "text.format"
    assert refused(truncation="some").param == "truncation"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("messages", "input"),
        ("messages[3].content", "input"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("response_format.type", "text.format.type"),
        ("tools[2].type", "tools[2].type"),
        ("max_completion_tokens", "max_output_tokens"),
        ("max_completion_tokens_x", "max_completion_tokens_x"),
    ],
)
def test_names_of_fields(path: str, name: str) -> None:
    with pytest.raises(BadRequest) as caught, NAMES.applied():
        raise BadRequest(f"'{path}' is 'wrong'.", param=path)
    assert caught.value.param == name
    assert caught.value.message == f"'{name}' is 'wrong'."
