"""Keys: who may use a route.

Owns the check and the routes that carry it. Must not know what the routes do. The decision hangs
on the route object, never on a path in the request, so that no spelling of a path gets around it.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final, Protocol

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from router.api.failures import ANTHROPIC, FAILURES
from router.api.generation import TENANT, record_of
from router.api.http import REPLY, Reply
from router.api.origins import HostCheck, is_foreign_page
from router.config import key_matches
from router.errors import AdminOnly, Unauthorized

_SCHEME: Final = b"bearer "


class Check(Protocol):
    """Who may call."""

    def admit(self, scope: Scope) -> None:
        """Raises RequestError for those who may not."""
        ...


class KeyCheck:
    """Knows the digests of the keys. Without any, everybody may pass who calls us by our name."""

    def __init__(self, digests: tuple[bytes, ...], hosts: HostCheck) -> None:
        self._digests = digests
        self._hosts = hosts
        self._secret = secrets.token_bytes(32)  # engines see tenants, nothing to guess keys from

    @property
    def is_open(self) -> bool:
        """There are no keys."""
        return not self._digests

    def check_host(self, scope: Scope) -> None:
        """Raises HostNotAllowed."""
        self._hosts.admit(scope)

    def admit(self, scope: Scope) -> None:
        """Raises HostNotAllowed, Unauthorized.

        Where several keys exist, notes in the scope whose request it is.
        """
        self.check_host(scope)
        if not self._digests:
            return
        keys = _keys_of(scope)
        # Each is looked at: a wrong key must not pass beside a right one.
        known = [key_matches(key, self._digests) for key in keys]
        if not keys or not all(known):
            raise Unauthorized
        if len(self._digests) > 1:  # one tenant's cached prompts must not speed up another's
            scope[TENANT] = hashlib.blake2b(keys[0], key=self._secret, digest_size=16).digest()


class AdminCheck:
    """Who may operate the server.

    Where an admin key exists, it alone opens; without one, nobody may but those at a server that
    is open to its own machine only. An admin key opens nothing else: whoever watches over engines
    need not be able to spend tokens, and a key that two files hold opens both.
    """

    def __init__(self, digests: tuple[bytes, ...], clients: KeyCheck, *, is_open: bool) -> None:
        self._digests = digests
        self._clients = clients
        self._is_open = is_open and not digests and clients.is_open

    def admit(self, scope: Scope) -> None:
        """Raises HostNotAllowed, Unauthorized, AdminOnly."""
        keys = _keys_of(scope)
        known = [key_matches(key, self._digests) for key in keys]
        if keys and all(known):
            self._clients.check_host(scope)
            return
        self._clients.admit(scope)  # a stranger learns no more here than elsewhere
        if self._digests and self._clients.is_open:
            raise Unauthorized("Missing or incorrect admin key.")
        if not self._is_open or is_foreign_page(scope):
            raise AdminOnly


def _keys_of(scope: Scope) -> list[bytes]:
    """The keys that a request carries: OpenAI's clients send a bearer, Anthropic's older ones
    x-api-key. An Authorization that is no bearer counts as a key, and matches none."""
    keys: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            is_bearer = value[: len(_SCHEME)].lower() == _SCHEME
            keys.append(value[len(_SCHEME) :].strip() if is_bearer else b"")
        elif name == b"x-api-key":
            keys.append(value.strip())
    return keys


class GuardedRoute(Route):
    """A route that checks who calls before anything else, also before refusing a method."""

    def __init__(self, path: str, endpoint: ASGIApp, method: str, check: Check | None) -> None:
        super().__init__(path, _Endpoint(endpoint), methods=[method])
        self._check = check

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the check and the endpoint raise."""
        record_of(scope).route = self.path
        if self._check is not None:
            self._check.admit(scope)
        await super().handle(scope, receive, send)


class AnthropicRoute(GuardedRoute):
    """One whose clients read Anthropic's errors, also that of a wrong key."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what `GuardedRoute.handle` raises."""
        reply: Reply = scope[REPLY]
        reply.id_headers = (*reply.id_headers, b"request-id")
        scope[FAILURES] = ANTHROPIC
        await super().handle(scope, receive, send)


class _Endpoint:
    """Hides that an endpoint is a method: Starlette would call that with a Request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def guarded(app: ASGIApp, check: Check) -> ASGIApp:
    """The same app behind the check: for paths that no route knows."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            check.admit(scope)
        await app(scope, receive, send)

    return checked
