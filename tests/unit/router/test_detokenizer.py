from __future__ import annotations

from router.text.detokenizer import Detokenizer


def joined(pieces: list[bytes], *, strip_space: bool = False) -> list[str]:
    detokenizer = Detokenizer(pieces, strip_space=strip_space)
    return [*(detokenizer.push([token]) for token in range(len(pieces))), detokenizer.flush()]


def test_a_character_in_three_tokens() -> None:
    # huggingface/text-generation-inference#131
    assert joined([b"\xf0\x9f", b"\x98", b"\x8a"]) == ["", "", "😊", ""]


def test_a_character_cut_by_the_length_limit_is_flushed() -> None:
    assert joined([b"a", b"\xf0\x9f\x98"]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_the_first_space_of_a_sentencepiece_text() -> None:
    # InfiniTensor/InfiniLM#398: once, at the start, and no other one
    pieces = [b" Hello", b"!", b" I", b"'m", b" an", b" AI"]
    assert "".join(joined(pieces, strip_space=True)) == "Hello! I'm an AI"
    assert "".join(joined(pieces)) == " Hello! I'm an AI"


def test_the_first_space_after_hidden_tokens() -> None:
    assert joined([b"", b" ", b" a"], strip_space=True) == ["", "", " a", ""]


def test_runs_of_spaces_stay() -> None:
    # InternLM/lmdeploy#992
    assert "".join(joined([b"a", b"   ", b" b"])) == "a    b"


def test_invalid_bytes_are_replaced_at_once() -> None:
    assert joined([b"\xff", b"a"]) == ["\N{REPLACEMENT CHARACTER}", "a", ""]
