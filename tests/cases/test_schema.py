"""Cases of the kind schema: answers bound to a JSON schema, JSON, or a regex."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jiter
import jsonschema
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.cases.asking import (
    CHAT,
    TINY,
    Scripted,
    assert_alive,
    content,
    error,
    openai_client,
    user,
)
from tests.router_parts import MODEL, chat, complete, text_play
from tests.serving import Server
from tools.tiny_model import FIRST_BYTE

OK = text_play("ok")


class Pet(BaseModel):
    """A small thing with nested types."""

    kind: Literal["cat", "dog"]
    legs: Literal[3, 4]


def bound(schema: Any, **more: Any) -> dict[str, Any]:
    """`response_format` of that schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def ask(server: Server, text: str = "Write a poem.", **fields: Any) -> Any:
    """The one choice of a chat with the tiny model, whose weights are random: it obeys nobody."""
    asked = {"model": TINY, "messages": [user(text)], **fields}
    answer = httpx.post(server.url + CHAT, json=asked, timeout=100)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


async def refused(engine: Scripted, param: str, **fields: Any) -> str:
    """400 for that field, nothing to the engine, and the next request works. The message."""
    async with engine(OK) as router:
        message = ""
        for stream in (False, True):
            told = error(await chat(router.app, stream=stream, **fields))
            assert (told["param"] or "").startswith(param)
            message = told["message"]
        assert not router.engines.submits
        await assert_alive(router.app)
    return message


async def test_case_095_a_schema_that_is_none(engine: Scripted) -> None:
    await refused(engine, "response_format", response_format=bound({"type": "strng"}))


async def test_case_096_a_regex_that_is_none(engine: Scripted) -> None:
    await refused(engine, "regex", regex="([")
    await refused(engine, "guided_regex", guided_regex="([")
    await refused(engine, "structured_outputs", structured_outputs={"regex": "(["})
    async with engine(OK) as router:
        assert error(await complete(router.app, regex="(["))["param"] == "regex"


@pytest.mark.parametrize(
    "schema", [{"$defs": {"q": {"$defs": {"p": 1}}}}, {"type": ["bogus"]}, {"type": 5}, [], 7]
)
async def test_case_097_schemas_without_a_known_shape(engine: Scripted, schema: Any) -> None:
    await refused(engine, "response_format", response_format=bound(schema))


async def test_case_098_what_cannot_be_enforced(engine: Scripted) -> None:
    schema = {"type": "string", "pattern": "^(?=a)b$"}
    message = await refused(engine, "response_format", response_format=bound(schema))
    assert "pattern" in message
    for keyword, value in (("uniqueItems", True), ("not", {"type": "null"}), ("contains", {})):
        schema = {"type": "array", keyword: value}
        message = await refused(engine, "response_format", response_format=bound(schema))
        assert keyword in message


async def test_case_099_parse_with_a_model_class(engine: Scripted) -> None:
    async with (
        engine(text_play('{"kind": "cat",', ' "legs": 4}')) as router,
        openai_client(router.app) as client,
    ):
        answer = await client.chat.completions.parse(
            model=MODEL, messages=[user("hi")], response_format=Pet
        )
        assert router.engines.submits[-1].grammar
    assert answer.choices[0].message.parsed == Pet(kind="cat", legs=4)


@pytest.mark.slow
def test_case_101_twenty_hot_answers_obey(real: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"lines": {"type": "integer"}},
        "required": ["lines"],
        "additionalProperties": False,
    }

    def one(seed: int) -> Any:
        return ask(real, response_format=bound(schema), temperature=1, seed=seed, max_tokens=96)

    with ThreadPoolExecutor(10) as pool:
        choices = list(pool.map(one, range(20)))
    ended = [choice for choice in choices if choice["finish_reason"] == "stop"]
    for choice in ended:
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    for choice in choices:
        jiter.from_json(choice["message"]["content"].encode(), partial_mode="trailing-strings")
    assert len(ended) >= 10


@pytest.mark.slow
def test_case_103_digits_in_a_tools_schema(real: Server) -> None:
    year = {"type": "string", "pattern": "^\\d{4}$"}
    schema = {"type": "object", "properties": {"year": year}, "required": ["year"]}
    function = {
        "name": "look",
        "parameters": {**schema, "additionalProperties": False},
        "strict": True,
    }
    choice = ask(
        real,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1,
        max_tokens=200,
    )
    (made,) = choice["message"]["tool_calls"]
    value = json.loads(made["function"]["arguments"])["year"]
    assert len(value) == 4
    assert value.isdecimal()


async def test_case_104_an_unknown_format(engine: Scripted) -> None:
    async with engine(OK) as router:
        told = error(await chat(router.app, response_format={"type": "xml"}))
        assert told["param"] == "response_format.type"
        assert "json_schema" in told["message"]
        assert "xml" not in told["message"]
        await assert_alive(router.app)


@pytest.mark.slow
def test_case_106_json_mode_ends_with_its_brace(real: Server) -> None:
    """The model likes nothing better than blanks, and then the brace that ends it all."""
    likes = {" ": 100, "\n": 99, "\t": 98, "{": 60, "}": 50}
    bias = {str(ord(char) + FIRST_BYTE): value for char, value in likes.items()}
    choice = ask(
        real, response_format={"type": "json_object"}, logit_bias=bias, temperature=0, max_tokens=99
    )
    text = choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert text.endswith("}")
    assert json.loads(text) == {}
    assert len(text) < 50


async def test_case_108_a_schema_and_a_template(engine: Scripted) -> None:
    async with engine(text_play('{"a": 1}')) as router:
        answer = await chat(router.app, response_format=bound({"type": "object"}))
        assert json.loads(content(answer)) == {"a": 1}
        assert router.engines.submits[-1].grammar
        plain = await chat(router.app, response_format={"type": "text"})
        assert content(plain)
        assert not router.engines.submits[-1].grammar
        first, second = (submit.tokens for submit in router.engines.submits)
        assert first == second  # the prompt is the same


@pytest.mark.slow
def test_case_110_as_langchain_sends_it(real: Server) -> None:
    model = ChatOpenAI(
        model=TINY,
        base_url=f"{real.url}/v1",
        api_key=SecretStr("none"),
        max_retries=0,
        temperature=1,
    )
    for method in ("json_schema", "function_calling"):
        bound_model = model.with_structured_output(Pet, method=method, strict=True)
        assert isinstance(bound_model.invoke("A pet, please."), Pet)


@pytest.mark.slow
def test_case_111_an_object_that_is_cut(real: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.LengthFinishReasonError) as raised,
    ):
        client.chat.completions.parse(
            model=TINY, messages=[user("A pet, please.")], response_format=Pet, max_tokens=5
        )
    choice = raised.value.completion.choices[0]
    assert choice.finish_reason == "length"
    text = choice.message.content or ""
    assert text.startswith("{")
    jiter.from_json(text.encode(), partial_mode="trailing-strings")
