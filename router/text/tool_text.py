"""Tools and calls of a conversation, written out as text where a chat format has no place for them.

Owns the words. Must not know templates, tokens or HTTP. Models that were taught no calls are told
to write them as Hermes and Qwen do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec

from router.errors import BadRequest

Message = dict[str, Any]

_INTRODUCTION: Final = """You may call functions. Each line below describes one of them in JSON.
"""
_INSTRUCTION: Final = """
To call a function, write its name and its arguments as JSON between two tags, like this:
<tool_call>
{"name": "the name", "arguments": {"an argument": "its value"}}
</tool_call>
Write one such block for each call, and then stop. What the functions return comes in the next \
message, between <tool_response> and </tool_response>."""


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call in the history; `arguments` is an object, or a text where they were none."""

    name: str
    arguments: dict[str, Any] | str

    @property
    def json(self) -> str:
        """The arguments as JSON, or as what they are."""
        given = self.arguments
        return given if isinstance(given, str) else _json(given)


def past_calls(message: Mapping[str, Any], place: str) -> list[PastCall]:
    """The calls of an assistant's message. Raises BadRequest for what is none."""
    raw: Any = message.get("tool_calls") or []
    if not isinstance(raw, list):
        raise BadRequest(f"'{place}.tool_calls' must be a list.", param=f"{place}.tool_calls")
    entries: list[Any] = raw
    return [_past_call(entry, f"{place}.tool_calls[{i}]") for i, entry in enumerate(entries)]


def _past_call(raw: Any, place: str) -> PastCall:
    function: Any = raw.get("function") if isinstance(raw, Mapping) else None
    name: Any = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise BadRequest(
            f"'{place}' must be a call with the name of a function.", param=f"{place}.function"
        )
    arguments: Any = function.get("arguments")
    if isinstance(arguments, str):
        return PastCall(name, opened(arguments))
    if arguments is None or isinstance(arguments, dict):
        return PastCall(name, cast("dict[str, Any]", arguments or {}))
    raise BadRequest(
        f"'{place}.function.arguments' must be a string with JSON.",
        param=f"{place}.function.arguments",
    )


def opened(arguments: str) -> dict[str, Any] | str:
    """The object that a JSON text is of; the text itself if it is of none."""
    if not arguments.strip():
        return {}
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return arguments


def written_out(
    messages: Sequence[Message], tools: Sequence[Message] | None, *, system: bool
) -> list[Message]:
    """The conversation with tools, calls and results in plain messages of system, user, assistant.

    `tools` as OpenAI lists them. Without a `system` role they stand in the first user's message.
    Results that follow each other, and what the user says then, are one message of the user: many
    formats take users and assistants by turns only. Raises BadRequest.
    """
    result: list[Message] = []
    answering = False  # the last message holds results of calls
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
        if answering and role in ("tool", "user"):
            result[-1]["content"] += "\n" + content
        elif role == "tool":
            result.append({"role": "user", "content": content})
        else:
            calls = past_calls(message, f"messages[{i}]") if role == "assistant" else []
            texts = [content] if content else []
            texts += (_written(call) for call in calls)
            plain = {k: v for k, v in message.items() if k not in ("tool_calls", "tool_call_id")}
            result.append({**plain, "content": "\n".join(texts)})
        answering = role == "tool"
    if tools:
        _introduce(result, tools, "system" if system else "user")
    return result


def _introduce(messages: list[Message], tools: Sequence[Message], role: str) -> None:
    lines = [_json(tool["function"]) for tool in tools]
    text = "\n".join([_INTRODUCTION, *lines, _INSTRUCTION])
    first = messages[0] if messages else {"role": ""}
    if first["role"] == role or (role == "system" and first["role"] == "developer"):
        content = first["content"]
        parts = [content, text] if role == "system" else [text, content]
        messages[0] = {**first, "content": "\n\n".join(filter(None, parts))}
    else:
        messages.insert(0, {"role": role, "content": text})


def _written(call: PastCall) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {call.json}}}\n</tool_call>'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
