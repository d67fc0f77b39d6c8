"""POST /v1/chat/completions.

Owns the JSON of chat answers. Must not know engines, admission or how a request becomes a job (that
is `router.api.chats`).
"""

from __future__ import annotations

from typing import Any

from starlette.types import Receive, Scope, Send

from router.api.answer import ChunkStream, WholeChoice, answer_stream, answer_whole
from router.api.chats import Chats
from router.api.generation import Generations, new_id
from router.api.http import read_json_body, while_connected
from router.api.logprobs import TokenNames, chat_logprobs, listed_prompt_logprobs
from router.api.schemas import ChatRequest
from router.api.sse import ChunkTemplate
from router.flow import First, Job, Progress
from router.text.assembly import FinishReason
from router.text.scanner import Delta


class ChatCompletions:
    """The route: one chat request from its body to its answer."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations
        self._chats = Chats(generations)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_body(scope, receive)
        await while_connected(scope, receive, self._answer(scope, body, send))

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        request = await self._generations.decode(body, ChatRequest)
        model = self._generations.generating_model(request.model)
        job = await self._chats.prepare(scope, request, model)
        form = ChatForm(request, job)
        steps = self._generations.run(job)
        if request.stream:
            options = request.stream_options
            include_usage = options is not None and options.include_usage is True
            stream = ChunkStream(form, job, include_usage=include_usage)
            await answer_stream(send, steps, job, stream)
        else:
            await answer_whole(send, steps, job, form)


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
        self._logprobs = request.logprobs is True
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

    def told(self, progress: Progress) -> list[dict[str, Any]]:
        """One chunk for each part of the answer that the piece touches (case 092)."""
        piece = progress.piece
        deltas = [_delta(delta) for delta in piece.deltas]
        if piece.text or not deltas:
            deltas.insert(0, {"content": piece.text})
        choices = [self._choice(progress.choice, delta) for delta in deltas]
        if piece.entries and self._logprobs:
            choices[0]["logprobs"] = chat_logprobs(piece.entries, self._names)
        if self._with_tokens:
            choices[0]["token_ids"] = piece.tokens
            for choice in choices[1:]:
                choice["token_ids"] = []
        return choices

    def last(self, index: int, finish: FinishReason) -> dict[str, Any]:
        return {**self._choice(index, {}), "finish_reason": finish}

    def whole(self, choices: list[WholeChoice], usage: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {**self._head}
        answer["choices"] = [self._whole_choice(i, choice) for i, choice in enumerate(choices)]
        answer["usage"] = usage
        if self._with_tokens:
            answer["prompt_token_ids"] = self._job.prompts[0]
        if self._job.sampling.prompt_logprobs >= 0:
            told = choices[0].first.prompt_logprobs or []
            answer["prompt_logprobs"] = listed_prompt_logprobs(
                self._job.prompts[0], told, self._names
            )
        return answer

    def _whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        whole: dict[str, Any] = {
            "index": index,
            "message": self._message(choice),
            "logprobs": None,
            "finish_reason": choice.finish,
        }
        if self._logprobs:
            whole["logprobs"] = chat_logprobs(choice.entries, self._names)
        if self._with_tokens:
            whole["token_ids"] = choice.tokens
        return whole

    def _message(self, choice: WholeChoice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        scan = self._job.rules.scan
        if scan is not None and scan.thinking is not None:
            message["reasoning_content"] = "".join(choice.reasoning) or None
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in choice.calls
            ]
        return message

    @staticmethod
    def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _delta(delta: Delta) -> dict[str, Any]:
    """A chunk's `delta`; id, type and name of a call only when it opens (case 072)."""
    match delta.kind:
        case "content":
            return {"content": delta.text}
        case "reasoning":
            return {"reasoning_content": delta.text}
        case "call":
            function = {"name": delta.name, "arguments": ""}
            call = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case "arguments":
            function = {"arguments": delta.text}
            return {"tool_calls": [{"index": delta.index, "function": function}]}
