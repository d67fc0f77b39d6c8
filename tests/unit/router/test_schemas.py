"""The typed decode of request bodies, and what a wrong one is told."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.schemas import (
    REFUSED,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    decode_body,
    refuse_unsupported,
)
from router.errors import BadRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
OPTIONAL = sorted(
    {field.name for field in msgspec.structs.fields(ChatRequest)} - {"model", "messages"}
)


def refusal(body: Any, kind: type = ChatRequest) -> BadRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(BadRequest) as caught:
        refuse_unsupported(decode_body(raw, kind))
    return caught.value


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"max_tokens": "5"}, "max_tokens", "must be an integer, not a string"),
        ({"max_tokens": 5.5}, "max_tokens", "must be an integer"),
        ({"n": True}, "n", "must be an integer"),
        ({"stream": "False"}, "stream", "must be true or false, not a string"),
        ({"temperature": "1"}, "temperature", "must be a number, not a string"),
        ({"stop": [1]}, "stop[0]", "must be a string"),
        ({"stop": 3}, "stop", "must be a string or a list"),
        ({"logit_bias": {"secret": "x"}}, "logit_bias", "must be"),
        ({"messages": "hi"}, "messages", "must be a list, not a string"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is required"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string or a list"),
        ({"model": None}, "model", "must be a string"),
    ],
)
def test_wrong_types_name_the_field(change: dict[str, Any], param: str, words: str) -> None:
    error = refusal({**CHAT, **change})
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert words in error.message
    assert not any(
        word in error.message for word in ("secret", "msgspec", "Request", "`", "$", "/")
    )


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_missing_fields(missing: str) -> None:
    error = refusal({key: value for key, value in CHAT.items() if key != missing})
    assert (error.param, error.message) == (missing, f"'{missing}' is required.")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'{"model": "m",',
        b'{"model":"m","messages":[],"temperature":NaN}',
        b'{"model":"m","messages":[],"temperature":Infinity}',
        b'{"model":"\\ud83d","messages":[]}',
        b'{"model":"\xff","messages":[]}',
        b'{"a":' + b"[" * 45_000,
        b'{"model":"m","prompt":' + b"[" * 45_000 + b"]" * 45_000 + b"}",
    ],
)
def test_what_is_no_json_is_a_400(raw: bytes) -> None:
    error = refusal(raw, CompletionRequest)
    assert (error.status, error.code) == (400, "invalid_json")


def test_a_number_beyond_all_range_names_its_field() -> None:
    assert refusal(b'{"model":"m","messages":[],"temperature":1e999}').param == "temperature"


@pytest.mark.parametrize("raw", [b"[]", b"null", b"123", b'"x"'])
def test_json_that_is_no_object(raw: bytes) -> None:
    assert refusal(raw).message == "The body must be a JSON object."


def test_null_means_absent_everywhere() -> None:
    nulls = json.dumps({**CHAT, **dict.fromkeys(OPTIONAL)}).encode()
    plain = json.dumps(CHAT).encode()
    assert decode_body(nulls, ChatRequest) == decode_body(plain, ChatRequest)
    refuse_unsupported(decode_body(nulls, ChatRequest))


def test_unknown_fields_are_ignored_at_every_level() -> None:
    body = {
        **CHAT,
        "foo": 1,
        "extra_body": {"top_k": 1},
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "stream_options": {"include_obfuscation": True},
        "messages": [{"role": "user", "content": "x", "id": 1, "metadata": {"_id": "x"}}],
    }
    refuse_unsupported(decode_body(json.dumps(body).encode(), ChatRequest))


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_do_not_do_is_refused_by_name(name: str) -> None:
    asked: dict[str, Any] = {
        "functions": [{}],
        "bad_words": ["x"],
        "allowed_token_ids": [1],
        "documents": [{}],
        "suffix": "x",
        "chat_template": "x",
        "use_beam_search": True,
    }
    error = refusal({**CHAT, name: asked.get(name, {"x": 1})})
    assert error.param == name
    assert name in error.message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_promises_we_cannot_keep(change: dict[str, Any], param: str) -> None:
    assert refusal({**CHAT, **change}).param == param


@pytest.mark.parametrize(
    "change",
    [
        {"functions": []},
        {"suffix": ""},
        {"use_beam_search": False},
        {"modalities": ["text"]},
    ],
)
def test_empty_wishes_are_no_wishes(change: dict[str, Any]) -> None:
    refuse_unsupported(decode_body(json.dumps({**CHAT, **change}).encode(), ChatRequest))


def test_every_refused_name_is_a_field() -> None:
    assert set(REFUSED) <= {field.name for field in msgspec.structs.fields(GenerationRequest)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(name=st.sampled_from([*OPTIONAL, "model", "messages"]), value=JSON)
def test_any_value_anywhere_is_accepted_or_a_clear_400(name: str, value: Any) -> None:
    raw = json.dumps({**CHAT, name: value}).encode()
    refused: BadRequest | None = None
    try:
        refuse_unsupported(decode_body(raw, ChatRequest))
    except BadRequest as error:
        refused = error
    if refused is not None:
        assert refused.message
        assert refused.param is None or refused.param.startswith(name)


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_a_clear_400(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        decode_body(raw, CompletionRequest)
