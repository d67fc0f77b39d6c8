"""Runs of an answer, and the messages that parts of a conversation become."""

from __future__ import annotations

from collections.abc import Sequence

from router.api.runs import Change, Runs
from router.api.schemas import ContentPart
from router.api.turns import Turns
from router.streams import TokenLogprob
from router.text.assembly import Entry, FinishReason, Piece
from router.text.scanner import Delta


def piece(
    *deltas: Delta,
    text: str = "",
    finish: FinishReason | None = None,
    matched: str | None = None,
    entries: Sequence[Entry] = (),
) -> Piece:
    return Piece(text, [], entries, finish, deltas, matched)


def told(changes: list[Change]) -> list[tuple[str, int, str]]:
    return [(change.what, change.run.index, change.text) for change in changes]


def entry(token: int) -> Entry:
    return Entry(token, TokenLogprob(-0.5, []), 0)


def test_plain_text_is_one_run() -> None:
    runs = Runs()
    assert told(runs.push(piece(text="a"))) == [("opens", 0, ""), ("grows", 0, "a")]
    assert told(runs.push(piece(text="b"))) == [("grows", 0, "b")]
    assert told(runs.push(piece(text="c", finish="stop", matched="x"))) == [
        ("grows", 0, "c"),
        ("ends", 0, ""),
    ]
    assert [(run.kind, run.text, run.over, run.cut) for run in runs.runs] == [
        ("content", "abc", True, False)
    ]
    assert (runs.finish, runs.matched) == ("stop", "x")


def test_a_run_ends_where_the_next_kind_begins() -> None:
    runs = Runs()
    changes = runs.push(
        piece(
            Delta("reasoning", "why"),
            Delta("content", "so"),
            Delta("call", "", 0, "call_1", "f"),
            Delta("arguments", '{"a":', 0),
        )
    )
    changes += runs.push(
        piece(
            Delta("arguments", "1}", 0),
            Delta("call", "", 1, "call_2", "g"),
            Delta("content", "end"),
            finish="tool_calls",
        )
    )
    assert told(changes) == [
        ("opens", 0, ""),
        ("grows", 0, "why"),
        ("ends", 0, ""),
        ("opens", 1, ""),
        ("grows", 1, "so"),
        ("ends", 1, ""),
        ("opens", 2, ""),
        ("grows", 2, '{"a":'),
        ("grows", 2, "1}"),
        ("ends", 2, ""),
        ("opens", 3, ""),
        ("grows", 3, "{}"),  # a whole call without arguments still has JSON
        ("ends", 3, ""),
        ("opens", 4, ""),
        ("grows", 4, "end"),
        ("ends", 4, ""),
    ]
    assert [(run.kind, run.id, run.name, run.text) for run in runs.runs] == [
        ("reasoning", "", "", "why"),
        ("content", "", "", "so"),
        ("call", "call_1", "f", '{"a":1}'),
        ("call", "call_2", "g", "{}"),
        ("content", "", "", "end"),
    ]


def test_only_the_last_run_is_cut_by_the_limit() -> None:
    runs = Runs()
    runs.push(piece(Delta("content", "x"), Delta("call", "", 0, "call_1", "f"), finish="length"))
    assert [(run.text, run.over, run.cut) for run in runs.runs] == [
        ("x", True, False),
        ("", True, True),
    ]


def test_an_answer_without_words_is_an_empty_text() -> None:
    runs = Runs()
    assert runs.push(piece()) == []
    assert told(runs.push(piece(finish="stop"))) == [("opens", 0, ""), ("ends", 0, "")]
    assert runs.runs[0].kind == "content"


def test_logprobs_belong_to_text_not_to_thinking() -> None:
    runs = Runs()
    runs.push(piece(Delta("reasoning", "r"), entries=[entry(1)]))
    runs.push(piece(Delta("reasoning", "r"), Delta("content", "c"), entries=[entry(2), entry(3)]))
    runs.push(piece(text="d", entries=[entry(4)], finish="stop"))
    assert [[e.token for e in run.entries] for run in runs.runs] == [[], [2, 3, 4]]


def test_turns_gather_what_the_assistant_did() -> None:
    turns = Turns()
    turns.say("system", ["s"])
    turns.say("user", ["a", "b"])
    turns.think("hm")
    turns.think("")
    turns.call("1", "f", "{}")
    turns.call("2", "g", "{}")
    turns.result("1", "one")
    turns.result("2", "two")
    turns.say("assistant", ["x"])
    turns.say("assistant", ["y"])
    turns.say("user", ["c"])
    turns.say("user", ["d"])
    messages = turns.messages
    assert [message.role for message in messages] == [
        *("system", "user", "assistant", "tool", "tool", "assistant", "user", "user")
    ]
    called = messages[2]
    assert (called.content, called.reasoning_content) == (None, "hm")
    assert called.tool_calls is not None
    assert [call["function"]["name"] for call in called.tool_calls] == ["f", "g"]
    assert [(m.tool_call_id, m.content) for m in messages[3:5]] == [("1", "one"), ("2", "two")]
    assert messages[1].content == [ContentPart("text", "a"), ContentPart("text", "b")]
    assert messages[5].content == [ContentPart("text", "x"), ContentPart("text", "y")]


def test_turns_may_join_users() -> None:
    turns = Turns(joins_users=True)
    turns.say("user", ["a"])
    turns.say("user", ["b"])
    turns.result("1", "r")
    turns.say("user", ["c"])
    turns.say("assistant", ["d"])
    turns.say("user", ["e"])
    assert [message.role for message in turns.messages] == [
        *("user", "tool", "user", "assistant", "user")
    ]
    assert turns.messages[0].content == [ContentPart("text", "a"), ContentPart("text", "b")]
