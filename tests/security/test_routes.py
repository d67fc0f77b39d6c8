"""Every route of the running server is closed to strangers, however its path is written."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from router.app import Access
from tests.router_parts import MODEL, call, router_parts, text_play
from tests.router_process import RouterProcess

OPEN = ("/health", "/health/live", "/health/ready", "/health/started")

# Whoever adds a route writes it down here, and thinks of who may call it. What an operator does is
# under /admin and POST; there is nothing for resets, remote calls, weights or profiles.
ROUTES = """
GET /docs
GET /health
GET /health/live
GET /health/ready
GET /health/started
GET /metrics
GET /openapi.json
GET /tokenizer_info
GET /v1/models
GET /v1/models/{name}
GET /version
POST /detokenize
POST /tokenize
POST /v1/chat/completions
POST /v1/completions
POST /v1/embeddings
POST /v1/engines/{name}/embeddings
POST /v1/messages
POST /v1/messages/count_tokens
POST /v1/responses
POST /v1/responses/input_tokens
""".strip().splitlines()

ADMIN = """
GET /admin/models
GET /admin/replicas
POST /admin/models/{name}/load
POST /admin/models/{name}/unload
POST /admin/reload
POST /admin/replicas/{id}/drain
POST /admin/replicas/{id}/restart
""".strip().splitlines()

WEBSOCKET = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}
WRONG_KEYS: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Bearer "},
    {"authorization": "Basic c2stc2VjcmV0LW9uZTo="},
    {"authorization": "sk-secret-one"},
    {"x-api-key": "wrong"},
    {"x-api-key": "wrong", "authorization": "Bearer sk-secret-one"},
    {"cookie": "authorization=Bearer sk-secret-one"},
]
HOSTS = ("evil.example", "localhost/?x=/health", "/health/live", "x\thealth", "", "a" * 5000)


@pytest.fixture(scope="module")
def operations(router: RouterProcess) -> list[tuple[str, str]]:
    """(method, path) of every route, as the server itself tells them."""
    headers = {"authorization": "Bearer sk-secret-one"}
    answer = httpx.get(f"{router.url}/openapi.json", headers=headers, trust_env=False)
    paths: dict[str, dict[str, Any]] = answer.json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


@pytest.fixture
def connection(router: RouterProcess) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=60)
    yield connection
    connection.close()


def status(
    connection: http.client.HTTPConnection, method: str, target: str, headers: dict[str, str]
) -> int:
    """Of a request with exactly this target and these headers."""
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in {"host": "127.0.0.1", "content-length": "0", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.read()
    return answer.status


def test_s20_the_routes_are_those_that_are_written_down(operations: list[tuple[str, str]]) -> None:
    told = sorted(f"{method} {path}" for method, path in operations)
    assert [route for route in told if "/admin" not in route] == ROUTES
    assert {route for route in told if "/admin" in route} <= set(ADMIN)


def test_s4_every_route_asks_for_a_key(
    operations: list[tuple[str, str]], connection: http.client.HTTPConnection
) -> None:
    for _, path in operations:
        target = path.replace("{name}", "tiny").replace("{id}", "0")
        expected = (200, 405) if path in OPEN else (401,)
        for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"):
            for headers in WRONG_KEYS:
                got = status(connection, method, target, headers)
                assert got in expected, (method, target, headers)
        for host in HOSTS:
            assert status(connection, "GET", target, {"host": host}) in (*expected, 400), host
        assert status(connection, "GET", target, WEBSOCKET) in expected


def test_s4_no_spelling_of_a_path_gets_around_it(
    operations: list[tuple[str, str]], connection: http.client.HTTPConnection, router: RouterProcess
) -> None:
    for method, path in operations:
        target = path.replace("{name}", "tiny").replace("{id}", "0")
        if path in OPEN:
            continue
        for odd in (
            f"/{target}",
            f"{target}/",
            f"{target}//",
            f"{target}/..",
            f"/health/..{target}",
            f"/health/live/..{target}",
            f"/health/live/%2e%2e{target}",
            f"/./health{target}",
            target.replace("/", "/%2f", 1),
            target.replace("/", "%2f"),
            target.replace("/", "/;/"),
            target.replace("/", "\\"),
            f"/{target.upper()}",
            f"{target}?x=/health/live",
            f"{target};/health/live",
            f"{target}%00",
            f"{router.url}{target}",
            f"http://health{target}",
            f"/health/live/http://127.0.0.1{target}",
        ):
            for headers in ({}, {"x-api-key": "wrong"}, {"x-original-url": "/health/live"}):
                got = status(connection, method, odd, headers)
                assert got in (401, 400), (method, odd, headers)


async def test_s4_a_websocket_reaches_no_route(tmp_path: Path) -> None:
    """The server knows none; were one turned on, the routes would still refuse it."""
    async with router_parts(
        tmp_path, lambda _: text_play("x"), access=Access((b"0" * 32,))
    ) as all_:
        for path in ("/v1/chat/completions", "/health", "/v1/models"):
            sent: list[Any] = []

            async def receive() -> dict[str, Any]:
                return {"type": "websocket.connect"}

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            scope = {
                "type": "websocket",
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "root_path": "",
                "headers": [],
                "subprotocols": [],
            }
            await all_.app(scope, receive, send)
            assert [message["type"] for message in sent] == ["websocket.close"]
        assert (await call(all_.app, "GET", f"/v1/models/{MODEL}")).status == 401
