"""POST /v1/chat/completions.

Owns the checks of a conversation and the JSON of chat answers. Must not know engines, admission or
how templates are rendered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from router.api.answer import WholeChoice, answer_stream, answer_whole
from router.api.generation import Generations, new_id, record_of, salt_of, tenant_of
from router.api.http import read_json_body, while_connected
from router.api.logprobs import TokenNames, chat_logprobs
from router.api.options import (
    MAX_LOGPROBS,
    check_ranges,
    sampling_of,
    text_rules_of,
    wanted_tokens,
)
from router.api.schemas import ChatMessage, ChatRequest, decode_body, refuse_unsupported
from router.api.sse import ChunkTemplate
from router.errors import BadRequest
from router.flow import First, Job, Progress
from router.text.assembly import FinishReason
from router.text.served import ServedModel

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES: Final = 4096


class ChatCompletions:
    """The route: one chat request from its body to its answer."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_body(scope, receive)
        await while_connected(scope, receive, self._answer(scope, body, send))

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        request = decode_body(body, ChatRequest)
        model = self._generations.generating_model(request.model)
        job = await self._prepare(scope, request, model)
        form = ChatForm(request, job)
        steps = self._generations.run(job)
        if request.stream:
            options = request.stream_options
            include_usage = options is not None and options.include_usage is True
            await answer_stream(send, steps, job, form, include_usage=include_usage)
        else:
            await answer_whole(send, steps, job, form)

    async def _prepare(self, scope: Scope, request: ChatRequest, model: ServedModel) -> Job:
        """Everything that can be refused is refused here. Raises RequestError."""
        refuse_unsupported(request)
        check_ranges(request)
        logprobs = _num_logprobs(request)
        max_new = wanted_tokens(request.max_tokens, "max_tokens")
        if request.max_completion_tokens is not None:
            max_new = wanted_tokens(request.max_completion_tokens, "max_completion_tokens")
        continues = request.continue_final_message is True
        rules = text_rules_of(request, model, logprobs=logprobs >= 0, continues=continues)
        if model.template is not None and model.template.opens_line and not continues:
            rules = replace(rules, strip_lines=True)
        sampling = sampling_of(request, model, logprobs=logprobs)
        prompt = await self._generations.render(
            model,
            template_messages(request.messages),
            add_generation_prompt=adds_generation_prompt(
                request.messages, request.add_generation_prompt, request.continue_final_message
            ),
            continue_final=continues,
            kwargs=request.chat_template_kwargs or {},
        )
        self._generations.check_room(model, prompt, param="messages")
        return Job(
            record=record_of(scope),
            model=model,
            prompts=(prompt,),
            max_new=max_new,
            sampling=sampling,
            rules=rules,
            n=request.n or 1,
            salt=salt_of(scope, request),
            priority=request.priority or 0,
            tenant=tenant_of(scope),
        )


class ChatForm:
    """The JSON of one chat answer."""

    def __init__(self, request: ChatRequest, job: Job) -> None:
        self._head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": job.record.created_s,
            "model": request.model,
            "system_fingerprint": job.model.fingerprint,
        }
        self._job = job
        self._names = TokenNames(job.model.tokenizer, job.rules.pieces)
        self._with_tokens = request.return_token_ids is True

    def chunks(self, *, include_usage: bool) -> ChunkTemplate:
        return ChunkTemplate(
            {**self._head, "object": "chat.completion.chunk"},
            self._job.num_choices,
            opening=b'"delta":{"content":',
            closing=b"}",
            include_usage=include_usage,
        )

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._choice(index, {"role": "assistant", "content": ""})

    def first(self, index: int, _first: First) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if not self._with_tokens or index > 0:
            return None
        return self._choice(index, {}), {"prompt_token_ids": self._job.prompts[0]}

    @property
    def tells_tokens(self) -> bool:
        return self._with_tokens

    def chunk(self, progress: Progress) -> dict[str, Any]:
        piece = progress.piece
        choice = self._choice(progress.choice, {"content": piece.text})
        if piece.entries:
            choice["logprobs"] = chat_logprobs(piece.entries, self._names)
        if self._with_tokens:
            choice["token_ids"] = piece.tokens
        return choice

    def last(self, index: int, finish: FinishReason) -> dict[str, Any]:
        return {**self._choice(index, {}), "finish_reason": finish}

    def whole(self, choices: list[WholeChoice], usage: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {**self._head}
        answer["choices"] = [self._whole_choice(choice) for choice in choices]
        answer["usage"] = usage
        if self._with_tokens:
            answer["prompt_token_ids"] = self._job.prompts[0]
        return answer

    def _whole_choice(self, choice: WholeChoice) -> dict[str, Any]:
        whole: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish,
        }
        if self._job.rules.logprobs:
            whole["logprobs"] = chat_logprobs(choice.entries, self._names)
        if self._with_tokens:
            whole["token_ids"] = choice.tokens
        return whole

    @staticmethod
    def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """What a template reads. Text parts are joined with line breaks. Raises BadRequest."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise BadRequest(f"'messages' must hold 1 to {MAX_MESSAGES} messages.", param="messages")
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: ChatMessage, place: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise BadRequest(
            f"'{place}.role' must be one of: {', '.join(ROLES)}.", param=f"{place}.role"
        )
    content = message.content
    if content is None and message.role != "assistant":
        raise BadRequest(f"'{place}.content' is required.", param=f"{place}.content")
    if isinstance(content, list):
        texts: list[str] = []
        for i, part in enumerate(content):
            if part.type not in ("text", "input_text") or part.text is None:
                raise BadRequest(
                    "Only content parts of type 'text' are supported by this model.",
                    param=f"{place}.content[{i}].type",
                )
            texts.append(part.text)
        content = "\n".join(texts)
    rendered: dict[str, Any] = {"role": message.role, "content": content or ""}
    for name in ("name", "tool_calls", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            rendered[name] = value
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        rendered["reasoning_content"] = reasoning
    return rendered


def adds_generation_prompt(
    messages: list[ChatMessage], add: bool | None, continue_final: bool | None
) -> bool:
    """Whether a new assistant turn is opened. Raises BadRequest when the switches disagree."""
    if not continue_final:
        return add is not False
    if add:
        raise BadRequest(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.",
            param="continue_final_message",
        )
    if messages[-1].role != "assistant":
        raise BadRequest(
            "'continue_final_message' needs an assistant message at the end.",
            param="continue_final_message",
        )
    return False


def _num_logprobs(request: ChatRequest) -> int:
    """-1 none, else how many rivals of each token are wanted. Raises BadRequest."""
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise BadRequest(
            f"'top_logprobs' must be between 0 and {MAX_LOGPROBS}.", param="top_logprobs"
        )
    if not request.logprobs:
        if top:
            raise BadRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        return -1
    return top or 0
