"""The outermost ASGI application: what is common to all requests.

Owns the request id, the request's record with its one log line, and the only broad `except` of the
router: whatever escapes a route becomes one error answer or, after the first byte of a stream, one
error event. Must not know what routes do.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from router import logs
from router.api.failures import FAILURES, OPENAI, FailureForm
from router.api.generation import RECORD
from router.api.http import REPLY, SHARE, BodyRoom, Reply, header
from router.errors import (
    ClientGone,
    EngineFailed,
    MethodNotAllowed,
    RequestError,
    RouteNotFound,
    SlowClient,
    error_body,
)
from router.metrics import Metrics
from router.record import RequestRecord

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")  # others are replaced


class Boundary:
    """Runs `app` for each request; see the module's text."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._bodies = BodyRoom()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(
            request_id=_request_id(scope),
            started_s=time.monotonic(),
            created_s=int(time.time()),
        )
        scope[RECORD] = record
        scope["app"] = self  # Starlette's routes then raise HTTPException, and answer nothing
        if len(scope["path"]) > 1:
            scope["path"] = scope["path"].rstrip("/")  # no redirects: clients lose the body
        reply = scope[REPLY] = Reply(send, record.request_id)
        try:
            with self._bodies.share() as scope[SHARE]:
                await self._app(scope, receive, reply)
        except RequestError as error:
            await _fail(scope, reply, error)
        except HTTPException as error:
            known = MethodNotAllowed() if error.status_code == 405 else RouteNotFound()
            await _fail(scope, reply, known, error.headers)
        except Exception:
            fields = {"fields": {"request_id": record.request_id}}
            logging.getLogger("router").exception("bug", extra=fields)
            await _fail(scope, reply, EngineFailed())
        finally:
            record.status = record.status or reply.status or ClientGone().status
            self._end(scope["method"], record)

    def _end(self, method: str, record: RequestRecord) -> None:
        """The canonical line and the counters: once per request, however it ended."""
        self._metrics.requests.labels(record.model, record.route, str(record.status)).inc()
        if record.code:
            self._metrics.errors.labels(record.code).inc()
        level = logging.DEBUG if method in ("GET", "HEAD") else logging.INFO
        took_s = round(time.monotonic() - record.started_s, 6)
        logs.event(level, "request", **record.fields(), took_s=took_s)


async def _fail(
    scope: Scope,
    reply: Reply,
    error: RequestError,
    more_headers: Mapping[str, str] | None = None,
) -> None:
    record: RequestRecord = scope[RECORD]
    form: FailureForm = scope.get(FAILURES, OPENAI)
    record.code = error.code or ""
    record.status = reply.status or error.status
    if isinstance(error, ClientGone):
        record.status = error.status
        if not isinstance(error, SlowClient):  # that one may still read its end
            return
    if reply.status:
        if reply.is_stream:
            data = form.events(error, record.request_id)
            await reply({"type": "http.response.body", "body": data, "more_body": False})
        return
    status, headers, _ = error_body(error)
    data = msgspec.json.encode(form.body(error, record.request_id))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(data)),
        *headers,
        *((k.lower().encode(), v.encode()) for k, v in (more_headers or {}).items()),
    ]
    await reply({"type": "http.response.start", "status": status, "headers": headers})
    await reply({"type": "http.response.body", "body": data, "more_body": False})


def _request_id(scope: Scope) -> str:
    given = header(scope, b"x-request-id")
    return given if given and REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
