"""The messages of a conversation, put together from finer parts.

/v1/responses and /v1/messages tell text, thinking, calls and results apart; a chat has one message
for all that the assistant did between two others. Owns that gathering. Must not know the JSON of
any route, templates or engines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from router.api.schemas import ChatMessage, ContentPart


@dataclass(slots=True)
class _Turn:
    """What the assistant did so far, between two messages of others."""

    texts: list[str] = field(default_factory=list[str])
    thoughts: list[str] = field(default_factory=list[str])
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def message(self) -> ChatMessage:
        """As one message. Without text its content is absent, as OpenAI's own is."""
        return ChatMessage(
            role="assistant",
            content=content_of(self.texts) if self.texts else None,
            tool_calls=self.calls or None,
            reasoning_content="\n".join(self.thoughts) or None,
        )


class Turns:
    """Messages in the making. With `joins_users` adjacent user messages become one."""

    def __init__(self, *, joins_users: bool = False) -> None:
        self._joins_users = joins_users
        self._messages: list[ChatMessage] = []
        self._user: list[str] = []  # texts of the user message that may still grow
        self._turn: _Turn | None = None

    def say(self, role: str, texts: list[str]) -> None:
        """Text of any role but `tool`."""
        if role == "assistant":
            self._open_turn().texts += texts
            return
        self._close_turn()
        if role == "user" and self._joins_users:
            self._user += texts  # made a message once, when it is over
            return
        self._close_user()
        self._messages.append(ChatMessage(role=role, content=content_of(texts)))

    def think(self, text: str) -> None:
        """Thinking of the assistant, before its text or calls."""
        if text:
            self._open_turn().thoughts.append(text)

    def call(self, id: str, name: str, arguments: str) -> None:
        """A call that the assistant made; `arguments` is JSON text."""
        function = {"name": name, "arguments": arguments}
        self._open_turn().calls.append({"id": id, "type": "function", "function": function})

    def result(self, call_id: str, text: str) -> None:
        """What a call gave."""
        self._close_turn()
        self._close_user()
        self._messages.append(ChatMessage(role="tool", content=text, tool_call_id=call_id))

    @property
    def messages(self) -> list[ChatMessage]:
        """All of them, complete."""
        self._close_turn()
        self._close_user()
        return self._messages

    def _open_turn(self) -> _Turn:
        self._close_user()
        if self._turn is None:
            self._turn = _Turn()
        return self._turn

    def _close_turn(self) -> None:
        if self._turn is not None:
            self._messages.append(self._turn.message())
            self._turn = None

    def _close_user(self) -> None:
        if self._user:
            self._messages.append(ChatMessage(role="user", content=content_of(self._user)))
            self._user = []


def content_of(texts: list[str]) -> str | list[ContentPart]:
    """A message's content: one text as it is, several as parts."""
    if len(texts) == 1:
        return texts[0]
    return [ContentPart(type="text", text=text) for text in texts]
