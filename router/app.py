"""The ASGI application: which path leads to which route, and who needs a key.

Owns the route table, which is also what /openapi.json tells, and nothing else. No logic: routes
live in `router.api`, requests in `router.flow`. Every path needs a key when keys are configured,
but those marked open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from starlette.routing import Router
from starlette.types import ASGIApp

from router.api import shapes
from router.api.admin import Health, Models, Status, Tokens, installed_version
from router.api.auth import AdminCheck, AnthropicRoute, GuardedRoute, KeyCheck, guarded
from router.api.boundary import Boundary
from router.api.chat import ChatCompletions
from router.api.completions import Completions
from router.api.embeddings import Embeddings
from router.api.fixed import Fixed, page
from router.api.generation import Generations, Grammars
from router.api.messages import Messages
from router.api.messages_schema import MessagesRequest
from router.api.models import Operator
from router.api.openapi import About, Operation, describe
from router.api.operator import ReplicaList, Replicas
from router.api.origins import Cors, HostCheck
from router.api.responses import Responses
from router.api.responses_schema import ResponsesRequest
from router.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from router.embed_flow import EmbedFlow
from router.flow import Flow
from router.metrics import Metrics
from router.operations import Operations, ReplicaRow
from router.text.pool import TextPool
from router.text.served import ModelTable


class Access(NamedTuple):
    """Who may call: SHA-256 digests of `keys` (none means open), web pages by their `origins`
    (none means none), and the `hosts` that requests may be addressed to (none means any).

    Who may operate: `admin_keys`, or without any key at all everybody if `admin_open`."""

    keys: tuple[bytes, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    admin_keys: tuple[bytes, ...] = ()
    admin_open: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes work with, ready made."""

    models: ModelTable
    flow: Flow
    embed_flow: EmbedFlow
    pool: TextPool
    grammars: Grammars
    metrics: Metrics
    health: Health
    access: Access = field(default_factory=Access)
    operator: Operator | None = None  # None: models do not change
    operations: Operations | None = None  # None: nobody operates the replicas


class Row(NamedTuple):
    """One line of the route table."""

    method: str
    path: str
    endpoint: ASGIApp
    about: About
    is_open: bool

    @property
    def is_admin(self) -> bool:
        """For operators: such a route is only ever written as one, see `_operating`."""
        return self.path.startswith("/admin/")


def get(path: str, endpoint: ASGIApp, about: About, *, is_open: bool = False) -> Row:
    """A row for GET and HEAD."""
    return Row("GET", path, endpoint, about, is_open)


def post(path: str, endpoint: ASGIApp, about: About) -> Row:
    """A row for POST."""
    return Row("POST", path, endpoint, about, is_open=False)


def build_app(parts: Parts) -> ASGIApp:
    """All routes behind the boundary."""
    generations = Generations(parts.models, parts.flow, parts.pool, parts.grammars)
    rows = [
        *_generating(parts, generations),
        *_asking(parts, generations),
        *_operating(parts),
        get("/docs", page("docs.html"), About("This server's routes.", media_type="text/html")),
    ]
    description = About("This description.")
    own = get("/openapi.json", Fixed(b"", b""), description)  # described before it is written
    access = parts.access
    operations = [
        Operation(row.method, row.path, row.about, _needs_key(row, access)) for row in [*rows, own]
    ]
    document = msgspec.json.encode(describe(operations, installed_version()))
    rows.append(get(own.path, Fixed(document, b"application/json"), description))
    check = KeyCheck(access.keys, HostCheck(access.hosts))
    admin = AdminCheck(access.admin_keys, check, is_open=access.admin_open)
    router = Router(
        routes=[
            (AnthropicRoute if row.about.anthropic else GuardedRoute)(
                row.path,
                row.endpoint,
                row.method,
                None if row.is_open else admin if row.is_admin else check,
            )
            for row in rows
        ],
        redirect_slashes=False,
    )
    router.default = guarded(router.not_found, check)
    boundary = Boundary(router, parts.metrics)
    return Cors(boundary, access.origins) if access.origins else boundary


def _needs_key(row: Row, access: Access) -> bool:
    if row.is_open:
        return False
    return bool(access.keys or (row.is_admin and access.admin_keys))


def _generating(parts: Parts, generations: Generations) -> list[Row]:
    embeddings = Embeddings(parts.models, parts.embed_flow, parts.pool)
    chat = About("Answer a chat.", ChatRequest, shapes.ChatAnswer, shapes.ChatChunk)
    complete = About(
        "Continue a text.", CompletionRequest, shapes.CompletionAnswer, shapes.CompletionAnswer
    )
    embed = About("Embed texts.", EmbeddingRequest, shapes.EmbeddingAnswer)
    return [
        post("/v1/chat/completions", ChatCompletions(generations), chat),
        post("/v1/completions", Completions(generations), complete),
        *_further(generations),
        post("/v1/embeddings", embeddings, embed),
        post("/v1/engines/{name:path}/embeddings", embeddings, embed),
    ]


def _further(generations: Generations) -> list[Row]:
    """Chats in the forms of two other APIs."""
    responses, messages = Responses(generations), Messages(generations)
    respond = About(
        "Answer a chat, told in items.", ResponsesRequest, shapes.Response, shapes.ResponseEvent
    )
    size = About("Tokens of such a request.", ResponsesRequest, shapes.ResponseInputTokens)
    say = About(
        "Answer a chat as Anthropic's API does.",
        MessagesRequest,
        shapes.Message,
        shapes.MessageEvent,
        anthropic=True,
        requires=("max_tokens",),
    )
    count = About(
        "Tokens of such a request.", MessagesRequest, shapes.MessageTokens, anthropic=True
    )
    return [
        post("/v1/responses", responses.create, respond),
        post("/v1/responses/input_tokens", responses.count, size),
        post("/v1/messages", messages.create, say),
        post("/v1/messages/count_tokens", messages.count, count),
    ]


def _asking(parts: Parts, generations: Generations) -> list[Row]:
    state_of = parts.operator.state_of if parts.operator else None
    models = Models(parts.models, parts.flow, parts.embed_flow, state_of)
    tokens = Tokens(generations, parts.flow)
    status = Status(parts.health, parts.metrics)
    all_models = About(
        "Models by all their names.",
        answer=shapes.ModelList,
        for_anthropic=shapes.AnthropicModelList,
    )
    one_model = About(
        "One model.", answer=shapes.ModelEntry, for_anthropic=shapes.AnthropicModel, errors=(404,)
    )
    info = About(
        "The tokens that frame a text.",
        answer=shapes.TokenizerInfo,
        errors=(404,),
        query=("model",),
    )
    tokenize = About("Token ids of a text or a chat.", TokenizeRequest, shapes.TokenizeAnswer)
    detokenize = About("The text of token ids.", DetokenizeRequest, shapes.DetokenizeAnswer)
    live = About("The server runs.", answer=shapes.StatusAnswer)
    ready = About("New requests are welcome.", answer=shapes.StatusAnswer, errors=(503,))
    started = About("Every model was ready once.", answer=shapes.StatusAnswer, errors=(503,))
    metrics = About("Figures for Prometheus.", media_type="text/plain")
    return [
        get("/v1/models", models.list, all_models),
        get("/v1/models/{name:path}", models.get, one_model),
        post("/tokenize", tokens.tokenize, tokenize),
        post("/detokenize", tokens.detokenize, detokenize),
        get("/tokenizer_info", tokens.info, info),
        get("/health", status.ready, ready, is_open=True),
        get("/health/live", status.live, live, is_open=True),
        get("/health/ready", status.ready, ready, is_open=True),
        get("/health/started", status.started, started, is_open=True),
        get("/metrics", status.metrics, metrics),
        get("/version", status.version, About("Its version.", answer=shapes.VersionAnswer)),
    ]


def _operating(parts: Parts) -> list[Row]:
    """What changes the server itself. Every path begins with /admin/, and only these do."""
    rows: list[Row] = []
    if (operator := parts.operator) is not None:
        every = About("Models with their engines.", answer=shapes.OperatedModels, errors=(403,))
        load = About("Load a model's engines.", answer=shapes.OperatedModel, errors=(403, 404, 503))
        unload = About(
            "Take a model's engines away.", answer=shapes.OperatedModel, errors=(403, 404)
        )
        reload = About("Read the configuration again.", answer=shapes.Reload, errors=(403,))
        rows += [
            get("/admin/models", operator.list, every),
            post("/admin/models/{name:path}/load", operator.load, load),
            post("/admin/models/{name:path}/unload", operator.unload, unload),
            post("/admin/reload", operator.reload, reload),
        ]
    if parts.operations is not None:
        replicas = Replicas(parts.operations)
        table = About("Replicas with their processes.", answer=ReplicaList, errors=(403,))
        drain = About(
            "Hand a replica's work over and stop it.", answer=ReplicaRow, errors=(403, 404, 409)
        )
        restart = About(
            "Hand a replica's work over and start it anew.",
            answer=ReplicaRow,
            errors=(403, 404, 409),
        )
        rows += [
            get("/admin/replicas", replicas.list, table),
            post("/admin/replicas/{id}/drain", replicas.drain, drain),
            post("/admin/replicas/{id}/restart", replicas.restart, restart),
        ]
    return rows
