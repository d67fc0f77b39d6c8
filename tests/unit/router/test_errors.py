"""The one table from errors to HTTP."""

from __future__ import annotations

import json

import pytest

from router import errors

CASES = [
    (errors.BadRequest("m", param="n"), 400, "invalid_value"),
    (errors.ContextLengthExceeded("m"), 400, "context_length_exceeded"),
    (errors.Unauthorized(), 401, "invalid_api_key"),
    (errors.ModelNotFound("m"), 404, "model_not_found"),
    (errors.RouteNotFound(), 404, "not_found"),
    (errors.MethodNotAllowed(), 405, "method_not_allowed"),
    (errors.BodyTimeout("m"), 408, "body_timeout"),
    (errors.RequestTimeout("m"), 504, "request_timeout"),
    (errors.PayloadTooLarge("m"), 413, "request_too_large"),
    (errors.UnsupportedMediaType(), 415, "unsupported_media_type"),
    (errors.RateLimited("m"), 429, "slow_down"),
    (errors.EngineFailed(), 500, "internal_error"),
    (errors.Quarantined(), 500, "request_quarantined"),
    (errors.Overloaded("m"), 503, "server_is_overloaded"),
    (errors.InsufficientMemory(), 503, "insufficient_memory"),
    (errors.ClientGone(), 499, "client_gone"),
    (errors.SlowClient(), 499, "slow_client"),
]


@pytest.mark.parametrize(("error", "status", "code"), CASES)
def test_every_error_has_its_row(error: errors.RequestError, status: int, code: str) -> None:
    got_status, headers, body = errors.error_body(error)
    assert got_status == status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    retry_after = dict(headers).get(b"retry-after")
    assert (retry_after is not None) == (status in (429, 503))
    assert retry_after is None or int(retry_after) >= 1


def test_retry_after_is_at_least_one() -> None:
    assert dict(errors.error_body(errors.Overloaded("m", retry_after_s=0))[1]) == {
        b"retry-after": b"1"
    }


def test_bodies_stay_small() -> None:
    body = errors.error_body(errors.BadRequest("🦀" * 100_000))[2]
    assert len(json.dumps(body, ensure_ascii=False).encode()) < 8192


@pytest.mark.parametrize(("error", "status", "_code"), CASES)
def test_anthropic_s_form(error: errors.RequestError, status: int, _code: str) -> None:
    body = errors.anthropic_error(error, "req-1")
    assert (body["type"], body["request_id"]) == ("error", "req-1")
    assert body["error"]["message"] == error.message
    kinds = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
    assert body["error"]["type"] == kinds.get(status, body["error"]["type"])
    assert (body["error"]["type"] == "api_error") == (status in (499, 500))
