"""From the body of POST /v1/messages to a chat request.

Owns what becomes of each kind of block, tool and option. Must not know templates, engines or HTTP.
Blocks and tools that Anthropic's own servers would act on are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from router.api.field_names import FieldNames
from router.api.messages_schema import ContentBlock, Message, MessagesRequest, Thinking
from router.api.refusals import needed_text, unsupported
from router.api.schemas import ChatMessage, ChatRequest, GenerationRequest
from router.api.turns import Turns
from router.errors import BadRequest

ROLES: Final = ("user", "assistant", "system")
EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
MAX_MESSAGES: Final = 8192

# How a chat's fields are called here.
NAMES: Final = FieldNames(
    [
        (r"messages(\[\d+\].*)?", "messages"),
        (r"stop", "stop_sequences"),
        (r"response_format\.json_schema", "output_config.format"),
        (r"response_format", "output_config.format"),
        (r"tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
        (r"tools\[(\d+)\]\.function", r"tools[\1]"),
        (r"tool_choice\.function", "tool_choice"),
    ]
)


def chat_of(request: MessagesRequest) -> ChatRequest:
    """The same request as a chat. Raises BadRequest."""
    for name in ("n", "best_of"):
        if getattr(request, name) not in (None, 1):
            raise BadRequest(f"'{name}' is not supported: there is one answer.", param=name)
    messages = _messages(request)
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or [])]
    choice, parallel = _tool_choice(request.tool_choice)
    fields = {
        field.name: getattr(request, field.name)
        for field in msgspec.structs.fields(GenerationRequest)
    }
    fields |= {
        "messages": messages,
        "tools": tools or None,
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "include_reasoning": request.thinking is None or request.thinking.display != "omitted",
        "chat_template_kwargs": _template_kwargs(request),
        # An answer goes on with the assistant's last words, if those are the last ones.
        "continue_final_message": messages[-1].role == "assistant",
    }
    if request.stop_sequences:
        fields["stop"] = request.stop_sequences
    form = request.output_config.format if request.output_config else None
    if form is not None:
        fields["response_format"] = _response_format(form)
    return ChatRequest(**fields)


# -- messages


def _messages(request: MessagesRequest) -> list[ChatMessage]:
    if not 1 <= len(request.messages) <= MAX_MESSAGES:
        raise BadRequest(f"'messages' must hold 1 to {MAX_MESSAGES} messages.", param="messages")
    turns = Turns(joins_users=True)
    if request.system:
        turns.say("system", _texts(request.system, "system"))
    for i, message in enumerate(request.messages):
        _add_message(turns, message, f"messages[{i}]")
    messages = turns.messages
    if not messages:
        raise BadRequest("'messages' holds nothing that can be answered.", param="messages")
    if messages[-1].tool_calls:
        raise BadRequest(
            "The last message calls a tool: its 'tool_result' must follow.", param="messages"
        )
    return messages


def _add_message(turns: Turns, message: Message, place: str) -> None:
    role, content = message.role, message.content
    if role not in ROLES:
        raise BadRequest(
            f"'{place}.role' must be one of: {', '.join(ROLES)}.", param=f"{place}.role"
        )
    if isinstance(content, str):
        turns.say(role, [content])
        return
    if not content:
        raise BadRequest(f"'{place}.content' must not be empty.", param=f"{place}.content")
    for i, block in enumerate(content):
        _add_block(turns, role, block, f"{place}.content[{i}]")


def _add_block(turns: Turns, role: str, block: ContentBlock, place: str) -> None:
    match (role, block.type):
        case (_, "text"):
            turns.say(role, [needed_text(block.text, f"{place}.text")])
        case ("assistant", "thinking"):
            turns.think(block.thinking or "")
        case ("assistant", "redacted_thinking"):
            pass  # nobody here can read it
        case ("assistant", "tool_use"):
            arguments = _arguments(block.input, f"{place}.input")
            name = needed_text(block.name, f"{place}.name")
            turns.call(needed_text(block.id, f"{place}.id"), name, arguments)
        case ("user", "tool_result"):
            told = [] if block.content is None else _result(block.content, f"{place}.content")
            turns.result(needed_text(block.tool_use_id, f"{place}.tool_use_id"), "\n".join(told))
        case _:
            raise unsupported("Content blocks", block.type, f"{place}.type")


def _result(content: Any, place: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    try:
        blocks = msgspec.convert(content, list[ContentBlock])
    except msgspec.ValidationError as error:
        raise BadRequest(
            f"'{place}' must be a string or a list of content blocks.", param=place
        ) from error
    return _texts(blocks, place)


def _texts(content: str | list[ContentBlock], place: str) -> list[str]:
    """The texts of a string or of text blocks. Raises BadRequest."""
    if isinstance(content, str):
        return [content]
    texts: list[str] = []
    for i, block in enumerate(content):
        if block.type != "text":
            raise unsupported("Content blocks", block.type, f"{place}[{i}].type")
        texts.append(needed_text(block.text, f"{place}[{i}].text"))
    return texts


def _arguments(value: Any, place: str) -> str:
    """A call's input as JSON text."""
    if not isinstance(value, dict):
        raise BadRequest(f"'{place}' must be an object.", param=place)
    return msgspec.json.encode(value).decode()


# -- tools, thinking, format


def _tool(tool: Any, place: str) -> dict[str, Any]:
    """One tool in a chat's form. What it holds is checked there."""
    if not isinstance(tool, dict):
        raise BadRequest(f"'{place}' must be an object.", param=place)
    given: Mapping[str, Any] = tool
    kind = given.get("type")
    if kind not in (None, "custom"):
        raise unsupported("Tools", kind, f"{place}.type")
    function = {key: given[key] for key in ("name", "description", "strict") if key in given}
    if "input_schema" in given:
        function["parameters"] = given["input_schema"]
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> tuple[Any, bool]:
    """The choice in a chat's form, and whether several calls may be made at once."""
    if choice is None:
        return None, True
    if not isinstance(choice, dict):
        raise BadRequest("'tool_choice' must be an object.", param="tool_choice")
    given: Mapping[str, Any] = choice
    parallel = given.get("disable_parallel_tool_use") is not True
    kind = given.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": given.get("name")}}, parallel
    if not isinstance(kind, str) or kind not in CHOICES:
        raise BadRequest(
            "'tool_choice.type' must be one of: auto, any, tool, none.", param="tool_choice.type"
        )
    return CHOICES[kind], parallel


def _template_kwargs(request: MessagesRequest) -> dict[str, Any]:
    """Variables of the template. Without `thinking` the model does as it is used to."""
    kwargs: dict[str, Any] = {}
    if request.thinking is not None:
        kwargs["enable_thinking"] = _thinks(request.thinking)
    effort = request.output_config.effort if request.output_config else None
    if effort is not None:
        if effort not in EFFORTS:
            raise BadRequest(
                f"'output_config.effort' must be one of: {', '.join(EFFORTS)}.",
                param="output_config.effort",
            )
        kwargs["reasoning_effort"] = effort
    return {**kwargs, **(request.chat_template_kwargs or {})}


def _thinks(thinking: Thinking) -> bool:
    if thinking.type not in ("enabled", "adaptive", "between_tools", "disabled"):
        raise BadRequest(
            "'thinking.type' must be 'enabled', 'adaptive', 'between_tools' or 'disabled'.",
            param="thinking.type",
        )
    return thinking.type != "disabled"


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema":
        raise BadRequest(
            "'output_config.format.type' must be 'json_schema'.", param="output_config.format.type"
        )
    return {
        "type": "json_schema",
        "json_schema": {"name": "output", "schema": form.get("schema"), "strict": True},
    }
