"""Which web pages may call this server: CORS, and the check of the Host header.

Owns both decisions. Must not know routes or keys. Nothing is allowed unless the operator says so:
a page of another origin cannot send JSON without a preflight, which nobody answers by default.
Cookies play no part here, so `Access-Control-Allow-Credentials` is never sent.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.http import header
from router.errors import HostNotAllowed

ANY: Final = "*"
_EXPOSED: Final = b"x-request-id, request-id, retry-after"
_METHODS: Final = b"GET, HEAD, POST"
_MAX_AGE_S: Final = b"600"
_HEADER_NAMES: Final = re.compile(r"[A-Za-z0-9-]+(?: ?, ?[A-Za-z0-9-]+){0,63}")

Headers = list[tuple[bytes, bytes]]


class Cors:
    """Around all else: preflights have no key, and failures too must be readable by the page."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = header(scope, b"origin") if scope["type"] == "http" else None
        if origin is None:
            await self._app(scope, receive, send)
            return
        allowed = self._allowing(origin)
        asks = header(scope, b"access-control-request-method")
        if allowed and scope["method"] == "OPTIONS" and asks is not None:
            await _answer_preflight(scope, send, allowed)
            return
        varies = [] if ANY in self._origins else [(b"vary", b"Origin")]

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [*allowed, *varies]
                if allowed:
                    more.append((b"access-control-expose-headers", _EXPOSED))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self._app(scope, receive, telling)

    def _allowing(self, origin: str) -> Headers:
        """The header that lets `origin` in, none if it is not let in."""
        if ANY in self._origins:
            return [(b"access-control-allow-origin", b"*")]
        if origin in self._origins:
            return [(b"access-control-allow-origin", origin.encode("latin-1"))]
        return []


async def _answer_preflight(scope: Scope, send: Send, allowed: Headers) -> None:
    asked = header(scope, b"access-control-request-headers") or ""
    headers: Headers = [
        *allowed,
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", _MAX_AGE_S),
        (b"vary", b"Origin, Access-Control-Request-Headers"),
    ]
    if _HEADER_NAMES.fullmatch(asked):
        headers.append((b"access-control-allow-headers", asked.encode("latin-1")))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def is_foreign_page(scope: Scope) -> bool:
    """Was it sent by a page of another origin? Browsers send a simple POST anywhere, unasked."""
    origin = header(scope, b"origin")
    return origin is not None and origin.partition("://")[2] != (header(scope, b"host") or "")


class HostCheck:
    """Whom a request may call this server. Without names, anything.

    A page can let its own name point to 127.0.0.1 and then talk to a server there as if it came
    from it (DNS rebinding), but its requests still carry that name. Addresses carry none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(name.lower() for name in names)

    def admit(self, scope: Scope) -> None:
        """Raises HostNotAllowed."""
        if not self._names or ANY in self._names:
            return
        for name, value in scope["headers"]:
            if name == b"host" and not self._knows(host_name(value.decode("latin-1"))):
                raise HostNotAllowed

    def _knows(self, name: str) -> bool:
        return name in self._names or name.endswith(".localhost") or _is_address(name)


def host_name(value: str) -> str:
    """A Host header without its port, in lower case; brackets of IPv6 are taken off."""
    value = value.strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
