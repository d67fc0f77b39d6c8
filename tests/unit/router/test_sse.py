"""The bytes of a stream."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.api.sse import DONE, PING, ChunkTemplate, EventStream, error_event, named_event, quote

HEAD = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": 'm"é', "n": None}


def template(*, include_usage: bool = False) -> ChunkTemplate:
    opening = b'"delta":{"content":'
    return ChunkTemplate(HEAD, 3, opening=opening, closing=b"}", include_usage=include_usage)


def decoded(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    return json.loads(event[len(b"data: ") :])


@given(text=st.text(), index=st.integers(0, 2), include_usage=st.booleans())
def test_text_chunk_equals_the_slow_way(text: str, index: int, include_usage: bool) -> None:
    text = text.encode(errors="replace").decode()
    chunks = template(include_usage=include_usage)
    choice = {
        "index": index,
        "delta": {"content": text},
        "logprobs": None,
        "finish_reason": None,
    }
    expected = {**HEAD, "choices": [choice], **({"usage": None} if include_usage else {})}
    assert decoded(chunks.text(index, text)) == expected
    assert decoded(chunks.choice(choice)) == expected


@given(text=st.text(alphabet="a\n\r\u0085\u2028\u2029é\x00"))
def test_no_line_end_of_any_client_is_inside_an_event(text: str) -> None:
    assert len(quote(text).decode().splitlines()) == 1
    assert json.loads(quote(text)) == text


def test_members_beside_the_choice() -> None:
    chunk = decoded(template().choice({"index": 0}, {"prompt_token_ids": [1, 2]}))
    assert chunk == {**HEAD, "prompt_token_ids": [1, 2], "choices": [{"index": 0}]}


def test_usage_chunk_has_no_choices() -> None:
    chunk = decoded(template(include_usage=True).usage({"total_tokens": 3}))
    assert chunk == {**HEAD, "choices": [], "usage": {"total_tokens": 3}}


def test_error_event_and_end() -> None:
    assert decoded(error_event({"error": {"message": "no"}})) == {"error": {"message": "no"}}
    assert (DONE, PING) == (b"data: [DONE]\n\n", b": ping\n\n")


@given(text=st.text())
def test_named_event(text: str) -> None:
    text = text.encode(errors="replace").decode()
    event = named_event("a.b", {"type": "a.b", "text": text})
    name, data, *rest = event.decode().splitlines()  # also NEL, LS and PS end lines there
    assert (name, rest) == ("event: a.b", [""])
    assert json.loads(data.removeprefix("data: ")) == {"type": "a.b", "text": text}


async def test_headers_forbid_buffering() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    stream = EventStream(send)
    await stream.open()
    await stream.write(PING)
    await stream.close()
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert (headers[b"cache-control"], headers[b"x-accel-buffering"]) == (b"no-cache", b"no")
    assert [(m["body"], m["more_body"]) for m in sent[1:]] == [(PING, True), (DONE, False)]
