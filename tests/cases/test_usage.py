"""Cases of the kind usage: what is counted, and where it is told."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases.asking import CHAT, COMPLETIONS, Scripted, body, both, events, stream_usage
from tests.router_parts import chat, complete, text_play

COUNTED = {"include_usage": True}
HELLO = text_play("Hel", "lo ", "wörld")


async def test_case_028_null_in_all_chunks_but_the_last(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for ask in (chat, complete):
            *chunks, last = events(await ask(router.app, stream=True, stream_options=COUNTED))
            assert all(chunk["usage"] is None for chunk in chunks)
            assert last["usage"]["completion_tokens"] == 13


@pytest.mark.parametrize("options", [{}, {"include_usage": False}, {"include_usage": None}])
async def test_case_029_empty_options_ask_for_nothing(engine: Scripted, options: Any) -> None:
    async with engine(HELLO) as router:
        for ask in (chat, complete):
            chunks = events(await ask(router.app, stream=True, stream_options=options))
            assert all(chunk.get("usage") is None and chunk["choices"] for chunk in chunks)


async def test_case_030_one_chunk_without_choices(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for ask in (chat, complete):
            chunks = events(await ask(router.app, stream=True, stream_options=COUNTED))
            empty = [chunk for chunk in chunks if chunk["choices"] == []]
            assert [chunk for chunk in chunks if chunk["usage"]] == empty == [chunks[-1]]


async def test_case_032_streams_count_as_whole_answers(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for ask in (chat, complete):
            whole = body(await ask(router.app, temperature=0))["usage"]
            streamed = await ask(router.app, temperature=0, stream=True, stream_options=COUNTED)
            assert stream_usage(streamed) == whole


async def test_case_033_tokens_are_counted_not_chunks(engine: Scripted) -> None:
    async with engine(text_play("a", "bc", "def", "ghij", "klmno")) as router:
        whole = body(await chat(router.app))["usage"]
        streamed = await chat(router.app, stream=True, stream_options=COUNTED)
    assert stream_usage(streamed) == whole
    assert whole["completion_tokens"] == len("abcdefghijklmno") + 1  # the end token


async def test_case_035_a_choice_in_every_chunk(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for route in (CHAT, COMPLETIONS):
            _, streamed = await both(router.app, route)
            assert all(chunk["choices"] for chunk in events(streamed))


async def test_case_036_three_counts(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        for ask in (chat, complete):
            usage = body(await ask(router.app))["usage"]
            counts = [usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")]
            assert all(type(count) is int and count > 0 for count in counts)
            assert counts[2] == counts[0] + counts[1]
