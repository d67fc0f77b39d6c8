"""What the scripted engine of the client tests says to which words; the tests expect just that."""

from __future__ import annotations

import json
from typing import Any

from engine.protocol import Pooling, unpack_floats
from tools.fake_batch import fake_embedding
from tools.tiny_model import encode_text

MODEL = "tiny"
KEY = "secret-key"
HELLO = "Hello there"
EMOJI = "sun ☀️ and 😊 你好"
CITY = {"name": "Oslo", "inhabitants": 709000}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
SECOND_CALL = {"name": "weather", "arguments": {"city": "Bergen"}}
AFTER_TOOL = "It is 21 degrees."


def _call(call: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


# The first rule whose word the prompt has: what comes late in a conversation stands first.
SCRIPT: dict[str, Any] = {
    "rules": [
        {"match": {"contains": "twenty-one"}, "reply": AFTER_TOOL},
        {"match": {"contains": "both cities"}, "reply": f"{_call(CALL)}\n{_call(SECOND_CALL)}"},
        {"match": {"contains": "the weather"}, "reply": _call(CALL)},
        {"match": {"contains": "as a City"}, "reply": _call({"name": "City", "arguments": CITY})},
        {"match": {"contains": "as JSON"}, "reply": json.dumps(CITY)},
        {"match": {"contains": "emoji"}, "reply": EMOJI},
        {"match": {"contains": "fails"}, "reply": "abc", "finish": "error", "detail": "inner"},
        {"match": {"contains": "endless"}, "reply": "x", "repeat": True, "tokens_per_s": 5},
        {"match": {"contains": "variants"}, "reply": ["one", "two", "three"]},
        {"match": "*", "reply": HELLO},
    ]
}


def vector_of(text: str) -> list[float]:
    """The embedding that the scripted engine makes of a text."""
    return list(unpack_floats(fake_embedding(encode_text(text), Pooling(), 8)))
