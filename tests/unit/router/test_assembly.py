"""Tokens to shown text: the result must not depend on how the tokens were bundled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Finish
from router.streams import TokenLogprob
from router.text.assembly import ChoiceText, Piece, TextRules
from router.text.scanner import ScanRules, ThinkingRule
from router.text.stops import StopStrings

# one token per byte; 256 is an end token, shown as nothing
PIECES = [bytes([byte]) for byte in range(256)] + [b""]
END = 256


def rules(
    *stops: str,
    include_stop: bool = False,
    logprobs: bool = False,
    pieces: Sequence[bytes] = PIECES,
) -> TextRules:
    return TextRules(
        pieces=pieces,
        stops=StopStrings(stops) if stops else None,
        stop_ids=frozenset((END,)),
        include_stop=include_stop,
        logprobs=logprobs,
    )


def run(
    given_rules: TextRules, tokens: list[int], cuts: Sequence[int], reason: str = "length"
) -> list[Piece]:
    """Pushes `tokens` in bundles that end at `cuts`, then the engine's end with the last bundle."""
    text = ChoiceText(given_rules)
    ends = sorted({cut for cut in cuts if cut < len(tokens)} | {len(tokens)})
    pieces: list[Piece] = []
    start = 0
    for end in ends:
        bundle = tokens[start:end]
        start = end
        finish = Finish(1, "stop" if reason == "stop" else "length") if end == len(tokens) else None
        logprobs = [TokenLogprob(-float(token), []) for token in bundle]
        pieces.append(text.push(bundle, logprobs, finish))
        if pieces[-1].finish is not None:
            break
    assert text.num_tokens == sum(len(piece.tokens) for piece in pieces)
    return pieces


def joined(pieces: list[Piece]) -> tuple[str, int, list[tuple[int, int]], str | None]:
    """(text, tokens that count, entries as (token, offset), finish)."""
    entries = [(entry.token, entry.offset) for piece in pieces for entry in piece.entries]
    text = "".join(piece.text for piece in pieces)
    return text, sum(len(piece.tokens) for piece in pieces), entries, pieces[-1].finish


TEXTS = st.text(alphabet="ab é😊", max_size=12)


@given(
    text=TEXTS,
    stops=st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 40)),
    ended=st.booleans(),
    include=st.booleans(),
    logprobs=st.booleans(),
)
def test_bundling_changes_nothing(
    text: str, stops: list[str], cuts: list[int], ended: bool, include: bool, logprobs: bool
) -> None:
    tokens = list(text.encode()) + ([END] if ended else [])
    given_rules = rules(*stops, include_stop=include, logprobs=logprobs)
    reason = "stop" if ended else "length"
    assert joined(run(given_rules, tokens, cuts, reason)) == joined(
        run(given_rules, tokens, range(len(tokens)), reason)
    )


@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=3))
def test_no_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    pieces = run(rules(*stops), list(text.encode()), range(40))
    shown = "".join(piece.text for piece in pieces)
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    if not any(stop in text for stop in stops):
        assert (shown, pieces[-1].finish) == (text, "length")


@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab é", min_size=1, max_size=2), max_size=2))
def test_entries_cover_the_shown_text(text: str, stops: list[str]) -> None:
    shown, _, entries, _ = joined(run(rules(*stops, logprobs=True), list(text.encode()), []))
    covered = b"".join(PIECES[token] for token, _ in entries)
    assert covered.decode(errors="replace") == shown  # cut only between whole characters
    assert [offset for _, offset in entries] == sorted(offset for _, offset in entries)


def test_split_character_is_held_back() -> None:
    emoji = list("😊".encode())
    pieces = run(rules(), emoji, [1, 2, 3])
    assert [piece.text for piece in pieces] == ["", "", "", "😊"]


def test_cut_in_mid_character_ends_in_a_replacement() -> None:
    assert joined(run(rules(), list("é".encode())[:1], []))[0] == "�"


def test_end_token_counts_but_is_no_text() -> None:
    pieces = run(rules(logprobs=True), [97, END], [], "stop")
    assert joined(pieces) == ("a", 2, [(97, 0)], "stop")


def test_included_end_token_is_an_entry_too() -> None:
    named = [*PIECES[:256], b"<end>"]
    given_rules = rules(include_stop=True, logprobs=True, pieces=named)
    assert joined(run(given_rules, [97, END], [], "stop")) == (
        "a<end>",
        2,
        [(97, 0), (END, 1)],
        "stop",
    )


@pytest.mark.parametrize("include", [False, True])
def test_tokens_behind_a_stop_string_do_not_count(include: bool) -> None:
    pieces = run(rules("END", include_stop=include), list(b"aENDbcd"), [])
    assert joined(pieces) == ("aEND" if include else "a", 4, [], "stop")


def test_text_held_for_a_stop_string_comes_at_the_end() -> None:
    pieces = run(rules("END"), list(b"aEN"), [1, 2])
    assert [piece.text for piece in pieces] == ["a", "", "EN"]


def test_entries_wait_for_their_text() -> None:
    pieces = run(rules("END", logprobs=True), list(b"aENx"), [1, 2, 3])
    assert [len(piece.entries) for piece in pieces] == [1, 0, 0, 3]


def test_leading_space_is_dropped_once_when_asked() -> None:
    text = ChoiceText(TextRules(pieces=PIECES, strip_space=True))
    assert (
        text.push(list(b" a"), None, None).text + text.push(list(b" b"), None, None).text == "a b"
    )


def test_a_bundle_of_tokens_gives_one_delta_of_a_kind_073() -> None:
    scan = ScanRules(thinking=ThinkingRule(starts_open=True))
    given_rules = TextRules(pieces=PIECES, stop_ids=frozenset((END,)), scan=scan)
    text = ChoiceText(given_rules)
    piece = text.push(list(b"hm, well</think>yes, so"), None, None)
    assert [delta.kind for delta in piece.deltas] == ["reasoning", "content"]
    assert [delta.text for delta in piece.deltas] == ["hm, well", "yes, so"]
    assert text.num_reasoning_tokens == len(b"hm, well</think>")
