"""POST /v1/responses and /v1/responses/input_tokens, without memory between requests.

Owns the order of the steps from body to answer, and which input is dropped when truncation is
allowed. Must not know the JSON of answers, engines or admission.
"""

from __future__ import annotations

import msgspec
from starlette.types import Receive, Scope, Send

from router.api.answer import answer_gathered, answer_stream
from router.api.chats import Chats
from router.api.failures import FAILURES
from router.api.generation import Generations
from router.api.http import read_json_body, send_json, while_connected
from router.api.responses_answer import ResponseForm
from router.api.responses_input import NAMES, chat_of, wants_logprobs
from router.api.responses_schema import ResponsesRequest
from router.api.schemas import ChatMessage, ChatRequest
from router.errors import ContextLengthExceeded
from router.text.served import ServedModel


class Responses:
    """Both routes over one set of models."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations
        self._chats = Chats(generations)

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/responses."""
        body = await read_json_body(scope, receive)
        await while_connected(scope, receive, self._create(scope, body, send))

    async def count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/responses/input_tokens: the input's size, nothing generated."""
        body = await read_json_body(scope, receive)
        await while_connected(scope, receive, self._count(body, send))

    async def _create(self, scope: Scope, body: bytes, send: Send) -> None:
        request = await self._generations.decode(body, ResponsesRequest)
        model = self._generations.generating_model(request.model)
        with NAMES.applied():
            chat = chat_of(request)
            if request.truncation == "auto":
                chat = await self._fitting(chat, model)
            job = await self._chats.prepare(scope, chat, model)
        form = ResponseForm(request, job, logprobs=wants_logprobs(request))
        steps = self._generations.run(job)
        if request.stream:
            scope[FAILURES] = form
            await answer_stream(send, steps, job, form)
        else:
            await answer_gathered(send, steps, form)

    async def _count(self, body: bytes, send: Send) -> None:
        request = await self._generations.decode(body, ResponsesRequest)
        model = self._generations.generating_model(request.model)
        with NAMES.applied():
            num_tokens = await self._chats.count(chat_of(request), model)
        await send_json(send, {"object": "response.input_tokens", "input_tokens": num_tokens})

    async def _fitting(self, chat: ChatRequest, model: ServedModel) -> ChatRequest:
        """The longest end of the conversation that leaves room for an answer.

        It begins with a user's message, instructions stay before it. If not even the last one
        fits, that is for the caller to find.
        """
        head, starts = _openings(chat.messages)
        low, high = 0, len(starts) - 1

        def tail(number: int) -> ChatRequest:
            return _with(chat, head + chat.messages[starts[number] :])

        while low < high:
            middle = (low + high) // 2
            if await self._fits(tail(middle), model):
                high = middle
            else:
                low = middle + 1
        return tail(low) if starts else chat

    async def _fits(self, chat: ChatRequest, model: ServedModel) -> bool:
        try:
            return await self._chats.count(chat, model) < self._generations.max_len(model)
        except ContextLengthExceeded:
            return False


def _openings(messages: list[ChatMessage]) -> tuple[list[ChatMessage], list[int]]:
    """The instructions before everything else, and where what follows may begin."""
    num_head = 0
    while num_head < len(messages) and messages[num_head].role in ("system", "developer"):
        num_head += 1
    users = [i for i in range(num_head, len(messages)) if messages[i].role == "user"]
    return messages[:num_head], sorted({num_head, *users} if users else set())


def _with(chat: ChatRequest, messages: list[ChatMessage]) -> ChatRequest:
    return msgspec.structs.replace(chat, messages=messages)
