"""Whatever can be said arrives unchanged, and whatever else arrives is a `BadFrame`."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import (
    Abort,
    BadFrame,
    Busy,
    Drain,
    Embedding,
    Fatal,
    Finish,
    Limits,
    Logprobs,
    Ping,
    Pong,
    Pooling,
    Ready,
    Sampling,
    Started,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
    ToRouter,
    Vocabulary,
    decode_to_engine,
    decode_to_router,
    encode,
    pack_floats,
    pack_tokens,
    unpack_floats,
    unpack_tokens,
)

Part = TypeVar("Part")

INT = st.integers(-(1 << 63), (1 << 63) - 1)
FLOAT = st.floats(allow_nan=False)
TOKEN = st.integers(-(1 << 31), (1 << 31) - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BYTES = st.binary(max_size=40)
REASON = st.sampled_from(["stop", "length", "abort", "error"])


def several(part: st.SearchStrategy[Part]) -> st.SearchStrategy[tuple[Part, ...]]:
    return st.lists(part, max_size=4).map(tuple)


SAMPLING = st.builds(
    Sampling, *[FLOAT, INT, *[FLOAT] * 5, INT, several(st.tuples(INT, FLOAT)), INT, INT, INT]
)
POOLING = st.builds(Pooling, st.sampled_from(["mean", "cls", "last"]), INT, st.booleans())
LIMITS = st.builds(Limits, *[INT] * 7, FLOAT, TEXT, TEXT, INT, st.booleans(), TEXT)
STATS = st.builds(Stats, *[INT] * 13)
FINISHES = several(st.builds(Finish, INT, REASON, TEXT))
LOGPROBS = several(st.builds(Logprobs, INT, INT, BYTES, BYTES, BYTES))
EMBEDDINGS = several(st.builds(Embedding, INT, BYTES))
STARTED = several(st.builds(Started, INT, INT))

TO_ENGINE: st.SearchStrategy[ToEngine] = st.one_of(
    st.builds(
        Submit,
        *[INT, INT, BYTES, SAMPLING, INT, several(INT), BYTES, INT, INT],
        *[st.none() | POOLING, TEXT],
    ),
    st.builds(Vocabulary, INT, BYTES, BYTES, several(INT), several(INT)),
    st.builds(Abort, INT, several(INT)),
    st.builds(Drain, INT),
    st.builds(Ping, INT, INT),
)
TO_ROUTER: st.SearchStrategy[ToRouter] = st.one_of(
    st.builds(Ready, INT, INT, LIMITS),
    st.builds(
        StepOutput,
        *[INT, INT, several(INT), several(INT), BYTES],
        *[FINISHES, STATS, STARTED, LOGPROBS, LOGPROBS, EMBEDDINGS],
    ),
    st.builds(Pong, INT, INT, STATS),
    st.builds(Busy, INT, TEXT, FLOAT),
    st.builds(Fatal, INT, TEXT, INT),
)
# What an attacker or another version might send: any msgpack, mostly with a known tag in front.
JUNK = st.recursive(
    st.none() | st.booleans() | INT | st.floats() | TEXT | BYTES,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)
TAGS = st.sampled_from(
    ["submit", "abort", "drain", "ping", "ready", "step", "pong", "busy", "fatal"]
)
TAGGED = st.tuples(TAGS, st.lists(JUNK, max_size=11)).map(lambda pair: [pair[0], *pair[1]])


@given(TO_ENGINE)
def test_to_engine_round_trip(message: ToEngine) -> None:
    assert decode_to_engine(encode(message)) == message


@given(TO_ROUTER)
def test_to_router_round_trip(message: ToRouter) -> None:
    assert decode_to_router(encode(message)) == message


@given(st.one_of(st.binary(max_size=200), (JUNK | TAGGED).map(msgspec.msgpack.encode)))
def test_any_bytes_decode_or_are_a_bad_frame(frame: bytes) -> None:
    for decode in (decode_to_engine, decode_to_router):
        try:
            message = decode(frame)
        except BadFrame:
            continue
        assert decode(encode(message)) is not None


@given(TO_ENGINE, st.data())
def test_a_damaged_frame_never_raises_anything_else(message: ToEngine, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(at, len(frame)))])
    try:
        decode_to_engine(cut)
    except BadFrame:
        return


@given(st.lists(TOKEN, max_size=50))
def test_tokens_round_trip(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens)) == tokens


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=50))
def test_floats_round_trip(values: list[float]) -> None:
    assert unpack_floats(pack_floats(values)) == values


@given(st.binary(max_size=41))
def test_any_bytes_are_tokens_or_a_bad_frame(data: bytes) -> None:
    if len(data) % 4:
        with pytest.raises(BadFrame):
            unpack_tokens(data)
    else:
        assert pack_tokens(unpack_tokens(data)) == data
