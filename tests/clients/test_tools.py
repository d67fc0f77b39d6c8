"""Tools through every client: chosen freely, required, by name, in streams, and there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.runs import LIMIT_S, Results
from tests.clients.script import AFTER_TOOL, CALL, SECOND_CALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

Played = Callable[[str], Results]
OPENAI = ("openai 3", "openai 2", "openai 1")
LANGCHAIN = ("langchain", "langchain with openai 2")
ANTHROPIC = ("anthropic 2", "anthropic 0")
NAME, ARGUMENTS = CALL["name"], CALL["arguments"]
SPELLED = json.dumps(ARGUMENTS)
BOTH = [[call["name"], call["arguments"]] for call in (CALL, SECOND_CALL)]
BOTH_SPELLED = [[name, json.dumps(arguments)] for name, arguments in BOTH]
CHOICES = ("auto", "required", "named")


@pytest.mark.parametrize("client", OPENAI)
def test_openai(played: Played, client: str) -> None:
    found = played(client)
    assert found["tools"] == {choice: [True, NAME, SPELLED, "tool_calls"] for choice in CHOICES}
    streamed = found["tools_streamed"]
    assert streamed["calls"] == BOTH
    assert streamed["ids"] == 2
    assert streamed["finish"] == "tool_calls"
    assert "tool_calls.function.arguments.done" in streamed["kinds"]


@pytest.mark.parametrize(
    ("client", "finish"),
    [("openai for node", "tool_calls"), ("litellm", "tool_calls"), ("autogen", "function_calls")],
)
def test_calls_as_text(played: Played, client: str, finish: str) -> None:
    found = played(client)
    assert found["tools"] == {choice: [NAME, SPELLED, finish] for choice in CHOICES}
    assert found["tools_streamed"] == BOTH_SPELLED


@pytest.mark.parametrize("client", LANGCHAIN)
def test_langchain(played: Played, client: str) -> None:
    found = played(client)
    calls = [[[NAME, ARGUMENTS]], "tool_calls"]
    assert found["tools"] == dict.fromkeys(("None", "auto", "any", "weather"), calls)
    assert found["tools_streamed"] == BOTH


def test_llama_index(played: Played) -> None:
    """It asks for one call at a time by itself (parallel_tool_calls: false)."""
    found = played("llama-index")
    assert found["tools"] == {"False": [[NAME, ARGUMENTS]], "True": [[NAME, ARGUMENTS]]}
    assert found["tools_streamed"] == BOTH[:1]


@pytest.mark.parametrize("client", ANTHROPIC)
def test_anthropic(played: Played, client: str) -> None:
    found = played(client)
    used: list[Any] = ["tool_use", NAME, ARGUMENTS, "tool_use"]
    assert found["tools"] == dict.fromkeys(("auto", "any", "tool"), used)
    assert found["tools_streamed"] == [BOTH, "tool_use"]
    assert found["tool_loop"] == AFTER_TOOL


@pytest.mark.parametrize("client", [*OPENAI, *LANGCHAIN, "openai for node", "autogen"])
def test_the_answer_after_the_result(played: Played, client: str) -> None:
    assert played(client)["tool_loop"] == AFTER_TOOL
