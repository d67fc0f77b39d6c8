"""The messages of a request as a template reads them.

Owns the roles, the forms of content, and whether an answer opens a turn or goes on with one. Must
not know templates, engines or HTTP.
"""

from __future__ import annotations

from typing import Any, Final

from router.api.schemas import ChatMessage
from router.errors import BadRequest

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES: Final = 4096


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
