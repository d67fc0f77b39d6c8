"""The requests of the soak: greedy or seeded, so that each has one answer. Pure."""

from __future__ import annotations

import random
from typing import Any, Final

import msgspec

from tests.history import Request, request

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
SCHEMA: Final = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Grace", "Alan", "Edsger"]},
        "year": {"type": "integer", "minimum": 1900, "maximum": 1999},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "year", "alive"],
    "additionalProperties": False,
}
TOOL: Final = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"of": {"enum": ["tides", "stars", "trains"]}},
            "required": ["of"],
            "additionalProperties": False,
        },
    },
}
KINDS: Final = ("greedy", "seeded", "plain", "two", "stop", "logprobs", "echo", "json", "tool")
FORM_TOKENS: Final = 200  # of an answer that ends by its grammar
_WORDS: Final = (
    "tide", "star", "train", "river", "glass", "copper", "north", "winter", "letter", "garden",
    "stone", "paper", "signal", "harbour",
)  # fmt: skip
_STREAM: Final = {"stream": True}


class Mix(msgspec.Struct, frozen=True):
    """How long the answers are, and which kinds there are."""

    model: str
    shortest: int
    longest: int
    kinds: tuple[str, ...]


def make_requests(mix: Mix, count: int, rng: random.Random) -> dict[Request, str]:
    """`count` of them, the kinds in turn, each with its kind."""
    kinds = [mix.kinds[number % len(mix.kinds)] for number in range(count)]
    return {_make(mix, kind, rng): kind for kind in kinds}


def _make(mix: Mix, kind: str, rng: random.Random) -> Request:
    text = " ".join(rng.choices(_WORDS, k=rng.randint(3, 12)))
    length = rng.randint(mix.shortest, mix.longest)
    seeded = {"temperature": 1.0, "seed": rng.randrange(2**31)}
    base: dict[str, Any] = {"model": mix.model, "max_tokens": length, "temperature": 0}
    if kind in ("json", "tool"):
        schema = {"name": "note", "strict": True, "schema": SCHEMA}
        form: dict[str, Any] = (
            {"response_format": {"type": "json_schema", "json_schema": schema}}
            if kind == "json"
            else {"tools": [TOOL], "tool_choice": "required"}
        )
        messages = [{"role": "user", "content": f"Tell me of {text}."}]
        fields = {**base, **_STREAM, **seeded, **form, "max_tokens": FORM_TOKENS}
        return request(CHAT, **fields, messages=messages)
    rest: dict[str, dict[str, Any]] = {
        "greedy": {**_STREAM, "ignore_eos": True},
        "seeded": {**_STREAM, **seeded, "ignore_eos": True},
        "plain": {**seeded, "ignore_eos": True},
        "two": {**_STREAM, **seeded, "n": 2, "ignore_eos": True},
        "stop": {**_STREAM, **seeded, "stop": ["e", "##"]},
        "logprobs": {**_STREAM, "logprobs": 2, "ignore_eos": True},
        "echo": {**seeded, "echo": True, "ignore_eos": True},
    }
    return request(COMPLETIONS, **{**base, "prompt": f"A note on {text}:", **rest[kind]})
