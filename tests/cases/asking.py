"""How the cases ask, and what they read from answers of either chat or completion route."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anthropic
import httpx2
import openai
from starlette.types import ASGIApp

from tests.router_parts import MODEL, Answer, Play, Router, call, chat, complete
from tools.tiny_model import CHAT_TEMPLATE, encode_text, write_tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEMO, TINY = "smollm2-135m", "tiny"
MAX_LEN = 2048  # of the scripted engines: tools take room in a prompt of bytes
KEY = "cases-key"  # of the process that all cases share
REPLACEMENT = "\ufffd"  # what a broken character becomes

Scene = Play | Callable[[str], Play]
# `engine(scene, **options of router_parts)`: a router over one scripted engine
Scripted = Callable[..., AbstractAsyncContextManager[Router]]


def bytes_play(*steps: bytes, stop: bool = True) -> Play:
    """One step for each run of bytes, a token each."""
    return Play([[byte + 16 for byte in step] for step in steps], stop=stop)


def long_play(length: int = 512, *, step: int = 1, waits: bool = False) -> Play:
    """`length` tokens of "x", `step` at a time; nobody says stop."""
    tokens = encode_text("x" * length)
    steps = [tokens[at : at + step] for at in range(0, length, step)]
    return Play(steps, stop=False, waits=waits)


# -- what an answer says


def body(answer: Answer) -> Any:
    """The JSON of a good answer."""
    assert answer.status == 200, answer.body
    return answer.json()


def content(answer: Answer, index: int = 0) -> str:
    """The text of one choice of a whole answer."""
    choice = body(answer)["choices"][index]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert isinstance(text, str)
    return text


def events(answer: Answer) -> list[Any]:
    """The events of a stream that ended in order."""
    assert answer.status == 200, answer.body
    assert answer.ended
    return answer.events()


def deltas(answer: Answer, index: int = 0, field: str = "content") -> list[str]:
    """The texts of one choice's chunks, empty ones left out."""
    choices = [c for event in events(answer) for c in event["choices"] if c["index"] == index]
    texts = [c["text"] if "text" in c else c["delta"].get(field) for c in choices]
    return [text for text in texts if text]


def joined(answer: Answer, index: int = 0, field: str = "content") -> str:
    """One choice's streamed text."""
    return "".join(deltas(answer, index, field))


def finishes(answer: Answer, index: int = 0) -> list[str]:
    """The finish reasons that one choice's chunks tell."""
    choices = [c for event in events(answer) for c in event["choices"] if c["index"] == index]
    return [c["finish_reason"] for c in choices if c["finish_reason"] is not None]


def stream_usage(answer: Answer) -> Any:
    """The counts of a stream that was asked for them."""
    return events(answer)[-1]["usage"]


def error(answer: Answer, status: int = 400) -> dict[str, Any]:
    """The error object, whose form every failure has."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return error_object(answer.body)


def error_object(data: bytes) -> dict[str, Any]:
    """Checks policy P1: four keys, strict JSON, short, nothing of the inside."""
    value = json.loads(data, parse_constant=_no_json)
    assert list(value) == ["error"]
    found: dict[str, Any] = value["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    assert isinstance(found["message"], str)
    assert isinstance(found["type"], str)
    assert found["code"] is None or isinstance(found["code"], str)
    assert found["param"] is None or isinstance(found["param"], str)
    assert len(data) < 8192
    inside = (b"Traceback", b".py", b"msgspec", b"Error(", b"router.", b"/secret")
    assert not any(word in data for word in inside), data
    return found


def _no_json(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


# -- asking


async def both(app: ASGIApp, route: str, text: Any = "hi", **fields: Any) -> tuple[Answer, Answer]:
    """The same request whole and streamed."""
    ask = chat if route == CHAT else complete
    return await ask(app, text, **fields), await ask(app, text, stream=True, **fields)


async def post(app: ASGIApp, path: str, fields: dict[str, Any], **options: Any) -> Answer:
    """POST with the model filled in."""
    return await call(app, "POST", path, {"model": MODEL, **fields}, **options)


async def prompt_ids(app: ASGIApp, messages: list[Any], **fields: Any) -> list[int]:
    """What /tokenize makes of a conversation."""
    answer = await post(app, "/tokenize", {"messages": messages, **fields})
    tokens: list[int] = body(answer)["tokens"]
    return tokens


def user(text: Any) -> Any:
    """One user message."""
    return {"role": "user", "content": text}


async def assert_alive(app: ASGIApp) -> None:
    """The next ordinary request is answered."""
    assert (await chat(app)).status == 200


@asynccontextmanager
async def openai_client(app: ASGIApp, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    """The real SDK, without a socket."""
    transport = httpx2.ASGITransport(app=app)
    async with openai.AsyncOpenAI(
        base_url="http://router/v1",
        api_key=key,
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(transport=transport),
    ) as client:
        yield client


@asynccontextmanager
async def anthropic_client(app: ASGIApp, **keys: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """The real SDK, without a socket; `keys` are `api_key` or `auth_token`."""
    transport = httpx2.ASGITransport(app=app)
    async with anthropic.AsyncAnthropic(
        base_url="http://router",
        max_retries=0,
        http_client=anthropic.DefaultAsyncHttpxClient(transport=transport),
        **(keys or {"api_key": "none"}),
    ) as client:
        yield client


# -- model folders


def templated(folder: Path, template: str | None) -> Path:
    """The tiny model with another chat template, or none."""
    write_tiny_model(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = template
    file.write_text(json.dumps(settings))
    return folder


@contextmanager
def raw_connection(url: str, payload: bytes, *headers: str) -> Iterator[Any]:
    """A socket on which a whole POST of a chat was sent."""
    import socket

    place = urlsplit(url)
    assert place.hostname is not None
    with socket.create_connection((place.hostname, place.port or 0), timeout=60) as connection:
        head = [
            f"POST {CHAT} HTTP/1.1",
            f"Host: {place.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(payload)}",
            *headers,
        ]
        connection.sendall("\r\n".join([*head, "", ""]).encode() + payload)
        yield connection


# -- tools and thinking

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
LOOK: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": CITY}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Paris"}}\n</tool_call>'
# templates of models that think: one lets the model begin, one begins for it
THINKS = CHAT_TEMPLATE + (
    "{% if add_generation_prompt and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
OPENS = CHAT_TEMPLATE + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"


def call_deltas(answer: Answer, index: int = 0) -> list[Any]:
    """The entries of `tool_calls` in one choice's chunks; at most one for each call and chunk."""
    found: list[Any] = []
    for event in events(answer):
        for choice in event["choices"]:
            entries = choice["delta"].get("tool_calls") or []
            assert len({entry["index"] for entry in entries}) == len(entries)
            found += entries if choice["index"] == index else []
    return found


def streamed_calls(answer: Answer) -> list[tuple[str, str]]:
    """(name, arguments) of the calls of a stream, put together as clients do."""
    calls: dict[int, list[str]] = {}
    for entry in call_deltas(answer):
        function = entry["function"]
        name, arguments = calls.setdefault(entry["index"], ["", ""])
        calls[entry["index"]] = [
            name + function.get("name", ""),
            arguments + function.get("arguments", ""),
        ]
    assert list(calls) == list(range(len(calls)))
    return [(name, arguments) for name, arguments in calls.values()]


def whole_calls(answer: Answer) -> list[tuple[str, str]]:
    """The same of a whole answer."""
    calls = body(answer)["choices"][0]["message"].get("tool_calls") or []
    assert all(entry["type"] == "function" and entry["id"] for entry in calls)
    return [(entry["function"]["name"], entry["function"]["arguments"]) for entry in calls]
