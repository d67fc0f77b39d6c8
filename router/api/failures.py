"""How a failure is told, before and after the first byte.

Owns the forms that clients of the OpenAI and the Anthropic API read. Must not know what fails. A
route puts its own under FAILURES into the ASGI scope; the boundary asks it.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from router.api.sse import DONE, error_event, named_event
from router.errors import RequestError, anthropic_error, error_body

FAILURES: Final = "router.failures"  # key of the ASGI scope


class FailureForm(Protocol):
    """What the clients of one route read when a request fails."""

    def body(self, error: RequestError, request_id: str) -> dict[str, Any]:
        """The whole answer."""
        ...

    def events(self, error: RequestError, request_id: str) -> bytes:
        """The last events of a stream that breaks off."""
        ...


class OpenAIFailures:
    """Of all routes without another form."""

    def body(self, error: RequestError, _request_id: str) -> dict[str, Any]:
        return error_body(error)[2]

    def events(self, error: RequestError, _request_id: str) -> bytes:
        return error_event(error_body(error)[2]) + DONE


class AnthropicFailures:
    """Of /v1/messages and what is below it."""

    def body(self, error: RequestError, request_id: str) -> dict[str, Any]:
        return anthropic_error(error, request_id)

    def events(self, error: RequestError, request_id: str) -> bytes:
        return named_event("error", anthropic_error(error, request_id))


OPENAI: Final = OpenAIFailures()
ANTHROPIC: Final = AnthropicFailures()
