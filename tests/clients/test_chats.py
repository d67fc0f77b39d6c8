"""Chats, completions, embeddings and lists of models through every client: whole and streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.runs import LIMIT_S, Results
from tests.clients.script import EMOJI, HELLO, MODEL, vector_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

Played = Callable[[str], Results]
OPENAI = ("openai 3", "openai 2", "openai 1")
LANGCHAIN = ("langchain", "langchain with openai 2")
NUM_TOKENS = len(EMOJI.encode()) + 1
VECTORS = [vector_of("hi"), vector_of("there")]


def close(vectors: list[list[float]]) -> Any:
    return [pytest.approx(vector, abs=1e-6) for vector in vectors]


# -- openai


@pytest.mark.parametrize("client", OPENAI)
def test_the_version_is_the_one_that_was_asked_for(played: Played, client: str) -> None:
    assert played(client)["version"].split(".")[0] == client.split()[1]


@pytest.mark.parametrize("client", OPENAI)
def test_openai_models(played: Played, client: str) -> None:
    assert played(client)["models"] == [[MODEL], "model"]


@pytest.mark.parametrize("client", OPENAI)
def test_openai_chat(played: Played, client: str) -> None:
    answer = played(client)["chat"]
    [choice] = answer["choices"]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", EMOJI)
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["completion_tokens"] == NUM_TOKENS
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("client", OPENAI)
def test_openai_chat_stream(played: Played, client: str) -> None:
    chunks: list[dict[str, Any]] = played(client)["chat_stream"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta["content"] or "" for delta in deltas) == EMOJI
    assert [delta["role"] for delta in deltas if delta["role"]] == ["assistant"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == NUM_TOKENS
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("client", OPENAI)
def test_openai_stream_helper(played: Played, client: str) -> None:
    found = played(client)["stream_helper"]
    assert {"content.delta", "content.done", "chunk"} <= set(found["kinds"])
    indexes, roles, texts = zip(*found["texts"], strict=True)
    assert indexes == (0, 1, 2)
    assert set(roles) == {"assistant"}
    assert set(texts) <= {"one", "two", "three"}
    assert found["spelled"] == list(texts)


@pytest.mark.parametrize("client", OPENAI)
def test_openai_async_and_raw(played: Played, client: str) -> None:
    assert played(client)["chat_async"] == HELLO
    assert played(client)["raw_response"] == ["abc", "abc"]


@pytest.mark.parametrize("client", OPENAI)
def test_openai_completions(played: Played, client: str) -> None:
    answer = played(client)["completions"]
    assert [choice["text"] for choice in answer["choices"]] == [f"emoji{EMOJI}", f"hi{HELLO}"]
    logprobs = answer["choices"][1]["logprobs"]
    assert "".join(logprobs["tokens"]) == f"hi{HELLO}"
    assert logprobs["token_logprobs"][0] is None
    text, usage = played(client)["completions_stream"]
    assert text == HELLO
    assert usage["completion_tokens"] == len(HELLO) + 1


@pytest.mark.parametrize("client", OPENAI)
def test_openai_embeddings(played: Played, client: str) -> None:
    found = played(client)["embeddings"]
    assert found["packed"] == close(VECTORS)
    assert found["plain"] == close(VECTORS)
    assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_openai_for_node(played: Played) -> None:
    found = played("openai for node")
    assert found["models"] == [MODEL]
    for case in ("chat", "chat_stream"):
        assert found[case]["text"] == EMOJI
        assert found[case]["usage"]["completion_tokens"] == NUM_TOKENS
    assert found["stream_helper"] == EMOJI
    assert found["completions"] == HELLO
    assert found["embeddings"] == [close(VECTORS)] * 2


# -- what is built on it


@pytest.mark.parametrize("client", LANGCHAIN)
def test_langchain(played: Played, client: str) -> None:
    found = played(client)
    text, usage, finish = found["invoke"]
    assert (text, usage["output_tokens"], finish) == (EMOJI, NUM_TOKENS, "stop")
    text, usage, num_chunks = found["stream"]
    assert (text, usage["output_tokens"]) == (EMOJI, NUM_TOKENS)
    assert num_chunks > 2
    assert found["batch"] == [HELLO, EMOJI, HELLO]
    assert found["async_stream"] == HELLO
    assert found["completions"] == [HELLO, [HELLO, EMOJI]]
    documents, query = found["embeddings"]
    assert [*documents, query] == close([*VECTORS, VECTORS[0]])


def test_llama_index(played: Played) -> None:
    found = played("llama-index")
    assert found["chat"] == [EMOJI, NUM_TOKENS]
    assert found["chat_stream"] == [EMOJI, EMOJI]
    assert found["complete"] == [HELLO, HELLO]
    assert found["chat_async"] == HELLO


def test_litellm(played: Played) -> None:
    found = played("litellm")
    assert found["chat"] == [[EMOJI, "stop", NUM_TOKENS]] * 2
    assert found["chat_stream"] == [[EMOJI, NUM_TOKENS]] * 2
    assert found["chat_async"] == HELLO
    assert found["text_completion"] == HELLO
    assert found["embeddings"] == [close(VECTORS)] * 2


def test_autogen(played: Played) -> None:
    found = played("autogen")
    assert found["chat"] == [EMOJI, "stop", NUM_TOKENS]
    assert found["chat_stream"] == [EMOJI, EMOJI, "stop", NUM_TOKENS]
