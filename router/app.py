"""The ASGI application: which path leads to which route, and who needs a key.

Owns the route table and nothing else. No logic: routes live in `router.api`, requests in
`router.flow`. Every path needs a key when keys are configured, but those marked open.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.routing import Router
from starlette.types import ASGIApp

from router.api.admin import Health, Models, Status, Tokens
from router.api.auth import AnthropicRoute, GuardedRoute, KeyCheck, guarded
from router.api.boundary import Boundary
from router.api.chat import ChatCompletions
from router.api.completions import Completions
from router.api.embeddings import Embeddings
from router.api.generation import Generations
from router.api.messages import Messages
from router.api.responses import Responses
from router.embed_flow import EmbedFlow
from router.flow import Flow
from router.metrics import Metrics
from router.text.pool import TextPool
from router.text.served import ModelTable


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes work with, ready made. `keys` are SHA-256 digests; none means open."""

    models: ModelTable
    flow: Flow
    embed_flow: EmbedFlow
    pool: TextPool
    metrics: Metrics
    health: Health
    keys: tuple[bytes, ...] = ()


def build_app(parts: Parts) -> ASGIApp:
    """All routes behind the boundary."""
    check = KeyCheck(parts.keys)
    generations = Generations(parts.models, parts.flow, parts.pool)
    embeddings = Embeddings(parts.models, parts.embed_flow, parts.pool)
    responses = Responses(generations)
    messages = Messages(generations)
    models = Models(parts.models, parts.flow, parts.embed_flow)
    tokens = Tokens(generations, parts.flow)
    status = Status(parts.health, parts.metrics)

    def get(path: str, endpoint: ASGIApp, *, is_open: bool = False) -> GuardedRoute:
        return GuardedRoute(path, endpoint, "GET", None if is_open else check)

    def post(path: str, endpoint: ASGIApp) -> GuardedRoute:
        return GuardedRoute(path, endpoint, "POST", check)

    def anthropic(path: str, endpoint: ASGIApp) -> GuardedRoute:
        return AnthropicRoute(path, endpoint, "POST", check)

    router = Router(
        routes=[
            post("/v1/chat/completions", ChatCompletions(generations)),
            post("/v1/completions", Completions(generations)),
            post("/v1/responses", responses.create),
            post("/v1/responses/input_tokens", responses.count),
            anthropic("/v1/messages", messages.create),
            anthropic("/v1/messages/count_tokens", messages.count),
            post("/v1/embeddings", embeddings),
            post("/v1/engines/{name:path}/embeddings", embeddings),
            get("/v1/models", models.list),
            get("/v1/models/{name:path}", models.get),
            post("/tokenize", tokens.tokenize),
            post("/detokenize", tokens.detokenize),
            get("/health", status.ready, is_open=True),
            get("/health/live", status.live, is_open=True),
            get("/health/ready", status.ready, is_open=True),
            get("/health/started", status.started, is_open=True),
            get("/metrics", status.metrics),
            get("/version", status.version),
        ],
        redirect_slashes=False,
    )
    router.default = guarded(router.not_found, check)
    return Boundary(router, parts.metrics)
