"""Grammars over a vocabulary of bytes: what they allow, where they end, what is wrong with them."""

from __future__ import annotations

import json
import sys

import pytest

from engine.grammar import GrammarError, Grammars, Matcher, StepMasks, freely_cut
from engine.protocol import BadFrame, Vocabulary, pack_tokens
from router.text import grammar as router_grammar
from tests.fakes import forbidden
from tests.grammars import (
    ANY_DIGITS,
    DIGITS,
    PEOPLE,
    byte_grammars,
    byte_vocabulary,
    json_grammar,
)
from tools.tiny_model import EOS_ID, FIRST_BYTE, IM_END_ID, VOCAB_SIZE, encode_text

NINE = {FIRST_BYTE + ord(digit) for digit in "0123456789"}


def matcher(
    grammar: str,
    text: str = "",
    stop_ids: tuple[int, ...] = (EOS_ID,),
    min_new: int = 0,
    eos: tuple[int, ...] = (EOS_ID,),
) -> Matcher:
    return byte_grammars(eos).matcher(grammar, encode_text(text), stop_ids, min_new)


def allowed(*matchers: Matcher) -> list[set[int]]:
    banned = forbidden(StepMasks(list(range(len(matchers))), list(matchers)), VOCAB_SIZE)
    return [set(range(VOCAB_SIZE)) - ids for ids in banned.values()]


def test_masks_of_several() -> None:
    a, b, c = matcher(DIGITS), matcher(ANY_DIGITS, "1"), matcher('start: "yes"', "y")
    assert allowed(a, b, c) == [NINE, NINE | {EOS_ID}, {FIRST_BYTE + ord("e")}]


def test_it_moves_on_and_completes() -> None:
    digits = matcher(DIGITS)
    for token in encode_text("12"):
        digits.advance(token)
        assert not digits.complete
    digits.advance(encode_text("3")[0])
    assert digits.complete
    assert not digits.failed
    assert matcher(DIGITS, "123").complete


def test_copies_of_one_grammar_are_apart() -> None:
    first, second = matcher(DIGITS), matcher(DIGITS)
    first.advance(encode_text("1")[0])
    first.advance(encode_text("1")[0])
    first.advance(encode_text("1")[0])
    assert first.complete
    assert not second.complete
    assert allowed(second) == [NINE]


def test_tokens_that_break_it() -> None:
    digits = matcher(DIGITS)
    digits.advance(encode_text("x")[0])
    assert digits.failed
    digits.advance(encode_text("1")[0])
    assert digits.failed
    assert allowed(digits) == [{EOS_ID}]  # something can be sampled, whatever becomes of it
    with pytest.raises(GrammarError, match="do not follow"):
        matcher(DIGITS, "1x")


def test_stop_ids_where_the_grammar_may_end() -> None:
    """All of them, also those that are no end tokens of the model; and none of them elsewhere."""
    x = FIRST_BYTE + ord("x")
    several = (EOS_ID, IM_END_ID, x)
    start, later = matcher(ANY_DIGITS, stop_ids=several), matcher(ANY_DIGITS, "1", several)
    assert allowed(start, later) == [NINE, NINE | set(several)]
    later.advance(x)
    assert later.complete


def test_end_tokens_that_do_not_end_this_sequence() -> None:
    both = (EOS_ID, IM_END_ID)
    one = matcher(ANY_DIGITS, "1", (IM_END_ID,), eos=both)
    none = matcher(ANY_DIGITS, "1", (), eos=both)
    assert allowed(one, none) == [NINE | {IM_END_ID}, NINE]


def test_no_stop_before_min_new() -> None:
    early, late = matcher(ANY_DIGITS, "1", min_new=2), matcher(ANY_DIGITS, "12", min_new=2)
    assert allowed(early, late) == [NINE, NINE | {EOS_ID}]
    early.advance(encode_text("7")[0])
    assert allowed(early) == [NINE | {EOS_ID}]


def test_a_stop_id_that_is_a_text() -> None:
    """The grammar may ask for it: then it ends the sequence, as the client wished."""
    brace = FIRST_BYTE + ord("}")
    assert allowed(matcher('start: "{" "}" "a"', "{", (EOS_ID, brace))) == [{brace}]


def test_a_model_without_end_tokens() -> None:
    digits = matcher(ANY_DIGITS, "1", (), eos=())
    assert allowed(digits) == [NINE]
    assert not digits.complete
    assert matcher(DIGITS, "123", (), eos=()).complete


def test_control_tokens_by_name_and_number() -> None:
    named = matcher('start: "a" <|im_start|> "b"', "a")
    numbered = matcher("start: <[4]>")
    assert allowed(named, numbered) == [{4}, {4}]
    named.advance(4)
    assert allowed(named) == [{FIRST_BYTE + ord("b")}]


def test_control_tokens_are_no_text() -> None:
    names = matcher('start: "<" /.*/')
    assert allowed(names) == [{FIRST_BYTE + ord("<")}]


@pytest.mark.parametrize(
    "grammar",
    ['start: "abc"', '{"grammars": [{"lark_grammar": "start: \\"abc\\""}]}'],
    ids=["lark", "json"],
)
def test_fixed_text_is_not_cut_by_us(grammar: str) -> None:
    """Whatever tokens give it are allowed, not only those of some tokenizer."""
    pieces = [b"</s>", b"a", b"b", b"c", b"ab", b"abc", b"bc", b"abcd"]
    lengths = pack_tokens(len(piece) for piece in pieces)
    grammars = Grammars(Vocabulary(1, lengths, b"".join(pieces), (0,), (0,)), len(pieces))
    first = grammars.matcher(grammar, [], (0,), 0)
    masks = StepMasks([0], [first])
    assert forbidden(masks, len(pieces)) == {0: {0, 2, 3, 6, 7}}
    first.advance(4)
    assert forbidden(masks, len(pieces)) == {0: set(range(len(pieces))) - {3}}


def test_the_same_language_either_way() -> None:
    schema = json_grammar(PEOPLE)
    assert "json_schema" in schema
    assert json.loads(freely_cut(schema))["grammars"][0]["json_schema"] is None
    for text in ('{"name": "A", "age": 3, "tags": []}', '{"name":"A","age":150,"tags":["old"]}'):
        assert matcher(schema, text).complete
    for text in ('{"name": "A", "age": 151', '{"age"', "[", '{"name": "A", "age": 3}'):
        with pytest.raises(GrammarError):
            matcher(schema, text)


@pytest.mark.parametrize(
    "grammar",
    [
        *["", "start: missing", "nonsense {", "{", '{"grammars": 1}', "[]", '{"grammars": [{}]}'],
        json_grammar({"type": "wrong"}),
    ],
)
def test_grammars_that_do_not_compile(grammar: str) -> None:
    with pytest.raises(GrammarError, match="the grammar does not compile"):
        matcher(grammar)


def test_a_vocabulary_of_another_model() -> None:
    with pytest.raises(GrammarError, match="272 ids and the model 300"):
        Grammars(byte_vocabulary(), 300)


@pytest.mark.parametrize(
    "vocabulary",
    [
        Vocabulary(1, pack_tokens([1, 2]), b"ab", (), ()),
        Vocabulary(1, pack_tokens([3, -1]), b"ab", (), ()),
        Vocabulary(1, pack_tokens([1, 1]), b"ab", (2,), ()),
        Vocabulary(1, pack_tokens([1, 1]), b"ab", (), (-1,)),
        Vocabulary(1, b"123", b"ab", (), ()),
    ],
)
def test_a_vocabulary_that_contradicts_itself(vocabulary: Vocabulary) -> None:
    with pytest.raises(BadFrame):
        Grammars(vocabulary, 2)


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match="pip install llguidance"):
        Grammars(byte_vocabulary(), VOCAB_SIZE)


def test_few_compiled_grammars_are_kept() -> None:
    grammars = Grammars(byte_vocabulary(), VOCAB_SIZE)
    for number in range(40):
        assert not grammars.matcher(f'start: "{number}"', [], (), 0).complete
    assert len(grammars._roots) == 32


@pytest.mark.parametrize("thinks", [False, True])
def test_what_the_router_writes_compiles_and_is_freely_cut(thinks: bool) -> None:
    """Every form of it, and behind a thinking block too."""
    forms = {
        router_grammar.json_schema_grammar(PEOPLE): '{"name": "A", "age": 3, "tags": []}',
        router_grammar.json_object_grammar(): '{"a": [1, 2.5, null]}',
        router_grammar.regex_grammar(r"\d{3}-[a-z]"): "123-x",
        router_grammar.choice_grammar(["yes", "no"]): "no",
        router_grammar.lark_grammar('start: "a" DIGITS\nDIGITS: /[0-9]{2}/\n'): "a12",
    }
    for grammar, text in forms.items():
        before = "hm</think>\n" if thinks else ""
        bound = router_grammar.after_thinking(grammar, "</think>") if thinks else grammar
        # The tokens of `</think>` are its letters here, as the tag is a text of this vocabulary.
        letters = [FIRST_BYTE + byte for byte in (before + text).encode()]
        assert byte_grammars().matcher(bound, letters, (EOS_ID,), 0).complete
