"""StopMatcher against the obvious definition, for any text, any stop strings and any chunking."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from router.text.stops import StopMatcher, StopStrings

letters = st.text(alphabet="ab€", max_size=40)
stop_lists = st.lists(st.text(alphabet="ab€", max_size=5), max_size=5)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The match with the earliest end, and of those the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def held_back(text: str, stops: list[str]) -> int:
    """The longest end of the text that is a proper beginning of a stop string."""
    sizes = range(min(len(text), 5), 0, -1)
    return next((n for n in sizes if any(s.startswith(text[-n:]) and len(s) > n for s in stops)), 0)


def chunks(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(letters, stop_lists, st.lists(st.integers(0, 100), max_size=12))
def test_equals_the_definition_in_any_chunking(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(StopStrings(stops))
    sent, matched = "", None
    seen = ""
    for chunk in chunks(text, cuts):
        safe, matched = matcher.push(chunk)
        sent += safe
        seen += chunk
        if matched is None:
            assert len(seen) - len(sent) == held_back(seen, stops)
    sent += matcher.flush()
    assert (sent, matched) == expected(text, stops)
    assert not any(stop and stop in sent for stop in stops)


@given(letters, stop_lists)
def test_after_a_match_nothing_comes_out(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    _, matched = matcher.push(text)
    if matched is not None:
        assert matcher.push("more") == ("", matched)
        assert matcher.flush() == ""
