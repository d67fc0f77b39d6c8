"""The routes that generate nothing: models, tokens, health, metrics, version.

Owns their JSON. Must not know engines' internals; what it shows it asks for at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Protocol
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

from router.api.conversation import adds_generation_prompt, template_messages
from router.api.failures import ANTHROPIC, FAILURES
from router.api.generation import Generations
from router.api.http import header, read_json_body, send_bytes, send_json, while_connected
from router.api.schemas import DetokenizeRequest, TokenizeRequest
from router.embed_flow import EmbedFlow
from router.errors import BadRequest, Overloaded
from router.flow import Flow
from router.metrics import CONTENT_TYPE, Metrics
from router.text.served import ModelTable, ServedModel
from router.text.tokenizer import Tokenizer
from router.text.tool_forms import tools_of

MAX_DETOKENIZE: Final = 1_000_000  # ids of one request
DISTRIBUTION: Final = "llm-router"


class Health(Protocol):
    """What the life cycle says of the whole server."""

    @property
    def started(self) -> bool:
        """Every model was ready once."""
        ...

    @property
    def ready(self) -> bool:
        """New requests are welcome."""
        ...


class Models:
    """GET /v1/models and /v1/models/{id}."""

    def __init__(
        self,
        models: ModelTable,
        flow: Flow,
        embed_flow: EmbedFlow,
        state_of: Callable[[ServedModel], str] | None = None,
    ) -> None:
        """`state_of` tells whether a model is loaded, where that can change."""
        self._models = models
        self._flow = flow
        self._embed_flow = embed_flow
        self._state_of = state_of

    async def list(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """All names; several names of one model are several entries."""
        named = [(name, model) for model in self._models.models for name in model.names]
        if _speaks_anthropic(scope):
            answer: dict[str, Any] = {
                "data": [_anthropic_entry(name, model) for name, model in named],
                "has_more": False,
                "first_id": named[0][0] if named else None,
                "last_id": named[-1][0] if named else None,
            }
        else:
            data = [self._entry(name, model) for name, model in named]
            answer = {"object": "list", "data": data}
        await send_json(send, answer)

    async def get(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """One of them. Raises ModelNotFound."""
        name: str = scope["path_params"]["name"]
        anthropic = _speaks_anthropic(scope)
        model = self._models.find(name)
        entry = _anthropic_entry(name, model) if anthropic else self._entry(name, model)
        await send_json(send, entry)

    def _entry(self, name: str, model: ServedModel) -> dict[str, Any]:
        limits = self._embed_flow.told_limits(model)
        entry: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": model.created_s,
            "owned_by": "router",
            "root": model.name,
            "parent": None,
            "max_model_len": self._flow.max_len(model),
            "capabilities": {
                "chat_completions": model.generates and model.template is not None,
                "completions": model.generates,
                "embeddings": not model.generates or (limits is not None and limits.size > 0),
            },
        }
        if self._state_of is not None:
            entry["state"] = self._state_of(model)
        if limits is not None and limits.size:
            entry["embeddings"] = {
                "dimensions": limits.size,
                "max_tokens": limits.max_len,
                "pooling": model.pooling.kind,
            }
        return entry


def _speaks_anthropic(scope: Scope) -> bool:
    """Anthropic's clients name the version of their API in every request; they read its errors."""
    if header(scope, b"anthropic-version") is None:
        return False
    scope[FAILURES] = ANTHROPIC
    return True


def _anthropic_entry(name: str, model: ServedModel) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.created_s, UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


class Tokens:
    """POST /tokenize and /detokenize and GET /tokenizer_info, in the form most servers share."""

    def __init__(self, generations: Generations, flow: Flow) -> None:
        self._generations = generations
        self._flow = flow

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ids of a text, or of a conversation as a chat route would render it."""
        body = await read_json_body(scope, receive)
        request = await self._generations.decode(body, TokenizeRequest)
        model = self._generations.model(request.model)
        tokens = await while_connected(scope, receive, self._tokens(request, model))
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": self._flow.max_len(model),
            "tokens": tokens,
        }
        if request.return_token_strs:
            answer["token_strs"] = await self._generations.apart(
                len(tokens), lambda: list(map(model.tokenizer.token_text, tokens))
            )
        await send_json(send, answer)

    async def info(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """What lm-eval asks for, of `?model=NAME` (not needed where one is served).

        The template is not told, only whether there is one: it may be the operator's own, and
        /tokenize renders with it.
        """
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("model", [""])
        model = self._generations.model(asked[0])
        tokenizer = model.tokenizer
        bos, ends = tokenizer.bos_id, tokenizer.eos_ids
        answer = {
            "model": model.name,
            "eos_token": tokenizer.token_text(ends[0]) if ends else None,
            "bos_token": None if bos is None else tokenizer.token_text(bos),
            "pad_token": None,
            "chat_template": None,
            "has_chat_template": model.template is not None,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": self._flow.max_len(model),
        }
        await send_json(send, answer)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The text of ids, control tokens by name."""
        body = await read_json_body(scope, receive)
        request = await self._generations.decode(body, DetokenizeRequest)
        tokenizer = self._generations.model(request.model).tokenizer
        tokens = request.tokens
        if len(tokens) > MAX_DETOKENIZE:
            raise BadRequest(f"'tokens' may hold at most {MAX_DETOKENIZE} ids.", param="tokens")
        text = await self._generations.apart(len(tokens), _text_of, tokens, tokenizer)
        await send_json(send, {"prompt": text})

    async def _tokens(self, request: TokenizeRequest, model: ServedModel) -> list[int]:
        if (request.prompt is None) == (request.messages is None):
            raise BadRequest("Give either 'prompt' or 'messages'.", param="prompt")
        if request.messages is not None:
            messages = template_messages(request.messages)
            return await self._generations.render(
                model,
                messages,
                add_generation_prompt=adds_generation_prompt(
                    request.messages, request.add_generation_prompt, request.continue_final_message
                ),
                continue_final=request.continue_final_message is True,
                kwargs=request.chat_template_kwargs or {},
                tools=tools_of(request.tools),
            )
        (tokens,) = await self._generations.encode(
            model,
            [request.prompt or ""],
            add_special=request.add_special_tokens is not False,
            parse_special=request.parse_special is not False,
        )
        return tokens


def _text_of(tokens: list[int], tokenizer: Tokenizer) -> str:
    """Control tokens by name. Raises BadRequest."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < tokenizer.vocab_size:
        raise BadRequest("'tokens' holds an id outside the vocabulary.", param="tokens")
    return tokenizer.decode(tokens, skip_special=False)


class Status:
    """GET /health…, /metrics and /version."""

    def __init__(self, health: Health, metrics: Metrics) -> None:
        self._health = health
        self._metrics = metrics

    async def live(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """200 as long as the event loop turns."""
        await send_json(send, {"status": "live"})

    async def ready(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """200 while new requests are welcome. Raises Overloaded otherwise."""
        if not self._health.ready:
            raise Overloaded("Not ready: models are loading, or the server is stopping.")
        await send_json(send, {"status": "ready"})

    async def started(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """200 once every model was ready. Raises Overloaded before."""
        if not self._health.started:
            raise Overloaded("Models are still loading.")
        await send_json(send, {"status": "started"})

    async def metrics(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Prometheus text."""
        await send_bytes(send, self._metrics.render(), CONTENT_TYPE.encode())

    async def version(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """The version of the installed distribution."""
        await send_json(send, {"version": installed_version()})


def installed_version() -> str:
    """Of the distribution; "unknown" in a checkout that was never installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
