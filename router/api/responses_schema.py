"""The body of POST /v1/responses.

Owns the field names and their types. Must not know what becomes of them (that is
`router.api.responses_input`). Fields of the chat route that this API lacks work here too, by the
names that they have there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from router.api.schemas import GenerationRequest


class InputPart(msgspec.Struct, frozen=True):
    """One part of an item's content, summary or output."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, frozen=True):
    """One item of `input`. Without a type it is a message; which members count depends on it.

    Those that hosted items use in other ways are checked by hand, after the type.
    """

    type: str | None = None
    role: str | None = None
    content: Any = None
    summary: Any = None
    call_id: str | None = None
    name: str | None = None
    arguments: Any = None
    output: Any = None


class TextOptions(msgspec.Struct, frozen=True):
    """`text`: the form that the answer is bound to."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    """`reasoning`; whether it is summarized is not ours to choose."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(GenerationRequest, kw_only=True, frozen=True):
    """Body of POST /v1/responses and of /v1/responses/input_tokens.

    The members that need state on the server are read only to be refused.
    """

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
