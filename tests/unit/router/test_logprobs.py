"""Names of tokens and shapes of log-probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from router.api.logprobs import (
    VERY_UNLIKELY,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    finite,
    joined,
    prompt_logprobs,
)
from router.streams import TokenLogprob
from router.text.assembly import Entry
from router.text.model import load_text
from tools.tiny_model import EOS_ID, FIRST_BYTE, encode_text, write_tiny_model

A, B = encode_text("ab")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> TokenNames:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = load_text(folder).tokenizer
    return TokenNames(tokenizer, tokenizer.pieces())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_json_cannot_hold(value: float) -> None:
    assert finite(value) == VERY_UNLIKELY
    assert finite(-1.5) == -1.5


def test_names(names: TokenNames) -> None:
    assert (names.text_of(A), names.bytes_of(A)) == ("a", b"a")
    assert (names.text_of(EOS_ID), names.bytes_of(EOS_ID)) == ("</s>", b"")
    byte = FIRST_BYTE + 0xF0
    assert (names.text_of(byte), names.bytes_of(byte)) == ("bytes:\\xf0", b"\xf0")
    assert names.bytes_of(10**6) == b""


def test_chat_shape(names: TokenNames) -> None:
    entry = Entry(A, TokenLogprob(-0.5, [(A, -0.5), (B, -math.inf)]), 0)
    told = chat_logprobs([entry], names)
    json.dumps(told, allow_nan=False)
    assert told["content"] == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "b", "logprob": VERY_UNLIKELY, "bytes": [98]},
            ],
        }
    ]


def test_completion_shape_and_echo(names: TokenNames) -> None:
    entry = Entry(B, TokenLogprob(-0.5, [(A, -0.25)]), 0)
    generated = completion_logprobs([entry], names, shift=1)
    prompt = encode_text("é")
    echoed = prompt_logprobs(prompt, [TokenLogprob(-1.0, [])], names)
    assert joined(echoed, generated) == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "b"],
        "token_logprobs": [None, -1.0, -0.5],
        "top_logprobs": [None, {"bytes:\\xa9": -1.0}, {"a": -0.25, "b": -0.5}],
        "text_offset": [0, 0, 1],
    }


def test_no_rival_hides_the_chosen_token(names: TokenNames) -> None:
    unknown = 10**6  # has the same (empty) name as its rival
    entry = Entry(unknown, TokenLogprob(-2.0, [(10**6 + 1, -0.1)]), 0)
    assert list(completion_logprobs([entry], names, 0)["top_logprobs"][0].values()) == [-2.0]
