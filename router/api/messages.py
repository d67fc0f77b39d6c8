"""Anthropic's POST /v1/messages and /v1/messages/count_tokens.

Owns the order of the steps from body to answer. Must not know the JSON of answers, engines or
admission.
"""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from router.api.answer import answer_gathered, answer_stream
from router.api.chats import Chats
from router.api.generation import Generations
from router.api.http import read_json_body, send_json, while_connected
from router.api.messages_answer import MessageForm
from router.api.messages_input import NAMES, chat_of
from router.api.messages_schema import MessagesRequest
from router.errors import BadRequest


class Messages:
    """Both routes over one set of models."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations
        self._chats = Chats(generations)

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/messages."""
        body = await read_json_body(scope, receive)
        await while_connected(scope, receive, self._create(scope, body, send))

    async def count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/messages/count_tokens: the prompt's size, nothing generated."""
        body = await read_json_body(scope, receive)
        await while_connected(scope, receive, self._count(body, send))

    async def _create(self, scope: Scope, body: bytes, send: Send) -> None:
        request = await self._generations.decode(body, MessagesRequest)
        if request.max_tokens is None:
            raise BadRequest("'max_tokens' is required.", param="max_tokens")
        model = self._generations.generating_model(request.model)
        with NAMES.applied():
            job = await self._chats.prepare(scope, chat_of(request), model)
        form = MessageForm(request, job)
        steps = self._generations.run(job)
        if request.stream:
            await answer_stream(send, steps, job, form)
        else:
            await answer_gathered(send, steps, form)

    async def _count(self, body: bytes, send: Send) -> None:
        request = await self._generations.decode(body, MessagesRequest)
        model = self._generations.generating_model(request.model)
        with NAMES.applied():
            num_tokens = await self._chats.count(chat_of(request), model)
        await send_json(send, {"input_tokens": num_tokens})
