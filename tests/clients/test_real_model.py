"""Bound answers of a real model through the clients: whatever it would rather say, it fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.clients.runs import LIMIT_S
from tests.demo_model import demo_model
from tests.serving import Server, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

MODEL = "smollm2-135m"
TEXT = "Tell me about a city."


class City(BaseModel):
    """A city; every part of it has an end."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]
    inhabitants: int = Field(ge=1, le=50_000_000)


@tool
def weather(place: Literal["Oslo", "Bergen"], days: int) -> str:
    """The weather of the next days."""
    return f"twenty-one degrees in {place} for {days} days"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    demo_model()
    with serve("--models", MODEL, "--kv-memory", "500M") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def model(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{server.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        max_retries=0,
        max_completion_tokens=200,
    )


def asked(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": TEXT}]
    return {"model": MODEL, "messages": messages, "temperature": 1, "max_tokens": 200, **fields}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_openai_parses_what_is_drawn_at_random(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.parse(**asked(seed=seed), response_format=City)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, City)
    with client.chat.completions.stream(**asked(seed=seed), response_format=City) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == answer.choices[0].message.content


def test_openai_gets_the_call_that_it_must_get(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["Oslo", "Bergen"]}, "days": {"type": "integer"}},
        "required": ["place", "days"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    for seed in range(3):
        fields = asked(seed=seed, tools=tools, tool_choice="required", parallel_tool_calls=False)
        answer = client.chat.completions.create(**fields)
        assert answer.choices[0].finish_reason in ("tool_calls", "length")
        if answer.choices[0].finish_reason == "length":
            continue  # an integer has no end; the model may go on with it
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "weather"
        arguments = json.loads(call.function.arguments)
        assert arguments["place"] in ("Oslo", "Bergen")
        assert isinstance(arguments["days"], int)


def test_langchain_gets_a_city_and_a_call(model: ChatOpenAI) -> None:
    city = model.with_structured_output(City, method="json_schema").invoke(TEXT)
    assert isinstance(city, City)
    answer = model.bind_tools([weather], tool_choice="weather").invoke(TEXT)
    [call] = answer.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["place"] in ("Oslo", "Bergen")
