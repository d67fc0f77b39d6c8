"""Answers with thinking and calls, as the SDKs' own types and accumulators read them.

The pieces are made by hand; how text becomes them is the scanner's matter. Numbers in test names
are cases of the project's API corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from engine.protocol import Sampling
from router.api.messages_answer import MessageForm
from router.api.messages_schema import MessagesRequest
from router.api.responses_answer import ResponseForm
from router.api.responses_schema import ResponsesRequest
from router.errors import EngineFailed
from router.flow import Job, Progress
from router.record import RequestRecord
from router.text.assembly import FinishReason, Piece, TextRules
from router.text.model import load_text
from router.text.scanner import Delta
from router.text.served import ServedModel
from tools.tiny_model import write_tiny_model

CALL = Delta("call", "", 0, "call_0123", "f")
STEPS: list[list[Delta]] = [
    [Delta("reasoning", "wh")],
    [Delta("reasoning", "y"), Delta("content", "42")],
    [CALL, Delta("arguments", '{"a": ', 0)],
    [Delta("arguments", "[1]}", 0), Delta("call", "", 1, "call_4567", "g")],
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    text = load_text(folder)
    record = RequestRecord("req-1", 0.0, created_s=1_700_000_000, prompt_tokens=7)
    record.completion_tokens, record.reasoning_tokens, record.cached_tokens = 9, 3, 4
    model = ServedModel(("tiny",), text.tokenizer, text.template, 512, 0)
    rules = TextRules(text.tokenizer.pieces(skip_special=True))
    return Job(
        record=record,
        model=model,
        prompts=([1] * 7,),
        n=1,
        max_new=9,
        sampling=Sampling(),
        rules=rules,
    )


def steps_of(deltas: list[list[Delta]], finish: FinishReason) -> Iterator[list[Progress]]:
    for i, step in enumerate(deltas):
        end = finish if i == len(deltas) - 1 else None
        yield [Progress(0, Piece("", [], (), end, step), None)]


def streamed(form: ResponseForm | MessageForm, steps: Iterator[list[Progress]]) -> bytes:
    return form.opening() + b"".join(map(form.step, steps)) + form.closing()


def whole(form: ResponseForm | MessageForm, steps: Iterator[list[Progress]]) -> dict[str, Any]:
    for step in steps:
        form.take(step)
    answer: dict[str, Any] = json.loads(json.dumps(form.whole()))
    return answer


def data_of(stream: bytes) -> list[Any]:
    blocks = stream.decode().split("\n\n")[:-1]
    return [json.loads(block.partition("\ndata: ")[2]) for block in blocks]


def http_of(stream: bytes) -> httpx2.Client:
    """A client whose every answer is this stream."""
    headers = {"content-type": "text/event-stream"}
    return httpx2.Client(
        transport=httpx2.MockTransport(
            lambda _: httpx2.Response(200, content=stream, headers=headers)
        )
    )


# -- responses


def response_form(job: Job) -> ResponseForm:
    return ResponseForm(ResponsesRequest(model="tiny", input="hi"), job, logprobs=False)


def test_case_232_response_stream(job: Job) -> None:
    stream = streamed(response_form(job), steps_of(STEPS, "tool_calls"))
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = data_of(stream)
    for event in events:
        adapter.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert {event["content_index"] for event in events if "content_index" in event} == {0}
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [(event["output_index"], event["item"]["type"]) for event in added] == [
        (0, "reasoning"),
        (1, "message"),
        (2, "function_call"),
        (3, "function_call"),
    ]
    with (
        openai.OpenAI(
            base_url="http://local/v1", api_key="x", http_client=http_of(stream)
        ) as client,
        client.responses.stream(model="tiny", input="hi") as running,
    ):
        final = running.get_final_response()
    assert final.output_text == "42"
    assert [item.type for item in final.output] == [
        *("reasoning", "message", "function_call", "function_call")
    ]
    calls = [item for item in final.output if item.type == "function_call"]
    assert [(call.call_id, call.name, call.arguments) for call in calls] == [
        ("call_0123", "f", '{"a": [1]}'),
        ("call_4567", "g", "{}"),
    ]
    assert final.usage is not None
    assert final.usage.output_tokens_details.reasoning_tokens == 3


def test_a_whole_response_equals_the_streamed_one(job: Job) -> None:
    answer = whole(response_form(job), steps_of(STEPS, "tool_calls"))
    Response.model_validate(answer)
    last = data_of(streamed(response_form(job), steps_of(STEPS, "tool_calls")))[-1]["response"]
    for made in (answer, last):
        made.pop("id")
        for item in made["output"]:
            item.pop("id")
    assert answer == last
    assert answer["output"][0]["content"] == [{"type": "reasoning_text", "text": "why"}]
    assert answer["usage"]["input_tokens_details"]["cached_tokens"] == 4


def test_a_response_cut_inside_a_call(job: Job) -> None:
    cut = steps_of(STEPS[:3], "length")
    answer = whole(response_form(job), cut)
    assert answer["status"] == "incomplete"
    assert [item["status"] for item in answer["output"]] == ["completed"] * 2 + ["incomplete"]
    assert answer["output"][2]["arguments"] == '{"a": '
    Response.model_validate(answer)


def test_a_failed_response(job: Job) -> None:
    form = response_form(job)
    form.opening()
    for step in steps_of(STEPS[:2], "stop"):
        form.step([Progress(0, Piece("", [], (), None, step[0].piece.deltas), None)])
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    error, failed = data_of(form.events(EngineFailed(), "req-1"))
    adapter.validate_python(error)
    adapter.validate_python(failed)
    assert [item["status"] for item in failed["response"]["output"]] == ["completed", "incomplete"]


# -- messages


def message_form(job: Job) -> MessageForm:
    return MessageForm(MessagesRequest(model="tiny", messages=[], max_tokens=9), job)


def test_case_230_message_stream(job: Job) -> None:
    stream = streamed(message_form(job), steps_of(STEPS, "tool_calls"))
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    events = data_of(stream)
    for event in events:
        adapter.validate_python(event)
    with (
        anthropic.Anthropic(
            base_url="http://local", api_key="x", http_client=http_of(stream)
        ) as client,
        client.messages.stream(model="tiny", max_tokens=9, messages=[]) as running,
    ):
        final = running.get_final_message()
    assert final.stop_reason == "tool_use"
    blocks = [block.to_dict() for block in final.content]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    assert (blocks[0]["thinking"], blocks[1]["text"]) == ("why", "42")
    assert [(b["id"], b["name"], b["input"]) for b in blocks[2:]] == [
        ("call_0123", "f", {"a": [1]}),
        ("call_4567", "g", {}),
    ]
    partial = [e["delta"] for e in events if e["type"] == "content_block_delta" and e["index"] == 2]
    assert "".join(delta["partial_json"] for delta in partial) == '{"a": [1]}'


def test_a_whole_message_equals_the_streamed_one(job: Job) -> None:
    answer = whole(message_form(job), steps_of(STEPS, "tool_calls"))
    Message.model_validate(answer)
    assert [block["type"] for block in answer["content"]] == [
        *("thinking", "text", "tool_use", "tool_use")
    ]
    assert answer["content"][2]["input"] == {"a": [1]}
    assert answer["usage"]["output_tokens_details"] == {"thinking_tokens": 3}


@pytest.mark.parametrize(
    ("arguments", "wanted"), [('{"a": "x', {"a": "x"}), ("", {}), ("[1", {}), ("{'", {})]
)
def test_a_message_cut_inside_a_call(job: Job, arguments: str, wanted: dict[str, Any]) -> None:
    step = [CALL, Delta("arguments", arguments, 0)] if arguments else [CALL]
    answer = whole(message_form(job), steps_of([step], "length"))
    assert (answer["stop_reason"], answer["content"][0]["input"]) == ("max_tokens", wanted)
    shorter = replace(job, max_new=50)  # the context was full before that
    answer = whole(message_form(shorter), steps_of([step], "length"))
    assert answer["stop_reason"] == "model_context_window_exceeded"
