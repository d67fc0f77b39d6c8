"""The clients that people use, against a real router process with a scripted engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI

from tests.serving import Server, serve
from tools.tiny_model import write_tiny_model

MODEL = "tiny"
KEY = "secret-key"
SCRIPT: dict[str, Any] = {
    "rules": [
        {"match": {"contains": "emoji"}, "reply": "sun ☀️ and 😊 你好"},
        {"match": {"contains": "fails"}, "reply": "abc", "finish": "error", "detail": "inner"},
        {"match": {"contains": "endless"}, "reply": "x", "repeat": True, "tokens_per_s": 50},
        {"match": {"contains": "variants"}, "reply": ["one", "two", "three"]},
        {"match": "*", "reply": "Hello there"},
    ]
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# one key\n{KEY}\n")
    words = ("--models", f"{MODEL}|org/{MODEL}={folder}", "--api-key-file", str(keys))
    with serve(*words, script=SCRIPT) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# -- openai


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, f"org/{MODEL}"]
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.models.retrieve(f"org/{MODEL}").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), temperature=0)
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("Hello there") + 1


def test_chat_parts_and_request_id(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "emoji"}, {"type": "text", "text": "please"}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": parts}],  # type: ignore[misc,list-item]
        extra_headers={"X-Request-Id": "abc"},
    )
    assert answer.choices[0].message.content == "sun ☀️ and 😊 你好"
    assert answer._request_id == "abc"


def test_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=user("emoji"),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "sun ☀️ and 😊 你好"
    assert all(chunk.created and chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(text.encode()) + 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_stream_helper_with_choices_063_069(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=user("variants"), n=3, seed=1, logprobs=True, top_logprobs=2
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert [choice.index for choice in final.choices] == [0, 1, 2]
    for choice in final.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content in ("one", "two", "three")
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
        assert joined.decode() == choice.message.content


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["emoji", "hi"], echo=True, logprobs=1, max_tokens=100
    )
    assert [choice.text for choice in answer.choices] == ["emojisun ☀️ and 😊 你好", "hiHello there"]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "hiHello there"
    stream = client.completions.create(model=MODEL, prompt="hi", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello there"


def test_errors_are_the_right_classes(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=user("hi"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=user("hi"), temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=user("x" * 10_000))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=user("fails"))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"


def test_an_error_in_the_stream_is_raised_214(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=user("fails"), stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        texts.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert caught.value.code == "internal_error"
    assert "inner" not in str(caught.value)


def test_unsupported_wishes_are_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=user("hi"), extra_body={"bad_words": ["x"]}
        )
    assert caught.value.param == "bad_words"


def test_a_stream_that_is_closed_early(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=user("endless"), stream=True, max_tokens=1000
    )
    next(iter(stream))
    stream.close()
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers) as plain:
        for _ in range(100):
            if 'router_permits_used{model="tiny"} 0.0' in plain.get("/metrics").text:
                return
    pytest.fail("the permit was not given back")


async def test_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=user("hi"))
        assert answer.choices[0].message.content == "Hello there"


# -- langchain


@pytest.fixture
def model(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{server.url}/v1",
        api_key=KEY,  # type: ignore[arg-type]
        max_retries=0,
        stream_usage=True,
    )


def test_langchain_chat(model: ChatOpenAI) -> None:
    answer = model.invoke([("system", "be kind"), ("human", "emoji")])
    assert answer.content == "sun ☀️ and 😊 你好"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"


def test_langchain_stream(model: ChatOpenAI) -> None:
    chunks = list(model.stream("emoji"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert total.content == "sun ☀️ and 😊 你好"
    assert total.usage_metadata is not None
    assert total.usage_metadata["output_tokens"] == len(str(total.content).encode()) + 1


def test_langchain_batch_and_errors(model: ChatOpenAI) -> None:
    answers = model.batch(["hi", "emoji", "hi"])
    assert [answer.content for answer in answers] == [
        "Hello there",
        "sun ☀️ and 😊 你好",
        "Hello there",
    ]
    with pytest.raises(openai.BadRequestError):
        model.bind(temperature=5).invoke("hi")


def test_langchain_completions(server: Server) -> None:
    model = OpenAI(
        model=MODEL,
        base_url=f"{server.url}/v1",
        api_key=KEY,  # type: ignore[arg-type]
        max_retries=0,
    )
    assert model.invoke("hi") == "Hello there"
    assert "".join(model.stream("hi")) == "Hello there"
    generations = model.generate(["hi", "emoji"]).generations
    assert [entry[0].text for entry in generations] == ["Hello there", "sun ☀️ and 😊 你好"]
