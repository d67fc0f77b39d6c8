"""The bodies of POST /v1/messages and /v1/messages/count_tokens.

Owns the field names and their types. Must not know what becomes of them (that is
`router.api.messages_input`). Fields of the chat route that this API lacks work here too, by the
names that they have there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from router.api.schemas import GenerationRequest


class ContentBlock(msgspec.Struct, frozen=True):
    """One block of a message's content; which members count depends on its type.

    `content`, which some hosted blocks use in other ways, is checked by hand, after the type.
    """

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: Any = None


class Message(msgspec.Struct, frozen=True):
    """One turn."""

    role: str
    content: str | list[ContentBlock]


class Thinking(msgspec.Struct, frozen=True):
    """`thinking`. Its budget is not enforced."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputConfig(msgspec.Struct, frozen=True):
    """`output_config`: effort, and the form that the answer is bound to."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class MessagesRequest(GenerationRequest, kw_only=True, frozen=True):
    """Body of both routes; only one of them needs `max_tokens`."""

    messages: list[Message]
    system: str | list[ContentBlock] | None = None
    stop_sequences: list[str] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
