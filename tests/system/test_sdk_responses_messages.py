"""The openai SDK on /v1/responses and the anthropic SDK on /v1/messages: a real router process
with a scripted engine.

Numbers in test names are cases of the project's API corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.serving import Server, serve
from tools.tiny_model import CHAT_TEMPLATE, write_tiny_model

MODEL = "tiny"
KEY = "secret-key"
TEXT = "sun ☀️ and 😊 你好"
CALL = '<tool_call>\n{"name": "City", "arguments": {"city": "Paris", "people": 2}}\n</tool_call>'
SCRIPT: dict[str, Any] = {
    "rules": [
        {"match": {"contains": "fails"}, "reply": "abc" * 20, "finish": "error", "detail": "inner"},
        {"match": {"contains": "as json"}, "reply": '{"city":"Paris","people":2}'},
        {"match": {"contains": "sunny"}, "reply": TEXT},
        {"match": {"contains": "look"}, "reply": f"<think>hm</think>I see.{CALL}"},
        {"match": "*", "reply": TEXT},
    ]
}


class City(BaseModel):
    city: str
    people: int


def thinking_model(folder: Path) -> Path:
    """A tiny model whose template knows thinking."""
    settings = write_tiny_model(folder) / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content["chat_template"] = CHAT_TEMPLATE + "{% if false %}<think>{% endif %}"
    settings.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = thinking_model(tmp_path_factory.mktemp("models") / MODEL)
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    with serve(
        "--models", f"{MODEL}={folder}", "--api-key-file", str(keys), script=SCRIPT
    ) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# -- openai, /v1/responses


def test_responses_create(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hi", instructions="Be kind.")
    assert answer.output_text == TEXT
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(TEXT.encode()) + 1
    again: list[Any] = [*user("hi"), *(item.to_dict() for item in answer.output), *user("more")]
    assert client.responses.create(model=MODEL, input=again, store=False).output_text == TEXT
    counted = client.responses.input_tokens.count(model=MODEL, input="hi", instructions="Be kind.")
    assert counted.input_tokens == answer.usage.input_tokens


def test_responses_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert final.output_text == "".join(deltas) == TEXT
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client.responses.create(model=MODEL, input="hi", stream=True, max_output_tokens=3) as raw:
        last = list(raw)[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_responses_parse(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model=MODEL, input="as json", text_format=City)
    assert answer.output_parsed == City(city="Paris", people=2)
    with client.responses.stream(model=MODEL, input="as json", text_format=City) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == City(city="Paris", people=2)


def test_responses_tools_and_thinking_232(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(City)]
    with client.responses.stream(model=MODEL, input="look", tools=tools) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "I see."
    called = final.output[-1]
    assert called.type == "function_call"
    assert called.parsed_arguments == City(city="Paris", people=2)
    history: list[Any] = [*user("look"), *(item.to_dict() for item in final.output)]
    for item in history:
        item.pop("parsed_arguments", None)
    history.append({"type": "function_call_output", "call_id": called.call_id, "output": "sunny"})
    assert client.responses.create(model=MODEL, input=history).output_text == TEXT


def test_responses_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError) as hosted:
        client.responses.create(model=MODEL, input="hi", tools=[{"type": "web_search"}])
    assert hosted.value.param == "tools[0].type"
    with client.responses.create(model=MODEL, input="fails", stream=True) as raw:
        events = list(raw)
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]


# -- anthropic, /v1/messages


def test_messages_create(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model=MODEL, max_tokens=100, messages=user("hi"), system="Be kind."
    )
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].to_dict()["text"] == TEXT
    assert answer.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model=MODEL, messages=user("hi"), system="Be kind.")
    assert counted.input_tokens == answer.usage.input_tokens > 0
    history: list[Any] = [
        *user("hi"),
        {"role": "assistant", "content": [block.to_dict() for block in answer.content]},
        *user("more"),
    ]
    stopped = claude.messages.create(
        model=MODEL, max_tokens=100, messages=history, stop_sequences=["and"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "and")


def test_messages_stream_229(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, max_tokens=100, messages=user("hi")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == TEXT
    assert final.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model=MODEL, messages=user("hi"))
    assert final.usage.input_tokens == counted.input_tokens
    assert final.usage.output_tokens == len(TEXT.encode()) + 1


def test_messages_tools_and_thinking_230(claude: anthropic.Anthropic) -> None:
    tools: list[Any] = [{"name": "City", "input_schema": City.model_json_schema()}]
    with claude.messages.stream(
        model=MODEL, max_tokens=200, messages=user("look"), tools=tools
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert "thinking" in kinds
    assert final.stop_reason == "tool_use"
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    called = final.content[-1]
    assert called.type == "tool_use"
    assert called.input == {"city": "Paris", "people": 2}
    history: list[Any] = [
        *user("look"),
        {"role": "assistant", "content": [block.to_dict() for block in final.content]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": called.id, "content": "sunny"}],
        },
    ]
    answer = claude.messages.create(model=MODEL, max_tokens=200, messages=history, tools=tools)
    assert answer.content[0].to_dict() == {"type": "text", "text": TEXT}


def test_messages_errors_237(claude: anthropic.Anthropic, server: Server) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model=MODEL, max_tokens=0, messages=user("hi"))
    assert caught.value.request_id
    body: Any = caught.value.body
    assert body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nope", max_tokens=5, messages=user("hi"))
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as refused,
    ):
        stranger.messages.create(model=MODEL, max_tokens=5, messages=user("hi"))
    assert refused.value.type == "authentication_error"
    with pytest.raises(anthropic.APIStatusError) as broken:
        list(
            claude.messages.create(model=MODEL, max_tokens=200, messages=user("fails"), stream=True)
        )
    assert broken.value.type == "api_error"


def test_both_name_the_request(server: Server) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": user("hi")}
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "abc"}
    answer = httpx.post(f"{server.url}/v1/messages", json=body, headers=headers)
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == "abc"
