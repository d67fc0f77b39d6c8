"""Everything that can go wrong in the router, and the one table to HTTP.

Owns the error tree, `error_body` and `anthropic_error`. Must not know Starlette, sockets or models.

    RouterError
      RequestError           answered to the client: status, type, code, param, Retry-After
        BadRequest             400 invalid_request_error
          ContextLengthExceeded  400 context_length_exceeded
        Unauthorized           401 invalid_api_key
        HostNotAllowed         403 host_not_allowed
        AdminOnly              403 admin_key_required
        ModelNotFound          404 model_not_found
        ReplicaNotFound        404 replica_not_found
        RouteNotFound          404 not_found
        MethodNotAllowed       405 method_not_allowed
        BodyTimeout            408 body_timeout
        Conflict               409 conflict
        PayloadTooLarge        413 request_too_large
        UnsupportedMediaType   415 unsupported_media_type
        RateLimited            429 slow_down
        HeadTooLarge           431 headers_too_large
        EngineFailed           500 internal_error
          Quarantined            500 request_quarantined
        Overloaded             503 server_is_overloaded
          InsufficientMemory     503 insufficient_memory
        ModelUnloaded          503 model_unloaded
        RequestTimeout         504 request_timeout
        ClientGone             499, never answered: there is nobody left to read it
          SlowClient             499 slow_client: it read too little of its answer
      GrammarError           what an answer should look like cannot be enforced; no field known yet
      StartError             command line, configuration, port, device: exit code and one sentence
"""

from __future__ import annotations

from typing import Any, Final

EXIT_OK: Final = 0
EXIT_USAGE: Final = 64  # the command line is wrong
EXIT_UNAVAILABLE: Final = 69  # port taken, device not there
EXIT_FATAL: Final = 70  # an engine failed for good
EXIT_NO_MEMORY: Final = 75  # the models do not fit
EXIT_CONFIG: Final = 78  # configuration file or model unusable

# Anthropic's error types; what is not listed is `api_error`.
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

MAX_MESSAGE_CHARS: Final = 2000  # keeps every error body under 8 KiB, also with 4-byte characters


class RouterError(Exception):
    """Root of the tree."""


class RequestError(RouterError):
    """One request fails, and its client is told so.

    `type`, `code` and `param` are OpenAI's fields of those names; `retry_after_s` becomes the
    Retry-After header.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str,
        code: str | None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(RequestError):
    """A field is missing, of the wrong type or out of range; `param` names it."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = "invalid_value"
    ) -> None:
        super().__init__(message, status=400, type="invalid_request_error", code=code, param=param)


class ContextLengthExceeded(BadRequest):
    """The prompt leaves no room for a single new token.

    `message` says "prompt is too long" and "this model's maximum context length is": langchain and
    litellm know the error by these words, not by its code.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class Unauthorized(RequestError):
    """No key, or none that we know."""

    def __init__(self, message: str = "Missing or incorrect API key.") -> None:
        super().__init__(
            message, status=401, type="authentication_error", code="invalid_api_key", param=None
        )


class HostNotAllowed(RequestError):
    """The Host header names somebody else."""

    def __init__(
        self,
        message: str = "This server does not answer under that name; its operator can allow names "
        "with --allowed-hosts.",
    ) -> None:
        super().__init__(
            message, status=403, type="permission_error", code="host_not_allowed", param=None
        )


class AdminOnly(RequestError):
    """An operator's route, and no operator."""

    def __init__(
        self,
        message: str = "Operator's routes need the admin key; the server's operator can set one "
        "with --admin-key-file FILE or ROUTER_ADMIN_KEY.",
    ) -> None:
        super().__init__(
            message, status=403, type="permission_error", code="admin_key_required", param=None
        )


class ReplicaNotFound(RequestError):
    """There is no replica of that number."""

    def __init__(
        self, message: str = "There is no such replica; GET /admin/replicas lists them."
    ) -> None:
        super().__init__(
            message, status=404, type="invalid_request_error", code="replica_not_found"
        )


class Conflict(RequestError):
    """What is asked for is not possible in the state that things are in."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=409, type="invalid_request_error", code="conflict")


class ModelNotFound(RequestError):
    """The model asked for is not one of those served."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            status=404,
            type="invalid_request_error",
            code="model_not_found",
            param="model",
        )


class RouteNotFound(RequestError):
    """No such path."""

    def __init__(self, message: str = "There is no such path on this server.") -> None:
        super().__init__(message, status=404, type="invalid_request_error", code="not_found")


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    def __init__(self, message: str = "This path does not take that method.") -> None:
        super().__init__(
            message, status=405, type="invalid_request_error", code="method_not_allowed"
        )


class BodyTimeout(RequestError):
    """The client took too long to send its body."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=408, type="timeout_error", code="body_timeout")


class RequestTimeout(RequestError):
    """The operator's time limit passed. The client was not slow: no 408."""

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(
            message,
            status=504,
            type="timeout_error",
            code="request_timeout",
            retry_after_s=retry_after_s,
        )


class PayloadTooLarge(RequestError):
    """The body, or one part of it, is larger than this server takes."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(
            message,
            status=413,
            type="invalid_request_error",
            code="request_too_large",
            param=param,
        )


class UnsupportedMediaType(RequestError):
    """The body is not JSON."""

    def __init__(self, message: str = "The body must be JSON (application/json).") -> None:
        super().__init__(
            message, status=415, type="invalid_request_error", code="unsupported_media_type"
        )


class HeadTooLarge(RequestError):
    """The request line and the headers are larger than this server takes."""

    def __init__(self, message: str = "The request's headers are too large.") -> None:
        super().__init__(
            message, status=431, type="invalid_request_error", code="headers_too_large"
        )


class RateLimited(RequestError):
    """This client alone asks for too much."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(
            message,
            status=429,
            type="rate_limit_error",
            code="slow_down",
            retry_after_s=max(1, retry_after_s),
        )


class EngineFailed(RequestError):
    """An engine ended this request with an error, or the router met a bug of its own."""

    def __init__(
        self,
        message: str = "The server could not finish this request.",
        *,
        code: str = "internal_error",
    ) -> None:
        super().__init__(message, status=500, type="server_error", code=code)


class Quarantined(EngineFailed):
    """Engines died of this prompt: it is not tried again, and refused for a while."""

    def __init__(
        self,
        message: str = "Engines stopped while working on this prompt; it is refused for some "
        "minutes.",
    ) -> None:
        super().__init__(message, code="request_quarantined")


class Overloaded(RequestError):
    """Queue full, model still loading, no live engine, or the server is stopping."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(
            message,
            status=503,
            type="server_error",
            code="server_is_overloaded",
            retry_after_s=max(1, retry_after_s),
        )


class ModelUnloaded(RequestError):
    """The operator took the model's engines away; only the operator brings them back."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            status=503,
            type="server_error",
            code="model_unloaded",
            param="model",
            retry_after_s=30,
        )


class InsufficientMemory(Overloaded):
    """Its engine found no memory for this request; the engine itself is well."""

    def __init__(
        self,
        message: str = "The engine has no memory left for this request: make it shorter, or try "
        "again when less is going on.",
    ) -> None:
        super().__init__(message)
        self.code = "insufficient_memory"


class ClientGone(RequestError):
    """The client hung up. For logs and counters only."""

    def __init__(self, message: str = "The client closed the connection.") -> None:
        super().__init__(message, status=499, type="client_error", code="client_gone")


class SlowClient(ClientGone):
    """The client does not read its answer, so its connection was ended. For logs and counters,
    and for the end of a stream that it may yet read."""

    def __init__(self, message: str = "The answer was not read, so it was given up.") -> None:
        super().__init__(message)
        self.code = "slow_client"


class GrammarError(RouterError):
    """A schema, pattern or grammar cannot be enforced: `message` is one sentence that says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class StartError(RouterError):
    """The command ends before it serves: `message` is one sentence that says what to do."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def error_body(
    error: RequestError,
) -> tuple[int, list[tuple[bytes, bytes]], dict[str, dict[str, str | None]]]:
    """Returns (status, extra headers, body) of the answer: all four keys of OpenAI's error object.

    The message is cut so that the body stays under 8 KiB.
    """
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    body = {
        "message": error.message[:MAX_MESSAGE_CHARS],
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return error.status, headers, {"error": body}


def anthropic_error(error: RequestError, request_id: str) -> dict[str, Any]:
    """The body of the same answer on Anthropic's routes; status and headers are `error_body`'s."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    told = {"type": kind, "message": error.message[:MAX_MESSAGE_CHARS]}
    return {"type": "error", "error": told, "request_id": request_id}
