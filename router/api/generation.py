"""What the generating routes share: the model, the prompt's tokens, the request's own data.

Owns nothing but references. Must not know the JSON of any route.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import msgspec
from starlette.types import Scope

from router.api.intake import SMALL_BYTES
from router.api.schemas import GenerationRequest, asks_for_structure, decode_body
from router.api.structured import Structured, grammar_of
from router.errors import BadRequest, ContextLengthExceeded
from router.flow import Flow, Job, Progress
from router.record import RequestRecord
from router.text.grammar import Make
from router.text.pool import TextPool
from router.text.served import ModelTable, ServedModel
from router.text.tool_forms import Tool, ToolForm, ToolUse

P = ParamSpec("P")
T = TypeVar("T")

# Keys of the ASGI scope, set by the boundary and by the key check.
RECORD: Final = "router.record"
TENANT: Final = "router.tenant"


MESSAGE_CHARS: Final = 50  # an empty message costs a template as much as so many characters


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request, made by the boundary."""
    record: RequestRecord = scope[RECORD]
    return record


def tenant_of(scope: Scope) -> bytes:
    """Whose request it is, where several keys are in use."""
    tenant: bytes = scope.get(TENANT, b"")
    return tenant


def salt_of(scope: Scope, request: GenerationRequest) -> bytes:
    """What keeps this request's cached prompts apart: the key's tenant, and the client's salt."""
    return tenant_of(scope) + (request.cache_salt or "").encode()


async def decode_apart(pool: TextPool, body: bytes, kind: type[T]) -> T:
    """One typed decode of a JSON body, in a thread if it is large; see `decode_body`."""
    if len(body) <= SMALL_BYTES:
        return decode_body(body, kind)
    return await pool.run(decode_body, body, kind)


def new_id(prefix: str) -> str:
    """A unique id for one answer."""
    return f"{prefix}-{secrets.token_hex(12)}"


class Grammars(Protocol):
    """Where grammars are made."""

    async def run(
        self, function: Callable[Concatenate[Make, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `function` gives with something that makes grammars. Off the event loop."""
        ...


class Generations:
    """The steps that chats and completions have in common, over one set of models."""

    def __init__(self, models: ModelTable, flow: Flow, pool: TextPool, grammars: Grammars) -> None:
        self._models = models
        self._flow = flow
        self._pool = pool
        self._grammars = grammars

    async def decode(self, body: bytes, kind: type[T]) -> T:
        """One typed decode of a JSON body; see `decode_body`."""
        return await decode_apart(self._pool, body, kind)

    async def apart(
        self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """A function's result, from a thread if its work goes over as many as `size` items."""
        return await self._pool.run_sized(size, function, *args, **kwargs)

    def model(self, name: str) -> ServedModel:
        """Where one model is served it needs no name. Raises ModelNotFound."""
        return self._models.find_or_only(name)

    def generating_model(self, name: str) -> ServedModel:
        """Raises ModelNotFound, and BadRequest for a model that makes embeddings only."""
        model = self._models.find(name)
        if not model.generates:
            raise BadRequest(
                f"The model '{name}' makes embeddings only; it works with /v1/embeddings.",
                param="model",
                code="unsupported_operation",
            )
        return model

    async def encode(
        self,
        model: ServedModel,
        prompts: Sequence[str | list[int]],
        *,
        add_special: bool,
        parse_special: bool = True,
    ) -> tuple[list[int], ...]:
        """Token ids of each prompt; token lists stay as they are. Raises ContextLengthExceeded.

        With `add_special` an encoder's are those that /v1/embeddings would use.
        """
        tokenizer = model.tokenizer
        for prompt in prompts:
            if isinstance(prompt, str):
                _refuse_endless(model, len(prompt), param="prompt")

        def ids_of(prompt: str | list[int]) -> list[int]:
            if not isinstance(prompt, str):
                return prompt
            if add_special and not model.generates:
                return tokenizer.encode_for_embedding(prompt)
            return tokenizer.encode(prompt, add_special=add_special, parse_special=parse_special)

        def work() -> tuple[list[int], ...]:
            return tuple(map(ids_of, prompts))

        num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await self._pool.run_sized(num_chars, work)

    async def render(
        self,
        model: ServedModel,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final: bool,
        kwargs: dict[str, Any],
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Template and tokenizer in one hop. Raises BadRequest, also when the template refuses."""
        template = model.template
        if template is None:
            raise BadRequest(
                f"The model '{model.name}' has no chat template; use /v1/completions.",
                param="messages",
                code="chat_template_missing",
            )

        num_chars = sum(map(_chars_of, messages))
        listed = [tool.listed() for tool in tools]
        num_chars += len(msgspec.json.encode(listed)) if listed else 0
        _refuse_endless(model, num_chars, param="messages")
        work_size = num_chars + MESSAGE_CHARS * len(messages)

        def work() -> list[int]:
            return template.render_tokens(
                messages,
                tools=listed,
                add_generation_prompt=add_generation_prompt,
                continue_final=continue_final,
                kwargs=kwargs,
                tokenizer=model.tokenizer,
            )

        return await self._pool.run_sized(work_size, work)

    def check_room(self, model: ServedModel, prompt: Sequence[int], *, param: str) -> None:
        """Raises ContextLengthExceeded unless one more token fits."""
        self._flow.check_room(model, len(prompt), param=param)

    def max_len(self, model: ServedModel) -> int:
        """Tokens that prompt and answer may have together, as of now."""
        return self._flow.max_len(model)

    async def structured(self, request: GenerationRequest) -> Structured | None:
        """The form that the answer is bound to. Raises BadRequest.

        Compiling a schema takes milliseconds to seconds: never on the event loop.
        """
        if not asks_for_structure(request):
            return None
        return await self._grammars.run(grammar_of, request)

    async def call_grammar(self, form: ToolForm, use: ToolUse) -> str:
        """That of the calls which this use of tools forces. Raises BadRequest."""
        return await self._grammars.run(form.call_grammar, use.tools, use.choice, use.parallel)

    def run(self, job: Job) -> AsyncGenerator[list[Progress], None]:
        """The life of the job; see `Flow.generate`."""
        return self._flow.generate(job)


def _chars_of(message: Mapping[str, Any]) -> int:
    """How much text a message holds, also in its calls and its thinking."""
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return len(message["content"]) + (len(msgspec.json.encode(more)) if more else 0)


def _refuse_endless(model: ServedModel, num_chars: int, *, param: str) -> None:
    """Refuses what cannot fit before it costs a thread seconds to tokenize."""
    if num_chars > model.max_chars:
        raise ContextLengthExceeded(
            f"The prompt is too long: this model's maximum context length is {model.max_len} "
            f"tokens, the prompt has {num_chars} characters, far more than can fit.",
            param=param,
        )
