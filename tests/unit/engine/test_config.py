"""EngineConfig: one line of JSON there and back, and errors that name the field."""

from __future__ import annotations

import msgspec
import pytest

from engine.config import EngineConfig, decode_config, encode_config

CONFIG = EngineConfig(endpoint="ipc:///run/x/s", replica=2, epoch=5, model="/models/m")


def test_round_trip() -> None:
    changed = msgspec.structs.replace(CONFIG, device="cuda:0", overlap=1, prefix_cache=False)
    assert decode_config(encode_config(changed)) == changed


def test_identity_tells_the_starts_of_one_replica_apart() -> None:
    again = msgspec.structs.replace(CONFIG, epoch=6)
    assert CONFIG.identity == b"engine-2-5"
    assert again.identity != CONFIG.identity


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        CONFIG.epoch = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"", "truncated"),
        (b"{}", "endpoint"),
        (b"not json\n", "malformed"),
        (b'{"endpoint":"e","replica":0,"epoch":1,"model":"m","colour":1}', "colour"),
        (b'{"endpoint":"e","replica":"0","epoch":1,"model":"m"}', "replica"),
        (b'{"endpoint":"e","replica":0,"epoch":1,"model":"m","quant":"int3"}', "quant"),
    ],
)
def test_unusable_lines(line: bytes, told: str) -> None:
    with pytest.raises(msgspec.MsgspecError, match=told):
        decode_config(line)
