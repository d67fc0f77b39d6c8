"""Answers bound to a schema, in each client's own way to ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.runs import LIMIT_S, Results
from tests.clients.script import CITY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ("openai 3", [CITY] * 2),  # parsed, and parsed of a stream
        ("openai 2", [CITY] * 2),
        ("openai 1", [CITY] * 2),
        ("openai for node", CITY),
        ("langchain", dict.fromkeys(("json_schema", "json_mode", "function_calling"), CITY)),
        (
            "langchain with openai 2",
            dict.fromkeys(("json_schema", "json_mode", "function_calling"), CITY),
        ),
        ("llama-index", [CITY] * 2),  # as a tool, as a response format
        ("litellm", CITY),
        ("autogen", [CITY] * 2),  # a schema, any JSON
    ],
)
def test_structured(played: Callable[[str], Results], client: str, expected: Any) -> None:
    assert played(client)["structured"] == expected


@pytest.mark.parametrize("client", ["anthropic 2", "anthropic 0"])
def test_anthropic(played: Callable[[str], Results], client: str) -> None:
    assert played(client)["structured"] == CITY
