"""The chat format of ChatGLM3 and GLM-4, whose roles are control tokens.

Owns how a conversation, its tools and its calls become parts. Must not know files or which model
uses it. Checked against the models' own programs: tests/golden/tokenizer-chatglm3, -glm4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from router.text.tokenizer import Tokenizer
from router.text.tool_text import Message, PastCall, past_calls

# The words that the models were taught with.
_CHATGLM3_TOOLS: Final = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)
_GLM4_TOOLS: Final = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
_GLM4_HOW: Final = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "observation",
}


class _Part(NamedTuple):
    """A message as the model sees it: `line` is the name of the function that is called."""

    role: str
    line: str
    text: str


class RoleFormat:
    """A role's control token, a line and the text, each encoded alone.

    GLM-4 leaves out messages without text, ChatGLM3 keeps them. Variables of the client have no
    meaning here.
    """

    opens_line = True
    reasoning_parser = ""

    def __init__(self, kind: Literal["chatglm3", "glm-4"]) -> None:
        self.tool_parser: str = kind
        self._glm4 = kind == "glm-4"

    def render_tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        add_generation_prompt: bool,
        continue_final: bool,
        kwargs: Mapping[str, Any],  # noqa: ARG002 - part of the protocol
        tokenizer: Tokenizer,
    ) -> list[int]:
        """See `ChatFormat`. Raises `BadRequest` for calls in the history that are none."""
        ids_of = {tokenizer.token_text(token): token for token in tokenizer.special_ids}
        ids = list(tokenizer.prefix_ids)
        parts = self._parts(messages, tools)
        for i, part in enumerate(parts):
            last = continue_final and i == len(parts) - 1
            if part.text or part.line or last or not self._glm4:
                ids.append(ids_of[f"<|{part.role}|>"])
                for text in (part.line + "\n", part.text):
                    ids += tokenizer.encode(text, add_special=False, parse_special=False)
        return [*ids, ids_of["<|assistant|>"]] if add_generation_prompt else ids

    def _parts(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> list[_Part]:
        parts: list[_Part] = []
        for i, message in enumerate(messages):
            role, text = _ROLES[message["role"]], message["content"] or ""
            calls = past_calls(message, f"messages[{i}]") if role == "assistant" else []
            if text or not calls:
                parts.append(_Part(role, "", text))
            parts += (_Part(role, call.name, self._arguments(call)) for call in calls)
        if tools:
            functions = [tool["function"] for tool in tools]
            if self._glm4:
                parts.insert(0, _Part("system", "", _glm4_tools(functions)))
            else:
                first = parts.pop(0).text if parts[0].role == "system" else ""
                parts.insert(0, _Part("system", "", _chatglm3_tools(first, functions)))
        return parts

    def _arguments(self, call: PastCall) -> str:
        if self._glm4 or isinstance(call.arguments, str):
            return call.json
        pairs = ", ".join(f"{key}={value!r}" for key, value in call.arguments.items())
        return f"```python\ntool_call({pairs})\n```"


def _chatglm3_tools(system: str, functions: list[Any]) -> str:
    if not system.endswith(_CHATGLM3_TOOLS):
        system = "\n".join(filter(None, (system, _CHATGLM3_TOOLS)))
    return f"{system}\n{_indented(functions)}"


def _glm4_tools(functions: list[Any]) -> str:
    each = [f"\n\n## {tool['name']}\n\n{_indented(tool)}{_GLM4_HOW}" for tool in functions]
    return _GLM4_TOOLS + "".join(each)


def _indented(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=4)
