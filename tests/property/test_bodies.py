"""Whatever a client puts into the bodies of /v1/responses and /v1/messages is either a chat or
refused: nothing else may be raised."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from router.api import messages_input, responses_input
from router.api.messages_schema import MessagesRequest
from router.api.responses_schema import ResponsesRequest
from router.api.schemas import decode_body
from router.errors import BadRequest

WORDS = (
    *("type", "role", "content", "text", "name", "id", "call_id", "output", "arguments", "tools"),
    *("input", "tool_use_id", "thinking", "mode", "format", "schema", "effort", "input_schema"),
)
KINDS = (
    *("message", "reasoning", "function_call", "function_call_output", "item_reference", "text"),
    *("input_text", "output_text", "refusal", "function", "allowed_tools", "web_search", "custom"),
    *("tool_use", "tool_result", "thinking", "redacted_thinking", "image", "tool", "any", "auto"),
    *("json_schema", "enabled", "user", "assistant", "system", "f", "{}"),
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats(-9, 9)
LEAVES = SCALARS | st.sampled_from(KINDS) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5)
    ),
    max_leaves=12,
)
COMMON = ("tools", "tool_choice", "n", "chat_template_kwargs")
RESPONSES = (*COMMON, "input", "text", "reasoning", "include", "truncation", "metadata", "prompt")
MESSAGES = (*COMMON, "messages", "system", "thinking", "output_config", "stop_sequences")


def body_of(members: dict[str, Any], **usual: Any) -> bytes:
    return json.dumps({"model": "m", **usual, **members}, allow_nan=False).encode()


@given(st.dictionaries(st.sampled_from(RESPONSES), VALUES, max_size=4))
@settings(max_examples=150, deadline=None)
def test_responses(members: dict[str, Any]) -> None:
    with suppress(BadRequest):
        body = body_of(members, **({} if "input" in members else {"input": "hi"}))
        chat = responses_input.chat_of(decode_body(body, ResponsesRequest))
        assert chat.messages


@given(st.dictionaries(st.sampled_from(MESSAGES), VALUES, max_size=4))
@settings(max_examples=150, deadline=None)
def test_messages(members: dict[str, Any]) -> None:
    usual = {} if "messages" in members else {"messages": [{"role": "user", "content": "hi"}]}
    with suppress(BadRequest):
        chat = messages_input.chat_of(decode_body(body_of(members, **usual), MessagesRequest))
        assert chat.messages


ITEMS = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS)},
    optional=dict.fromkeys(WORDS[1:], LEAVES | st.lists(VALUES, max_size=2)),
)


@given(st.lists(ITEMS, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_items_and_blocks(items: list[Any]) -> None:
    with suppress(BadRequest):
        responses_input.chat_of(decode_body(body_of({"input": items}), ResponsesRequest))
    for role in ("user", "assistant"):
        body = body_of({"messages": [{"role": role, "content": items}]})
        with suppress(BadRequest):
            messages_input.chat_of(decode_body(body, MessagesRequest))
