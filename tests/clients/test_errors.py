"""What goes wrong reaches each client's user as the exception that its documentation promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.runs import LIMIT_S, Results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

Played = Callable[[str], Results]
OPENAI = ("openai 3", "openai 2", "openai 1")
BASED_ON_OPENAI = (
    *OPENAI,
    "openai for node",
    "langchain",
    "langchain with openai 2",
    "llama-index",
    "autogen",
)


def check(found: dict[str, Any], error: str, status: int | None, code: str | None) -> None:
    """The class or one above it, the status, the code; and nothing of the server's inside."""
    assert error in found["classes"], found
    assert (found["status"], found["code"]) == (status, code)
    assert "inner" not in found["message"]


@pytest.mark.parametrize("client", BASED_ON_OPENAI)
@pytest.mark.parametrize(
    ("case", "error", "status", "code"),
    [
        ("value", "BadRequestError", 400, "invalid_value"),
        ("length", "BadRequestError", 400, "context_length_exceeded"),
        ("key", "AuthenticationError", 401, "invalid_api_key"),
        ("model", "NotFoundError", 404, "model_not_found"),
        ("full", "InternalServerError", 503, "server_is_overloaded"),
        ("in_stream", "APIError", None, "internal_error"),
    ],
)
def test_classes_of_openai(
    played: Played, client: str, case: str, error: str, status: int | None, code: str
) -> None:
    check(played(client)["errors"][case], error, status, code)


@pytest.mark.parametrize("client", OPENAI)
def test_openai_knows_more(played: Played, client: str) -> None:
    errors = played(client)["errors"]
    assert [errors[case]["param"] for case in ("value", "streamed_value", "length", "model")] == [
        "temperature",
        "top_p",
        "messages",
        "model",
    ]
    check(errors["streamed_value"], "BadRequestError", 400, "invalid_value")
    check(errors["model_route"], "NotFoundError", 404, "model_not_found")
    check(errors["route"], "NotFoundError", 404, "not_found")
    check(errors["engine"], "InternalServerError", 500, "internal_error")
    assert int(errors["full"]["retry_after"]) >= 1


@pytest.mark.parametrize("client", ["langchain", "langchain with openai 2"])
def test_langchain_sees_that_the_context_is_too_small(played: Played, client: str) -> None:
    check(
        played(client)["errors"]["length"],
        "OpenAIContextOverflowError",
        400,
        "context_length_exceeded",
    )


@pytest.mark.parametrize(
    ("case", "error", "status"),
    [
        ("value", "BadRequestError", 400),
        ("length", "ContextWindowExceededError", 400),
        ("key", "AuthenticationError", 401),
        ("model", "NotFoundError", 404),
        ("full", "ServiceUnavailableError", 503),
        ("in_stream", "APIError", 500),
    ],
)
def test_classes_of_litellm(played: Played, case: str, error: str, status: int) -> None:
    check(played("litellm")["errors"][case], error, status, None)


@pytest.mark.parametrize(
    ("case", "error", "status", "kind"),
    [
        ("value", "BadRequestError", 400, "invalid_request_error"),
        ("length", "BadRequestError", 400, "invalid_request_error"),
        ("key", "AuthenticationError", 401, "authentication_error"),
        ("model", "NotFoundError", 404, "not_found_error"),
        ("engine", "InternalServerError", 500, "api_error"),
        ("in_stream", "APIStatusError", 200, "api_error"),
    ],
)
@pytest.mark.parametrize("client", ["anthropic 2", "anthropic 0"])
def test_classes_of_anthropic(
    played: Played, client: str, case: str, error: str, status: int, kind: str
) -> None:
    found = played(client)["errors"][case]
    check(found, error, status, None)
    assert found["type"] in (kind, None)  # before 2 it was in the body only
    assert kind in found["message"]


@pytest.mark.parametrize(
    ("client", "error"),
    [("anthropic 2", "ServiceUnavailableError"), ("anthropic 0", "InternalServerError")],
)
def test_no_room_in_anthropic(played: Played, client: str, error: str) -> None:
    found = played(client)["errors"]["full"]
    check(found, error, 503, None)
    assert "overloaded_error" in found["message"]
    assert int(found["retry_after"]) >= 1
