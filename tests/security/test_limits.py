"""Every field that a client can make large, at its limit, one beyond it and far beyond it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from router.api import conversation, embeddings, messages_input, options
from router.text import grammar, json_schema, lark, patterns, tool_forms
from tests.router_parts import MODEL, Router, call, router_parts, text_play

FAR = 200_000  # as far as a list goes here; numbers go to 10**9
GROWTH_BYTES = 150e6
MAX_LEN = 12_000  # room for the longest list of tools
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


class Limit(NamedTuple):
    """A request whose field has size n; up to `most` it is answered, beyond that refused."""

    path: str
    most: int
    fields: Callable[[int], dict[str, Any]]
    far: int = FAR


def number(name: str, most: int, **more: Any) -> Limit:
    return Limit("/v1/completions", most, lambda n: {"prompt": "x", name: n, **more}, 10**9)


def chat(most: int, fields: Callable[[int], dict[str, Any]], far: int = FAR) -> Limit:
    return Limit("/v1/chat/completions", most, lambda n: {**CHAT, **fields(n)}, far)


def tools(n: int) -> dict[str, Any]:
    return {"tools": [{**TOOL, "function": {"name": f"f{i}"}} for i in range(n)]}


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return {"guided_json": schema}


def messages(n: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": ""}] * n}


LIMITS: dict[str, Limit] = {
    "n": number("n", options.MAX_CHOICES, max_tokens=1),
    "logprobs": number("logprobs", options.MAX_LOGPROBS, max_tokens=1),
    "prompt_logprobs": number("prompt_logprobs", options.MAX_LOGPROBS, max_tokens=1),
    "top_logprobs": chat(
        options.MAX_LOGPROBS, lambda n: {"logprobs": True, "top_logprobs": n}, 10**9
    ),
    "stop": chat(options.MAX_STOPS, lambda n: {"stop": [f"s{i}" for i in range(n)]}),
    "a stop": chat(options.MAX_STOP_CHARS, lambda n: {"stop": ["x" * n]}, 10**7),
    "stop_token_ids": chat(options.MAX_STOP_IDS, lambda n: {"stop_token_ids": [*range(n)]}),
    "cache_salt": chat(options.MAX_SALT_CHARS, lambda n: {"cache_salt": "s" * n}, 10**7),
    "tools": chat(tool_forms.MAX_TOOLS, tools, 20_000),
    "prompts": Limit(
        "/v1/completions",
        options.MAX_PROMPTS,
        lambda n: {"prompt": ["x"] * n, "max_tokens": 1},
        50_000,
    ),
    "a schema's depth": chat(json_schema.MAX_DEPTH, nested, 100),
    "a pattern": chat(patterns.MAX_CHARS, lambda n: {"guided_regex": "x" * n}, 10**6),
    "choices": chat(
        grammar.MAX_CHOICES, lambda n: {"guided_choice": [f"c{i}" for i in range(n)]}, 90_000
    ),
    "a grammar": chat(lark.MAX_CHARS, lambda n: {"guided_grammar": 'start: "a"'.ljust(n)}, 10**6),
    "embedded texts": Limit("/v1/embeddings", embeddings.MAX_TEXTS, lambda n: {"input": ["x"] * n}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits")


@pytest.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, lambda _: text_play("x"), max_len=MAX_LEN) as parts:
        yield parts


@pytest.mark.parametrize("name", LIMITS)
async def test_s6_at_the_limit_and_beyond(router: Router, name: str) -> None:
    limit = LIMITS[name]

    async def ask(n: int) -> tuple[int, bytes]:
        body = {"model": MODEL, **limit.fields(n)}
        answer = await call(router.app, "POST", limit.path, body)
        return answer.status, answer.body

    status, told = await ask(limit.most)
    assert status == 200, told
    before = len(router.engines.submits)
    memory = psutil.Process().memory_info().rss
    for n in (limit.most + 1, limit.far):
        begin_s = time.monotonic()
        status, told = await ask(n)
        assert status in (400, 413), told
        assert len(told) < 1000
        assert time.monotonic() - begin_s < 30
    assert len(router.engines.submits) == before
    assert psutil.Process().memory_info().rss - memory < GROWTH_BYTES


@pytest.mark.parametrize(
    ("path", "most", "fields"),
    [
        ("/v1/chat/completions", conversation.MAX_MESSAGES, messages),
        ("/v1/messages", messages_input.MAX_MESSAGES, lambda n: {**messages(n), "max_tokens": 1}),
        (
            "/v1/responses",
            conversation.MAX_MESSAGES,
            lambda n: {"input": [{"role": "user", "content": ""}] * n},
        ),
    ],
)
async def test_s6_numbers_of_messages(
    router: Router, path: str, most: int, fields: Callable[[int], dict[str, Any]]
) -> None:
    answer = await call(router.app, "POST", path, {"model": MODEL, **fields(most)})
    assert answer.status == 200 or b"context" in answer.body  # too long at most, not too many
    before = len(router.engines.submits)
    for n in (most + 1, 20_000):
        answer = await call(router.app, "POST", path, {"model": MODEL, **fields(n)})
        assert answer.status in (400, 413)
        assert b" hold " in answer.body, answer.body
    assert len(router.engines.submits) == before
