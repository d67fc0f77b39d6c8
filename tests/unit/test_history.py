"""The history checker finds each kind of fault, and nothing where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import httpx
import pytest

from tests.history import Answer, History, Request, ask, request, undisturbed

ASKED = request(prompt="hello", stream=True)
TOKENS = tuple(str(token) for token in (5, 6, 7, 8, 9, 10, 11, 12, 13, 14))
EXPECTED = Answer((TOKENS,), ("text",), ("stop",), (5, len(TOKENS)))


def expected(_request: Request) -> Answer:
    return EXPECTED


def record(tokens: Sequence[str] = TOKENS, *, text: str = "text") -> History:
    history = History()
    history.sent("one", ASKED)
    for index, token in enumerate(tokens):
        history.token("one", index, token)
    history.shown("one", text)
    return history


def faults(history: History) -> list[str]:
    return history.check(expected)


def test_a_perfect_answer_has_no_faults() -> None:
    history = record()
    history.ended("one", "stop", (5, 10))
    assert history.answer("one") == EXPECTED
    assert faults(history) == []
    assert (history.num_ended, history.num_failed, history.num_tokens) == (1, 0, 10)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([*TOKENS[:3], *TOKENS[5:]], "2 tokens are lost at 3"),
        ([*TOKENS[:5], *TOKENS[3:]], "2 tokens are repeated at 5"),
        ([*TOKENS[:4], "99", *TOKENS[5:]], "a foreign token at 4"),
        ([*TOKENS, "99"], "a foreign token at 10"),
        ([*TOKENS, TOKENS[-1]], "1 tokens are repeated at 10"),
        (TOKENS[:-2], "the last 2 of 10 tokens are lost"),
        ([], "the last 10 of 10 tokens are lost"),
    ],
)
def test_what_is_not_as_expected_is_named(tokens: Sequence[str], found: str) -> None:
    history = record(tokens)
    history.ended("one", "stop", (5, 10))
    (fault,) = faults(history)
    assert fault.startswith(f"one, request 1: {found}")


def test_indexes_without_gap_or_repeat() -> None:
    for index, found in ((2, "token 2 (8) is repeated"), (5, "2 tokens are lost before token 5")):
        history = record(TOKENS[:3])
        history.token("one", index, "8")
        history.ended("one", "stop", (5, 10))
        assert found in faults(history)[0]


def test_ends_are_counted() -> None:
    assert faults(record()) == ["one, request 1: has no end"]
    twice = record()
    twice.ended("one", "stop", (5, 10))
    twice.ended("one", "stop", (5, 10))
    assert faults(twice) == ["one, request 1: ended 2 times"]
    late = record(TOKENS[:-1])
    late.ended("one", "stop", (5, 10))
    late.token("one", 9, TOKENS[9])
    assert faults(late) == ["one, request 1: got 1 tokens behind its end"]


def test_finish_usage_text_and_failures() -> None:
    other = record(text="texts")
    other.ended("one", "length", (5, 11))
    assert [fault.removeprefix("one, request 1: ") for fault in faults(other)] == [
        "the text is 'texts', not 'text'",
        "ended with ('length',), not ('stop',)",
        "usage (5, 11), not (5, 10)",
    ]
    broken = record(TOKENS[:3], text="t")
    broken.failed("one", "ReadError")
    assert faults(broken) == ["one, request 1: failed: ReadError"]
    with pytest.raises(ValueError, match="ReadError"):
        broken.answer("one")


def test_each_choice_for_itself() -> None:
    wanted = Answer((TOKENS, TOKENS[:2]), ("", ""), ("stop", "length"), (5, 12))
    history = record([*TOKENS[:3], *TOKENS[4:]], text="")
    history.token("one", 0, TOKENS[0], choice=1)
    history.token("one", 0, "1", choice=2)
    history.ended("one", ("stop", "length"), (5, 12))
    told = history.check(lambda _: wanted)
    assert [fault.split(":", 1)[1].split(": [")[0] for fault in told] == [
        " choice 0: 1 tokens are lost at 3",
        " choice 1: the last 1 of 2 tokens are lost",
        " choice 2: there should be none of that number",
    ]


def test_a_check_while_others_run_forgets_what_it_checked() -> None:
    history = record(TOKENS[:-1])
    history.sent("two", ASKED)
    history.failed("two", "gone")
    assert history.check(expected, running=True) == ["two, request 1: failed: gone"]
    history.token("one", 9, TOKENS[9])
    history.ended("one", "stop", (5, 10))
    assert faults(history) == []
    history.sent("one", ASKED)
    assert faults(history) == [
        "one, request 2: has no end",
    ]


def client(body: str, status: int = 200) -> httpx.AsyncClient:
    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text=body)

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")


def chunk(*tokens: int, text: str = "", finish: str | None = None) -> str:
    choice = {"index": 0, "text": text, "token_ids": list(tokens), "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'
WHOLE = chunk(1, 2, text="ab") + chunk(3, text="c", finish="stop") + USAGE + "data: [DONE]\n\n"


async def test_a_stream_is_read_into_the_history() -> None:
    async with client(WHOLE) as http:
        answer = await undisturbed(http, ASKED)
    assert answer == Answer((("1", "2", "3"),), ("abc",), ("stop",), (5, 3))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda body: body.replace("data: [DONE]\n\n", ""), "cut"),
        (lambda body: body.replace(USAGE, ""), "cut"),
        (lambda body: body.replace('"stop"', "null"), "cut"),
        (lambda body: body + chunk(4), "behind"),
        (lambda body: body.replace(USAGE, 'data: {"error": {"code": "c"}}\n\n'), "'code': 'c'"),
        (lambda body: chunk(finish="stop") + body, "finished twice"),
    ],
)
async def test_an_end_that_is_none_is_a_failure(change: Callable[[str], str], found: str) -> None:
    history = History()
    async with client(change(WHOLE)) as http:
        await ask(history, "one", http, ASKED)
    (fault,) = (f for f in history.check(lambda _: EXPECTED) if "failed" in f)
    assert found in fault


async def test_a_refusal_is_a_failure() -> None:
    history = History()
    async with client('{"error": {}}', 503) as http:
        await ask(history, "one", http, ASKED)
        await ask(history, "one", http, request(prompt="plain"))
    assert [fault.split(":")[1] for fault in history.check(expected)] == [" failed"] * 2
