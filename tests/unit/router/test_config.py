"""Options to configs: the forms of models, devices and amounts, and who runs where."""

from __future__ import annotations

import pytest

from router.config import (
    ModelArgument,
    Options,
    Placement,
    key_digests,
    key_matches,
    parse_bytes,
    parse_gpus,
    parse_models,
    place,
    resolve,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [ModelArgument((), "smollm2-135m")]),
        ("m", [ModelArgument((), "m")]),
        ("a=org/m", [ModelArgument(("a",), "org/m")]),
        ("a|b=m@1", [ModelArgument(("a", "b"), "m", "1")]),
        (" m , n@cpu ", [ModelArgument((), "m"), ModelArgument((), "n", "cpu")]),
        ("m@GPU-12ab", [ModelArgument((), "m", "GPU-12ab")]),
    ],
)
def test_models(text: str, expected: list[ModelArgument]) -> None:
    assert list(parse_models(text)) == expected


@pytest.mark.parametrize("text", ["a,", "=m", "a|=m", "m@", "a="])
def test_bad_models(text: str) -> None:
    with pytest.raises(ValueError, match="--models"):
        parse_models(text)


def test_gpus() -> None:
    assert parse_gpus("") == ()
    assert parse_gpus("2, 3") == ("2", "3")
    assert parse_gpus([0, "cpu"]) == ("0", "cpu")
    assert parse_gpus("cpu,cpu") == ("cpu", "cpu")
    for bad in ("cuda:0", "1,", "-1", "1,1"):
        with pytest.raises(ValueError, match="--gpus"):
            parse_gpus(bad)


def test_bytes() -> None:
    assert parse_bytes("800M") == 800 * 2**20
    assert parse_bytes("2.5GiB") == int(2.5 * 2**30)
    assert parse_bytes(17) == 17
    assert parse_bytes("4 kb") == 4096
    with pytest.raises(ValueError, match="memory"):
        parse_bytes("plenty")


def models(*gpus: str | None) -> tuple[ModelArgument, ...]:
    return tuple(ModelArgument((), f"m{i}", gpu) for i, gpu in enumerate(gpus))


@pytest.mark.parametrize(
    ("gpus", "devices", "expected"),
    [
        ((None, None), ("2", "3"), [(0, "2"), (1, "3")]),
        ((None,), ("0", "1", "2"), [(0, "0"), (0, "1"), (0, "2")]),
        ((None, None, None), ("0",), [(0, "0"), (1, "0"), (2, "0")]),
        ((None, None, None), ("0", "1"), [(0, "0"), (1, "1"), (2, "0")]),
        (("1", None), ("0", "1"), [(0, "1"), (1, "0")]),
        (("cpu",), ("cpu",), [(0, "cpu")]),
    ],
)
def test_place(
    gpus: tuple[str | None, ...], devices: tuple[str, ...], expected: list[tuple[int, str]]
) -> None:
    assert list(place(models(*gpus), devices)) == [Placement(*entry) for entry in expected]


def test_place_refuses_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="2 models and 3 GPUs"):
        place(models(None, None), ("0", "1", "2"))
    with pytest.raises(ValueError, match="not in --gpus 0"):
        place(models("1"), ("0",))


def test_open_addresses_need_a_key_or_the_word() -> None:
    with pytest.raises(ValueError, match="--api-key-file"):
        resolve(Options(host="0.0.0.0"))
    assert resolve(Options(host="0.0.0.0", insecure_no_auth=True)).http.host == "0.0.0.0"
    assert resolve(Options(host="::"), api_keys=key_digests("k")).http.host == "::"


def test_time_limits_fall_back() -> None:
    assert resolve(Options(), fallback_timeout_s=7).limits.request_timeout_s == 7
    assert resolve(Options(request_timeout=0.0), fallback_timeout_s=7).limits.request_timeout_s == 0


def test_engine_words_are_split_as_a_shell_does() -> None:
    command = resolve(Options(engine_command="python 'a b.py' --x")).engine.command
    assert command == ("python", "a b.py", "--x")
    with pytest.raises(ValueError, match="--engine-command"):
        resolve(Options(engine_command="'open"))


def test_keys() -> None:
    digests = key_digests("# mine\nsk-one\n\n  sk-two \n")
    assert len(digests) == 2
    assert key_matches(b"sk-one", digests)
    assert key_matches(b"sk-two", digests)
    assert not key_matches(b"sk-", digests)
    assert not key_matches(b"", ())
