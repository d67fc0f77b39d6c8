"""Cases of the kind stop: stop strings, stop tokens, end tokens."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.cases.asking import (
    CHAT,
    COMPLETIONS,
    TINY,
    Scripted,
    body,
    both,
    content,
    deltas,
    finishes,
    joined,
    stream_usage,
)
from tests.router_parts import chat, complete, text_play
from tests.serving import Server
from tools.tiny_model import EOS_ID, FIRST_BYTE, IM_END_ID

COUNTED = {"include_usage": True}


async def test_case_012_no_piece_of_a_stop_string_is_sent(engine: Scripted) -> None:
    async with engine(text_play("ABC", "DEF", "G", "HI", "J", "K")) as router:
        answer = await complete(router.app, stream=True, stop=["DEFGHIJ"])
    assert joined(answer) == "ABC"
    assert not any("D" in text for text in deltas(answer))
    assert finishes(answer) == ["stop"]


async def test_case_013_a_stop_string_of_two_tokens(engine: Scripted) -> None:
    async with engine(text_play("x", "\n", "\n", "y")) as router:
        whole, streamed = await both(router.app, COMPLETIONS, stop=["\n\n"])
    assert content(whole) == joined(streamed) == "x"
    assert [body(whole)["choices"][0]["finish_reason"]] == finishes(streamed) == ["stop"]


async def test_case_014_cut_exactly_before_the_match(engine: Scripted) -> None:
    async with engine(text_play(" beta", " gamma delta")) as router:
        whole, streamed = await both(router.app, CHAT, stop=["gamma"])
    assert joined(streamed) == content(whole) == " beta "


async def test_case_016_no_stop_strings_leave_the_end_tokens(engine: Scripted) -> None:
    async with engine(text_play("hi")) as router:
        plain, empty = await chat(router.app), await chat(router.app, stop=[])
        first, second = (submit.stop_ids for submit in router.engines.submits)
    assert first == second == (EOS_ID, IM_END_ID)
    assert content(plain) == content(empty) == "hi"
    assert body(empty)["choices"] == body(plain)["choices"]
    assert body(empty)["choices"][0]["finish_reason"] == "stop"


async def test_case_017_an_empty_stop_string(engine: Scripted) -> None:
    async with engine(text_play("hi")) as router:
        for stop in ("", [""], ["", "never"]):
            assert content(await chat(router.app, stop=stop)) == "hi"


async def test_case_019_a_stop_token_is_counted_not_shown(engine: Scripted) -> None:
    end = FIRST_BYTE + ord("!")
    async with engine(text_play("a")) as router:  # ends with the first of the stop ids
        fields = {"stop_token_ids": [end], "ignore_eos": True}
        whole, streamed = await both(router.app, CHAT, stream_options=None, **fields)
        counted = await chat(router.app, stream=True, stream_options=COUNTED, **fields)
        assert router.engines.submits[0].stop_ids == (end,)
    assert content(whole) == joined(streamed) == "a"
    assert body(whole)["usage"]["completion_tokens"] == 2
    assert stream_usage(counted)["completion_tokens"] == 2


def forced(server: Server, token: int, **fields: Any) -> dict[str, Any]:
    """What a real engine answers when its model wants that token and no other."""
    asked = {"model": TINY, "prompt": "go", "logit_bias": {str(token): 100}, **fields}
    answer = httpx.post(server.url + COMPLETIONS, json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("end", [EOS_ID, IM_END_ID])
def test_case_021_ignore_eos_ignores_all_end_tokens(real: Server, end: int) -> None:
    stopped = forced(real, end, max_tokens=20, temperature=0)
    assert stopped["usage"]["completion_tokens"] == 1
    assert stopped["choices"][0]["finish_reason"] == "stop"
    ran = forced(real, end, max_tokens=20, temperature=0, ignore_eos=True, return_token_ids=True)
    assert ran["usage"]["completion_tokens"] == 20
    assert ran["choices"][0]["finish_reason"] == "length"
    assert ran["choices"][0]["token_ids"] == [end] * 20


@pytest.mark.slow
@pytest.mark.parametrize("end", [EOS_ID, IM_END_ID])
def test_case_022_min_tokens_holds_all_end_tokens_back(real: Server, end: int) -> None:
    answer = forced(real, end, max_tokens=20, min_tokens=10, temperature=0, return_token_ids=True)
    tokens = answer["choices"][0]["token_ids"]
    assert not {EOS_ID, IM_END_ID} & set(tokens[:10])
    assert (len(tokens), tokens[-1]) == (11, end)
    assert answer["usage"]["completion_tokens"] == 11


@pytest.mark.parametrize(("shown", "text"), [(True, "aEND"), (False, "a")])
async def test_case_023_the_stop_string_by_wish(engine: Scripted, shown: bool, text: str) -> None:
    async with engine(text_play("a", "EN", "D", "b")) as router:
        whole, streamed = await both(
            router.app, COMPLETIONS, stop=["END"], include_stop_str_in_output=shown
        )
    assert content(whole) == joined(streamed) == text
    assert [body(whole)["choices"][0]["finish_reason"]] == finishes(streamed) == ["stop"]


async def test_case_025_a_stop_string_inside_a_token(engine: Scripted) -> None:
    async with engine(text_play(" it", " was", " x")) as router:
        whole, streamed = await both(router.app, COMPLETIONS, stop=["was"])
    assert content(whole) == joined(streamed) == " it "
    assert finishes(streamed) == ["stop"]


async def test_case_026_nothing_behind_the_match(engine: Scripted) -> None:
    async with engine(text_play("abcEND", "xyz")) as router:  # and more in the same step
        whole, _ = await both(router.app, COMPLETIONS, stop=["EN"])
        streamed = await complete(router.app, stream=True, stop=["EN"], stream_options=COUNTED)
    assert content(whole) == joined(streamed) == "abc"
    assert body(whole)["usage"]["completion_tokens"] <= len("abcEN")
    assert stream_usage(streamed)["completion_tokens"] <= len("abcEN")
