"""/v1/responses and Anthropic's /v1/messages through their clients."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.clients.runs import LIMIT_S, Results
from tests.clients.script import AFTER_TOOL, CALL, CITY, EMOJI, HELLO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

Played = Callable[[str], Results]
OPENAI = ("openai 3", "openai 2", "openai 1")
ANTHROPIC = ("anthropic 2", "anthropic 0")
NUM_TOKENS = len(EMOJI.encode()) + 1


@pytest.mark.parametrize("client", OPENAI)
def test_responses(played: Played, client: str) -> None:
    found = played(client)["responses"]
    assert found["texts"] == [EMOJI] * 2
    assert found["ends"] == ["response.created", "response.completed"]
    assert found["status"] == ["completed"] * 2
    usage = found["usage"]
    assert usage["output_tokens"] == NUM_TOKENS
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("client", OPENAI)
def test_responses_with_tools_and_schemas(played: Played, client: str) -> None:
    found = played(client)["responses_tools"]
    call = ["function_call", CALL["name"], json.dumps(CALL["arguments"])]
    assert found["calls"] == [[call]] * 2
    assert found["after"] == AFTER_TOOL
    assert played(client)["responses_structured"] == CITY


def test_responses_in_other_clients(played: Played) -> None:
    assert played("litellm")["responses"] == HELLO
    found = played("openai for node")["responses"]
    assert (found["whole"], found["text"]) == (EMOJI, EMOJI)
    assert (found["first"], found["last"]) == ("response.created", "response.completed")


@pytest.mark.parametrize("client", ANTHROPIC)
def test_messages(played: Played, client: str) -> None:
    assert played(client)["version"].split(".")[0] == client.split()[1]
    message, counted = played(client)["create"]
    assert [(block["type"], block["text"]) for block in message["content"]] == [("text", EMOJI)]
    assert (message["role"], message["stop_reason"]) == ("assistant", "end_turn")
    assert message["usage"]["output_tokens"] == NUM_TOKENS
    assert message["usage"]["input_tokens"] == counted
    assert played(client)["by_token"] == HELLO


@pytest.mark.parametrize("client", ANTHROPIC)
def test_messages_streamed(played: Played, client: str) -> None:
    kinds, message = played(client)["stream"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert message["content"][0]["text"] == EMOJI
    assert message["usage"]["output_tokens"] == NUM_TOKENS


@pytest.mark.parametrize("client", ANTHROPIC)
def test_ends_of_messages(played: Played, client: str) -> None:
    short, stopped = played(client)["ends"]
    assert short == ["max_tokens", None, HELLO[:3]]
    assert stopped == ["stop_sequence", "the", HELLO[: HELLO.index("the")]]


def test_messages_in_litellm(played: Played) -> None:
    assert played("litellm")["messages"] == [HELLO, HELLO]
