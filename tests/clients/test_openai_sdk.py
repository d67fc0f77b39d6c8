"""The openai package in three majors against a scripted router: shapes, streams, error classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Endpoint
from tests.clients.runs import Results, play_python
from tests.clients.script import EMOJI, HELLO, MODEL

pytestmark = pytest.mark.slow

MAJORS = {"main": "3.", "agents": "2.", "openai1": "1."}


@pytest.fixture(scope="module", params=MAJORS)
def results(request: pytest.FixtureRequest, endpoint: Endpoint, home: Path) -> Results:
    found = play_python(request.param, "openai_sdk.py", home, **endpoint.settings())
    assert found["version"].startswith(MAJORS[request.param])
    return found


def test_models(results: Results) -> None:
    assert results["models"] == [[MODEL], "model"]


def test_chat(results: Results) -> None:
    answer = results["chat"]
    [choice] = answer["choices"]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", EMOJI)
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(EMOJI.encode()) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chat_stream(results: Results) -> None:
    chunks: list[dict[str, Any]] = results["chat_stream"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta["content"] or "" for delta in deltas) == EMOJI
    assert [delta["role"] for delta in deltas if delta["role"]] == ["assistant"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == len(EMOJI.encode()) + 1
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_the_stream_helper(results: Results) -> None:
    found = results["stream_helper"]
    assert {"content.delta", "content.done", "chunk"} <= set(found["kinds"])
    indexes, roles, texts = zip(*found["texts"], strict=True)
    assert indexes == (0, 1, 2)
    assert set(roles) == {"assistant"}
    assert set(texts) <= {"one", "two", "three"}
    assert found["spelled"] == list(texts)


def test_async_and_raw(results: Results) -> None:
    assert results["chat_async"] == HELLO
    assert results["raw_response"] == ["abc", "abc"]


def test_completions(results: Results) -> None:
    answer = results["completions"]
    assert [choice["text"] for choice in answer["choices"]] == [f"emoji{EMOJI}", f"hi{HELLO}"]
    logprobs = answer["choices"][1]["logprobs"]
    assert "".join(logprobs["tokens"]) == f"hi{HELLO}"
    assert logprobs["token_logprobs"][0] is None
    text, usage = results["completions_stream"]
    assert text == HELLO
    assert usage["completion_tokens"] == len(HELLO) + 1


def test_embeddings(results: Results) -> None:
    found = results["embeddings"]
    assert len(found["packed"]) == 2
    assert found["packed"] == [pytest.approx(vector) for vector in found["plain"]]
    assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


@pytest.mark.parametrize(
    ("case", "error", "status", "code", "param"),
    [
        ("value", "BadRequestError", 400, "invalid_value", "temperature"),
        ("streamed_value", "BadRequestError", 400, "invalid_value", "top_p"),
        ("length", "BadRequestError", 400, "context_length_exceeded", "messages"),
        ("key", "AuthenticationError", 401, "invalid_api_key", None),
        ("model", "NotFoundError", 404, "model_not_found", "model"),
        ("model_route", "NotFoundError", 404, "model_not_found", "model"),
        ("route", "NotFoundError", 404, "not_found", None),
        ("engine", "InternalServerError", 500, "internal_error", None),
        ("full", "InternalServerError", 503, "server_is_overloaded", None),
        ("in_stream", "APIError", None, "internal_error", None),
    ],
)
def test_errors_are_the_right_classes(
    results: Results, case: str, error: str, status: int | None, code: str, param: str | None
) -> None:
    found = results["errors"][case]
    assert found["classes"][:1] == [error], found
    assert (found["status"], found["code"], found["param"]) == (status, code, param)
    if status == 503:
        assert int(found["retry_after"]) >= 1
    assert "inner" not in found["message"]
