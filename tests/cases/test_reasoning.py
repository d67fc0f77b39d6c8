"""Cases of the kind reasoning: thinking beside the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cases.asking import (
    CALL,
    CHAT,
    LOOK,
    OPENS,
    THINKS,
    Scripted,
    body,
    both,
    events,
    finishes,
    joined,
    streamed_calls,
    templated,
    whole_calls,
)
from tests.router_parts import Answer, text_play


@pytest.fixture(scope="module")
def thinks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that begins its thinking by itself, and can be told not to."""
    return templated(tmp_path_factory.mktemp("thinks") / "thinks", THINKS)


@pytest.fixture(scope="module")
def opens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose prompt begins the thinking."""
    return templated(tmp_path_factory.mktemp("opens") / "opens", OPENS)


def message(answer: Answer) -> Any:
    return body(answer)["choices"][0]["message"]


def parts(answer: Answer) -> tuple[str, str]:
    """(thinking, answer) of a stream; no delta has both (092)."""
    for event in events(answer):
        delta = event["choices"][0]["delta"]
        assert not (delta.get("content") and delta.get("reasoning_content"))
    return joined(answer, field="reasoning_content"), joined(answer)


async def test_case_088_a_closing_tag_in_pieces(engine: Scripted, opens: Path) -> None:
    async with engine(text_play("why", "</th", "ink>", "42"), folder=opens) as router:
        whole, streamed = await both(router.app, CHAT)
    assert parts(streamed) == ("why", "42")
    assert (message(whole)["reasoning_content"], message(whole)["content"]) == ("why", "42")
    assert b"think" not in streamed.body + whole.body


async def test_case_090_calls_with_thinking_off(engine: Scripted, thinks: Path) -> None:
    off = {"enable_thinking": False}
    async with engine(text_play(*f"{CALL}\n{CALL}"), folder=thinks) as router:
        whole, streamed = await both(router.app, CHAT, tools=[LOOK], chat_template_kwargs=off)
    assert whole_calls(whole) == streamed_calls(streamed)
    assert len(whole_calls(whole)) == 2
    assert body(whole)["choices"][0]["finish_reason"] == "tool_calls"
    assert finishes(streamed) == ["tool_calls"]
    assert message(whole).get("reasoning_content") is None
    assert parts(streamed)[0] == ""


async def test_case_091_a_second_block(engine: Scripted, thinks: Path) -> None:
    text = "<think>a</think>x<think>b</think>y"
    for steps in (text, [text], ["<think>a</think>x<th", "ink>b</think>y"]):
        async with engine(text_play(*steps), folder=thinks) as router:
            whole, streamed = await both(router.app, CHAT)
        assert parts(streamed) == (message(whole)["reasoning_content"], message(whole)["content"])
        assert parts(streamed)[0].startswith("a")
        assert parts(streamed)[1].endswith("y")


async def test_case_092_never_both_in_a_delta(engine: Scripted, opens: Path) -> None:
    async with engine(text_play("r</think>c"), folder=opens) as router:
        whole, streamed = await both(router.app, CHAT)
        _, named = await both(router.app, CHAT, logprobs=True, return_token_ids=True)
    assert parts(streamed) == parts(named) == ("r", "c")
    assert (message(whole)["reasoning_content"], message(whole)["content"]) == ("r", "c")


async def test_case_094_cut_while_thinking(engine: Scripted, opens: Path) -> None:
    async with engine(text_play(*"so, well </thinking"), folder=opens) as router:
        for length in (8, 12, 15):  # in the words, and in what may become the closing tag
            whole, streamed = await both(router.app, CHAT, max_tokens=length)
            assert parts(streamed) == ("so, well </thinking"[:length], "")
            assert message(whole)["reasoning_content"] == "so, well </thinking"[:length]
            assert not message(whole)["content"]
            assert body(whole)["choices"][0]["finish_reason"] == "length"
            assert finishes(streamed) == ["length"]
