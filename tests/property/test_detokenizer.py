"""Detokenizer: streamed text equals decoding at once, for any bytes, any pieces, any chunking."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from router.text.detokenizer import Detokenizer
from router.text.vocabulary import EACH_BYTE

texts = st.text(alphabet=st.sampled_from("aé你好😊👨‍👩‍👧 \n"), max_size=20)
places = st.lists(st.integers(0, 200), max_size=12)
all_bytes = tuple(bytes([byte]) for byte in range(256))


def cut(size: int, cuts: list[int]) -> list[slice]:
    """Cuts a list of that size into pieces."""
    edges = sorted({0, size, *(place % (size + 1) for place in cuts)})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@given(texts, places)
def test_whole_characters_only(text: str, cuts: list[int]) -> None:
    ids = list(text.encode())
    detokenizer = Detokenizer(all_bytes)
    sent = ""
    for part in cut(len(ids), cuts):
        new = detokenizer.push(ids[part])
        assert "\N{REPLACEMENT CHARACTER}" not in new
        sent += new
        # at most the three first bytes of one character are held back
        assert len(text.encode()[: part.stop]) - len(sent.encode()) <= 3
    assert sent + detokenizer.flush() == text


@given(st.binary(max_size=30), places, st.booleans())
def test_any_bytes_in_any_chunking(data: bytes, cuts: list[int], strip: bool) -> None:
    detokenizer = Detokenizer(all_bytes, strip_space=strip)
    sent = "".join(detokenizer.push(data[part]) for part in cut(len(data), cuts))
    sent += detokenizer.flush()
    whole = data.removeprefix(b" ") if strip else data
    assert sent == whole.decode("utf-8", "replace")


@given(st.text(alphabet=" \n\ta你", max_size=12), places)
def test_leading_lines_in_any_chunking(text: str, cuts: list[int]) -> None:
    data = text.encode()
    detokenizer = Detokenizer(all_bytes, strip_space=True, strip_lines=True)
    sent = "".join(detokenizer.push(data[part]) for part in cut(len(data), cuts))
    assert sent + detokenizer.flush() == text.lstrip(" \n")


@given(st.binary(max_size=30), places)
def test_each_invalid_byte_is_shown(data: bytes, cuts: list[int]) -> None:
    detokenizer = Detokenizer(all_bytes, errors=EACH_BYTE)
    sent = "".join(detokenizer.push(data[part]) for part in cut(len(data), cuts))
    sent += detokenizer.flush()
    assert sent == data.decode("utf-8", EACH_BYTE)
    # every byte is in a character or is one U+FFFD
    assert len(sent.replace("\N{REPLACEMENT CHARACTER}", "x").encode()) == len(data)


@given(texts, places, places)
def test_pieces_of_any_length(text: str, borders: list[int], cuts: list[int]) -> None:
    data = text.encode()
    pieces = [data[part] for part in cut(len(data), borders)]
    detokenizer = Detokenizer(pieces)
    ids = list(range(len(pieces)))
    sent = [detokenizer.push(ids[part]) for part in cut(len(ids), cuts)]
    assert "".join(sent) + detokenizer.flush() == text


@given(texts, st.integers(0, 80))
def test_a_character_cut_by_the_length_limit_is_shown_as_replaced(text: str, end: int) -> None:
    data = text.encode()[:end]
    detokenizer = Detokenizer(all_bytes)
    assert detokenizer.push(data) + detokenizer.flush() == data.decode("utf-8", "replace")


@given(st.lists(st.integers(0, 1 << 20), max_size=10))
def test_unknown_ids_add_nothing(ids: list[int]) -> None:
    detokenizer = Detokenizer((b"x",))
    sent = detokenizer.push([*ids, 0]) + detokenizer.flush()
    assert sent == "x" * (1 + ids.count(0))
