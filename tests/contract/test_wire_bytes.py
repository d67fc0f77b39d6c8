"""The bytes of every message: a change here breaks a router and an engine of two versions.

Append fields, never reorder, retype or remove them. A new field changes the goldens below (their
array grows) and must pass `test_older_sender`: old bytes still decode.
"""

from __future__ import annotations

import msgspec
import pytest

from engine.config import EngineConfig, decode_config, encode_config
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

STATS = Stats(*range(1, 14))
SAMPLING = Sampling(0.5, 40, 0.9, 0.05, 0.1, -0.2, 1.1, 7, ((5, -1.5),), 2, 0, 3)
TO_ENGINE: dict[str, ToEngine] = {
    "submit": Submit(3, 17, pack_tokens([1, 258]), SAMPLING, 16, (2, 5), b"salt", -1, 1),
    "submit pooled": Submit(
        3, 18, pack_tokens([1]), Sampling(), 0, pooling=Pooling("cls", 8, False)
    ),
    "submit with grammar": Submit(3, 19, pack_tokens([1]), Sampling(), 8, grammar="start: /a/"),
    "vocabulary": Vocabulary(3, pack_tokens([3, 1, 0, 2]), b"<s>aab", (0,), (0, 2)),
    "abort": Abort(3, (17, 18)),
    "drain": Drain(3),
    "ping": Ping(3, 9),
}
TO_ROUTER: dict[str, ToRouter] = {
    "ready": Ready(
        3,
        1,
        Limits(
            *(2048, 272, 32, 4096, 64, 435456, 1 << 26, 0.5),
            *("cpu", "float32", 384, False, "int8"),
        ),
    ),
    "step": StepOutput(
        3,
        70,
        (17, 18),
        (1, 2),
        pack_tokens([88, 89, 90]),
        (Finish(18, "stop"), Finish(19, "error", "why")),
        STATS,
        (Started(17, 32),),
        (Logprobs(17, 4, pack_floats([-0.5]), pack_tokens([88]), pack_floats([-0.5])),),
        (Logprobs(18, 1, pack_floats([-1.0])),),
        (Embedding(20, pack_floats([0.6, -0.8])),),
    ),
    "pong": Pong(3, 9, STATS),
    "busy": Busy(3, "load", 60.0),
    "fatal": Fatal(3, "no such file", 78),
}
MESSAGES = TO_ENGINE | TO_ROUTER

GOLDEN = {
    "submit": (
        "9ca67375626d69740311c40801000000020100009ccb3fe000000000000028cb3feccccccccccccdcb3f"
        "a999999999999acb3fb999999999999acbbfc999999999999acb3ff199999999999a07919205cbbff800"
        "000000000002000310920205c40473616c74ff01c0a0"
    ),
    "submit pooled": (
        "9ca67375626d69740312c404010000009ccb3ff000000000000000cb3ff0000000000000cb0000000000"
        "000000cb0000000000000000cb0000000000000000cb3ff00000000000000090ffff000090c400000093"
        "a3636c7308c2a0"
    ),
    "submit with grammar": (
        "9ca67375626d69740313c404010000009ccb3ff000000000000000cb3ff0000000000000cb0000000000"
        "000000cb0000000000000000cb0000000000000000cb3ff00000000000000090ffff000890c4000000c0"
        "aa73746172743a202f612f"
    ),
    "vocabulary": (
        "96aa766f636162756c61727903c41003000000010000000000000002000000c4063c733e6161629100920002"
    ),
    "abort": "93a561626f727403921112",
    "drain": "92a5647261696e03",
    "ping": "93a470696e670309",
    "ready": (
        "94a5726561647903019dcd0800cd011020cd100040ce0006a500ce04000000cb3fe0000000000000a363"
        "7075a7666c6f61743332cd0180c2a4696e7438"
    ),
    "step": (
        "9ca4737465700346921112920102c40c58000000590000005a000000929312a473746f70a09313a56572"
        "726f72a37768799f0102030405060708090a0b0c0d00009192112091951104c404000000bfc40458000000c4"
        "04000000bf91951201c404000080bfc400c400919214c4089a99193fcdcc4cbf"
    ),
    "pong": "94a4706f6e6703099f0102030405060708090a0b0c0d0000",
    "busy": "94a46275737903a46c6f6164cb404e000000000000",
    "fatal": "94a5666174616c03ac6e6f20737563682066696c654e",
}
# A submit of a sender before grammars.
BEFORE_GRAMMARS = (
    "9ba67375626d69740311c40801000000020100009ccb3fe000000000000028cb3feccccccccccccdcb3f"
    "a999999999999acb3fb999999999999acbbfc999999999999acb3ff199999999999a07919205cbbff800"
    "000000000002000310920205c40473616c74ff01c0"
)
# The same messages of a sender before embeddings.
OLDER = {
    "submit": (
        "9aa67375626d69740311c40801000000020100009ccb3fe000000000000028cb3feccccccccccccdcb3f"
        "a999999999999acb3fb999999999999acbbfc999999999999acb3ff199999999999a07919205cbbff800"
        "000000000002000310920205c40473616c74ff01"
    ),
    "ready": (
        "94a5726561647903019acd0800cd011020cd100040ce0006a500ce04000000cb3fe0000000000000a363"
        "7075a7666c6f61743332"
    ),
    "step": (
        "9ba4737465700346921112920102c40c58000000590000005a000000929312a473746f70a09313a56572"
        "726f72a37768799f0102030405060708090a0b0c0d00009192112091951104c404000000bfc40458000000c4"
        "04000000bf91951201c404000080bfc400c400"
    ),
}


def decode(frame: bytes, name: str) -> ToEngine | ToRouter:
    return decode_to_engine(frame) if name in TO_ENGINE else decode_to_router(frame)


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes(name: str) -> None:
    assert encode(MESSAGES[name]).hex() == GOLDEN[name]


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes_decode(name: str) -> None:
    assert decode(bytes.fromhex(GOLDEN[name]), name) == MESSAGES[name]


@pytest.mark.parametrize("name", MESSAGES)
def test_newer_sender(name: str) -> None:
    """Fields that this version does not know are ignored, on every level."""
    fields = msgspec.msgpack.decode(encode(MESSAGES[name]))
    longer = msgspec.msgpack.encode([*fields, "new", {"field": [1]}])
    assert decode(longer, name) == MESSAGES[name]


def test_newer_sender_of_a_part() -> None:
    fields = msgspec.msgpack.decode(encode(TO_ROUTER["step"]))
    finished, stats = fields[6], fields[7]
    finished[0] += ["new"]
    stats += [99]
    assert decode_to_router(msgspec.msgpack.encode(fields)) == TO_ROUTER["step"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["submit", 3, 17, b"", [], 16], Submit(3, 17, b"", Sampling(), 16)),
        (["submit", 3, 17, b"", [0.0], 16, [2]], Submit(3, 17, b"", Sampling(0.0), 16, (2,))),
        (["ready", 3, 1, [8, 9, 4, 2, 1]], Ready(3, 1, Limits(8, 9, 4, 2, 1))),
        (["step", 3, 1, [17], [], b"abcd"], StepOutput(3, 1, (17,), (), b"abcd")),
        (
            ["step", 3, 1, [], [], b"", [[17, "stop"]], [1, 2]],
            StepOutput(3, 1, (), (), b"", (Finish(17, "stop"),), Stats(1, 2)),
        ),
        (["pong", 3, 9], Pong(3, 9)),
        (["fatal", 3, "why"], Fatal(3, "why", 70)),
    ],
)
def test_older_sender(fields: list[object], message: ToEngine | ToRouter) -> None:
    """Trailing fields that have a default may be missing."""
    frame = msgspec.msgpack.encode(fields)
    assert decode(frame, str(fields[0])) == message


@pytest.mark.parametrize("name", OLDER)
def test_sender_before_embeddings(name: str) -> None:
    limits = Limits(2048, 272, 32, 4096, 64, 435456, 1 << 26, 0.5, "cpu", "float32")
    expected: dict[str, ToEngine | ToRouter] = {
        "submit": TO_ENGINE["submit"],
        "ready": Ready(3, 1, limits),
        "step": msgspec.structs.replace(TO_ROUTER["step"], embeddings=()),
    }
    assert decode(bytes.fromhex(OLDER[name]), name) == expected[name]
    assert (limits.embedding_size, limits.generates, limits.quant) == (0, True, "none")


def test_sender_before_grammars() -> None:
    assert decode(bytes.fromhex(BEFORE_GRAMMARS), "submit") == TO_ENGINE["submit"]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\xff" * 64,
        msgspec.msgpack.encode({"type": "drain"}),
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode(["drain"]),
        msgspec.msgpack.encode(["drain", "three"]),
        msgspec.msgpack.encode(["unheard", 3]),
        msgspec.msgpack.encode(["abort", 3, [1.5]]),
        encode(TO_ENGINE["submit"])[:-1],
        encode(TO_ENGINE["submit"]) + b"\x00",
        encode(TO_ROUTER["ready"]),  # the other direction
        b"\x92\xa5drain\xd9\x02\xff\xfe",  # a string that is no UTF-8
    ],
)
def test_bad_frame(frame: bytes) -> None:
    with pytest.raises(BadFrame, match=f"^{len(frame)} bytes"):
        decode_to_engine(frame)


def test_finish_reasons_are_closed() -> None:
    frame = msgspec.msgpack.encode(["step", 3, 1, [], [], b"", [[17, "tired"]]])
    with pytest.raises(BadFrame):
        decode_to_router(frame)


def test_packed_numbers_are_little_endian() -> None:
    assert pack_tokens([1, -1, 0x01020304]).hex() == "01000000ffffffff04030201"
    assert pack_floats([1.0, -0.5]).hex() == "0000803f000000bf"
    assert unpack_tokens(bytes.fromhex("0403020100000080")) == [0x01020304, -(1 << 31)]
    assert unpack_floats(bytes.fromhex("0000803f")) == [1.0]


def test_packed_numbers_have_limits() -> None:
    with pytest.raises(OverflowError):
        pack_tokens([1 << 31])
    with pytest.raises(BadFrame, match="5 bytes"):
        unpack_tokens(b"12345")


def test_orders_are_one_line() -> None:
    """The router of another version may leave out what has a default, and nothing else."""
    config = EngineConfig(endpoint="ipc:///run/x/s", replica=1, epoch=2, model="/m\nodd")
    line = encode_config(config)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_config(line) == config
    shortest = b'{"endpoint":"ipc:///run/x/s","replica":1,"epoch":2,"model":"/m\\nodd"}\n'
    assert decode_config(shortest) == config
    assert config.identity == b"engine-1-2"
