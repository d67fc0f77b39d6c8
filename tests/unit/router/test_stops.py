from __future__ import annotations

import pytest

from router.errors import BadRequest
from router.text.stops import MAX_STOP_CHARS, StopMatcher, StopStrings


def run(stops: list[str], chunks: list[str]) -> tuple[list[str], str | None]:
    """What each chunk lets out, then the flush, and the match."""
    matcher = StopMatcher(StopStrings(stops))
    sent, matched = [], None
    for chunk in chunks:
        safe, matched = matcher.push(chunk)
        sent.append(safe)
    return [*sent, matcher.flush()], matched


def test_a_stop_string_over_many_chunks_is_never_sent_in_part() -> None:
    # vllm-project/vllm#3574
    assert run(["DEFGHIJ"], ["ABC", "DEF", "G", "HI", "J", "K"]) == (
        ["ABC", "", "", "", "", "", ""],
        "DEFGHIJ",
    )


def test_a_stop_string_of_two_tokens() -> None:
    # InternLM/lmdeploy#1731
    assert run(["\n\n"], ["x", "\n", "\n", "y"]) == (["x", "", "", "", ""], "\n\n")


def test_text_behind_the_match_in_the_same_chunk_is_dropped() -> None:
    # mzau/mlx-knife#68, dphnAI/sonar#742
    assert run(["gamma"], [" beta", " gamma delta"]) == ([" beta", " ", ""], "gamma")


def test_empty_stop_strings_are_ignored() -> None:
    # jeffdapaz/VisualChatGPTStudio#92
    assert run([""], ["hi"]) == (["hi", ""], None)
    assert not StopStrings(["", ""])
    assert StopStrings(["", "x"])


def test_only_what_can_still_become_a_stop_string_is_held_back() -> None:
    assert run(["abab!"], ["xab", "ab", "a", "c"]) == (["x", "", "ab", "abac", ""], None)


def test_an_unfinished_stop_string_comes_out_at_the_end() -> None:
    assert run(["END"], ["the EN"]) == (["the ", "EN"], None)


def test_the_match_that_ends_first_wins() -> None:
    assert run(["bcd", "c"], ["abcd"]) == (["ab", ""], "c")
    assert run(["bcd", "c"], list("abcd"))[1] == "c"


def test_of_two_with_the_same_end_the_longer_one() -> None:
    assert run(["c", "abc"], ["xabc"]) == (["x", ""], "abc")


def test_stop_strings_that_begin_alike() -> None:
    assert run(["<|end|>", "<|end|>x"], ["a<|end|>x"]) == (["a", ""], "<|end|>")
    assert run(["<|end|>now", "<|endoftext|>"], ["a<|end|>", "no"])[0] == ["a", "", "<|end|>no"]


def test_characters_with_a_meaning_in_expressions() -> None:
    for stop in ("]", "^", "-", "\\", "[a-z]", ".*"):
        assert run([stop], ["az", stop]) == (["az", "", ""], stop)


def test_long_repetitions_take_linear_time() -> None:
    # a quadratic matcher would need minutes here
    stop = "a" * (MAX_STOP_CHARS - 1) + "b"
    sent, matched = run([stop], ["a"] * (2 * MAX_STOP_CHARS))
    assert matched is None
    assert sum(map(len, sent)) == 2 * MAX_STOP_CHARS


def test_too_long_stop_strings_are_refused() -> None:
    with pytest.raises(BadRequest) as caught:
        StopStrings(["x" * MAX_STOP_CHARS, "y"])
    assert caught.value.param == "stop"


@pytest.mark.parametrize("second", ["]", "^", "-", "\\", "[", "\n", ".", "€"])
def test_second_characters_with_a_meaning_in_expressions(second: str) -> None:
    stop = "x" + second + "y"
    assert run([stop, "xa"], ["x", "z" + stop[:2], "y"]) == (["", "xz", "", ""], stop)
