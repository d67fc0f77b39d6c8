"""Who may call, from where, and how much they may send.

Tests carry the number of their rule in the project's list of security rules (S1 to S22) or of
their case in its API corpus.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api import intake
from router.api.intake import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_TEXTS,
    MAX_VALUES,
    SLICE_BYTES,
    SMALL_BYTES,
    outsides,
    shapes_so_far,
)
from router.app import Access
from router.config import Options, key_digests, resolve
from tests.router_parts import MODEL, Answer, Play, Router, call, router_parts, text_play
from tools.tiny_model import write_tiny_model

KEYS = tuple(hashlib.sha256(key).digest() for key in (b"first", b"second"))
PAGE = "https://chat.example"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}

Make = Callable[[Access], AbstractAsyncContextManager[Router]]


def plays(prompt: str) -> Play:
    return Play([], error="bug") if "broken" in prompt else text_play("Hel", "lo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture
def make(folder: Path) -> Make:
    return lambda access: router_parts(folder, plays, access=access)


@pytest.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays) as parts:
        yield parts


async def ask(router: Router, headers: dict[str, str], **fields: Any) -> Answer:
    return await call(
        router.app, "POST", "/v1/chat/completions", {**CHAT, **fields}, headers=headers
    )


# -- keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer first"}, 200),
        ({"x-api-key": "second"}, 200),
        ({"x-api-key": "first", "authorization": "Bearer first"}, 200),
        ({"x-api-key": "wrong", "authorization": "Bearer first"}, 401),
        ({"x-api-key": "first", "authorization": "Bearer wrong"}, 401),
        ({"x-api-key": "first", "authorization": "Basic Zmlyc3Q6"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "\xff\xfe"}, 401),
        ({"authorization": "Bearer k\xf6nig"}, 401),
        ({"authorization": "Bearer " + "x" * 60_000}, 401),
        ({}, 401),
    ],
)
async def test_keys_in_both_headers_222_238(
    make: Make, headers: dict[str, str], status: int
) -> None:
    async with make(Access(KEYS)) as router:
        answer = await ask(router, headers)
        assert answer.status == status
        if status == 401:
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert router.engines.submits == []


async def test_a_key_beyond_ascii_opens(make: Make) -> None:
    key = "schlüssel"
    async with make(Access(key_digests(key))) as router:
        sent = key.encode().decode("latin-1")  # as clients put UTF-8 into a header
        assert (await ask(router, {"authorization": f"Bearer {sent}"})).status == 200


async def test_s17_two_spellings_of_a_key_are_one_tenant(make: Make) -> None:
    async with make(Access(KEYS)) as router:
        for headers in (
            {"authorization": "Bearer first"},
            {"x-api-key": "first"},
            {"x-api-key": "second"},
        ):
            assert (await ask(router, headers)).status == 200
        one, same, other = (submit.salt for submit in router.engines.submits)
        assert one == same != other


async def test_s4_every_registered_route_is_closed(make: Make) -> None:
    async with make(Access(KEYS)) as router:
        boundary: Any = router.app
        for route in boundary._app.routes:
            path = route.path.replace("{name:path}", MODEL).replace("{id}", "0")
            is_open = path.startswith("/health")
            for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "PATCH"):
                for headers in ({}, {"x-api-key": "wrong"}, {"host": "localhost/?x=/health"}):
                    answer = await call(router.app, method, path, {}, headers=headers)
                    assert (answer.status == 401) != is_open, (method, path)
            for odd in (f"/{path}", f"/health/..{path}", path.replace("/", "%2f"), f"{path}/x"):
                if not odd.startswith("/health/live"):
                    assert (await call(router.app, "GET", odd)).status in (401, 404 * is_open)


# -- web pages


def cors(answer: Answer) -> dict[str, str]:
    return {
        k: v for k, v in answer.headers.items() if k.startswith("access-control") or k == "vary"
    }


PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


async def test_s15_closed_by_default(make: Make) -> None:
    async with make(Access()) as router:
        assert cors(await ask(router, {"origin": PAGE})) == {}
        answer = await call(router.app, "OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
        assert answer.status == 405
        assert cors(answer) == {}


async def test_a_preflight_needs_no_key_220(make: Make) -> None:
    async with make(Access(KEYS, (PAGE, "http://localhost:3000"))) as router:
        answer = await call(router.app, "OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
        assert answer.status == 204
        told = cors(answer)
        assert told["access-control-allow-origin"] == PAGE
        assert "POST" in told["access-control-allow-methods"]
        assert told["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        assert "Origin" in told["vary"]
        assert "access-control-allow-credentials" not in told
        # without the preflight's header it is a request like others
        plain = await call(router.app, "OPTIONS", "/v1/models", headers={"origin": PAGE})
        assert plain.status == 401


async def test_a_strange_page_gets_no_preflight(make: Make) -> None:
    async with make(Access((), (PAGE,))) as router:
        for origin in ("https://evil.example", "null", PAGE + ".evil.example", PAGE.upper()):
            headers = {**PREFLIGHT, "origin": origin}
            answer = await call(router.app, "OPTIONS", "/v1/chat/completions", headers=headers)
            assert answer.status == 405
            assert cors(answer) == {"vary": "Origin"}


@pytest.mark.parametrize("asked", ["a\nb", "é", "x" * 20_000 + ":", ", ,", "a;b"])
async def test_s14_only_names_of_headers_are_repeated(make: Make, asked: str) -> None:
    async with make(Access((), ("*",))) as router:
        headers = {**PREFLIGHT, "access-control-request-headers": asked}
        answer = await call(router.app, "OPTIONS", "/v1/models", headers=headers)
        assert answer.status == 204
        assert "access-control-allow-headers" not in cors(answer)


async def test_every_answer_carries_them_221(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make(Access(KEYS, (PAGE,))) as router:
        page = {"origin": PAGE}
        known = {**page, "authorization": "Bearer first"}
        answers = {
            401: await ask(router, page),
            200: await ask(router, known, stream=True),
            404: await call(router.app, "GET", "/nowhere", headers=known),
            400: await ask(router, known, temperature=9),
        }
        monkeypatch.setattr(router.flow, "check_room", lambda *_, **__: 1 / 0)
        answers[500] = await ask(router, known)
        for status, answer in answers.items():
            assert answer.status == status
            told = cors(answer)
            assert told["access-control-allow-origin"] == PAGE
            assert told["vary"] == "Origin"
            for name in ("x-request-id", "retry-after"):
                assert name in told["access-control-expose-headers"]
        assert answers[200].events()


async def test_all_pages_without_credentials(make: Make) -> None:
    async with make(Access((), ("*",))) as router:
        told = cors(await ask(router, {"origin": "null"}))
        assert told["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in told


@pytest.mark.parametrize(
    "origins", ["chat.example", f"{PAGE}/", "https://*.example", "null", "a b"]
)
def test_what_is_no_origin_is_refused_at_start(origins: str) -> None:
    with pytest.raises(ValueError, match="--cors-origins"):
        resolve(Options(cors_origins=origins))


def test_origins_and_hosts_of_the_configuration() -> None:
    http = resolve(Options(cors_origins=f"{PAGE}, http://localhost:3000,")).http
    assert http.cors_origins == (PAGE, "http://localhost:3000")
    assert resolve(Options()).http.cors_origins == ()
    assert http.allowed_hosts == ("localhost",)
    assert resolve(Options(), api_keys=key_digests("k")).http.allowed_hosts == ()
    assert resolve(Options(host="::", insecure_no_auth=True)).http.allowed_hosts == ()
    assert "a.example" in resolve(Options(allowed_hosts=["a.example"])).http.allowed_hosts


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("app.localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("llm.example", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example/localhost", 403),
        ("", 403),
        ("\xff", 403),
    ],
)
async def test_s15_a_page_that_names_itself_is_refused(make: Make, host: str, status: int) -> None:
    async with make(Access(hosts=("localhost", "llm.example"))) as router:
        answer = await ask(router, {"host": host})
        assert answer.status == status
        if status == 403:
            assert answer.json()["error"]["code"] == "host_not_allowed"
            assert b"evil" not in answer.body


# -- how much a body may hold


def body_of(**fields: Any) -> bytes:
    return json.dumps({**CHAT, **fields}).encode()


@pytest.mark.parametrize("pad", [0, 3, SLICE_BYTES - 70, SLICE_BYTES - 33, 3 * SLICE_BYTES])
@pytest.mark.parametrize(
    "value",
    [
        [],
        {"a": [1, 2, {"b": None}]},
        ['"', "\\", '\\"', '\\\\"', "[{,", "a\\"],
        ["\\" * 40, '"' * 41, '\\"' * 30],
        ["é,[", "\U0001f600{"],
    ],
)
def test_s6_a_body_is_counted_as_it_is(pad: int, value: Any) -> None:
    for ascii_only in (True, False):
        body = json.dumps({"pad": "x" * pad, "value": value}, ensure_ascii=ascii_only).encode()
        *_, shape = shapes_so_far(body)
        counted = Counter(kind for kind in kinds_of(json.loads(body)))
        assert shape == (counted["container"], counted["text"], shape.commas)
        assert shape.commas == len(re.findall(",", json.dumps(blank(json.loads(body)))))


def kinds_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield "text"
    if isinstance(value, list | dict):
        yield "container"
        for item in value:
            yield from kinds_of(item)  # of an object: its names
        if isinstance(value, dict):
            for item in value.values():
                yield from kinds_of(item)


def blank(value: Any) -> Any:
    """The same without the contents of texts."""
    if isinstance(value, dict):
        return {str(i): blank(item) for i, item in enumerate(value.values())}
    if isinstance(value, list):
        return [blank(item) for item in value]
    return "" if isinstance(value, str) else value


@given(st.binary(max_size=200), st.integers(1, 9))
def test_whatever_comes_is_cut_and_counted(body: bytes, size: int) -> None:
    body = body.translate(bytes(b'"\\[]{},x\\"'[i % 10] for i in range(256)))
    whole = b"".join(outsides(body))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake, "SLICE_BYTES", size)
        sliced = b"".join(outsides(body))
    assert sliced.count(b'"') == whole.count(b'"')
    assert sliced.replace(b'"', b"") == whole.replace(b'"', b"")


@pytest.mark.parametrize(
    ("field", "most", "item"),
    [
        ("tools", MAX_CONTAINERS, "{}"),
        ("foo", MAX_CONTAINERS, "[]"),
        ("foo", MAX_TEXTS, '""'),
        ("foo", MAX_VALUES, "1"),
    ],
)
async def test_s6_objects_of_a_body(router: Router, field: str, most: int, item: str) -> None:
    raw = body_of(**{field: "@"}).replace(b'"@"', b"[" + b",".join([item.encode()] * most) + b",1]")
    answer = await call(router.app, "POST", "/v1/chat/completions", raw=raw)
    assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert router.engines.submits == []


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("field", ["foo", "chat_template_kwargs", "tools", "tool_choice"])
@pytest.mark.parametrize("pad", [0, 2 * SMALL_BYTES])
async def test_s6_depth(router: Router, opening: str, field: str, pad: int) -> None:
    closing = "]" if opening == "[" else "}"

    async def nested(depth: int) -> Answer:
        value = opening * depth + ("0" if opening != "[" else "") + closing * depth
        if field == "chat_template_kwargs":
            value = '{"x":' + value + "}"
        elif field == "tools":
            value = f"[{value}]"
        raw = body_of(**{field: "@"}, pad="x" * pad).replace(b'"@"', value.encode())
        return await call(router.app, "POST", "/v1/chat/completions", raw=raw)

    for depth in (MAX_DEPTH + 1, 800, 5000, 200_000 if pad else 20_000):
        answer = await nested(depth)
        assert answer.status in (400, 413)
    assert (await nested(20)).status in (
        (200,) if field in ("foo", "chat_template_kwargs") else (200, 400)
    )


async def test_broken_json_is_no_depth(router: Router) -> None:
    answer = await call(router.app, "POST", "/v1/chat/completions", raw=b'{"a":' * 300)
    assert answer.json()["error"]["message"].startswith("The body is not valid JSON")


async def test_s6_twenty_thousand_messages(router: Router) -> None:
    answer = await ask(router, {}, messages=CHAT["messages"] * 20_000)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"stop": ["x"] * 50_000}, "stop"),
        ("/v1/chat/completions", {"stop": ["x" * 1001]}, "stop"),
        ("/v1/chat/completions", {"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
        ("/v1/chat/completions", {"logit_bias": {str(i): 1 for i in range(40_000)}}, "logit_bias"),
        ("/v1/chat/completions", {"n": 10**9}, "n"),
        ("/v1/chat/completions", {"best_of": 10**9}, "best_of"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 10**9}, "top_logprobs"),
        ("/v1/chat/completions", {"cache_salt": "x" * 10**6}, "cache_salt"),
        ("/v1/chat/completions", {"priority": 2**40}, "priority"),
        ("/v1/chat/completions", {"min_tokens": 10**19}, "min_tokens"),
        ("/v1/chat/completions", {"model": "x" * 10**6}, "model"),
        ("/v1/completions", {"prompt": [1] * 1_000_000}, "prompt"),
        ("/v1/completions", {"prompt": [[1]] * 2000}, "prompt"),
        ("/v1/completions", {"prompt": ["x"] * 20_000}, "prompt"),
        ("/v1/completions", {"prompt": "x" * 10**7}, "prompt"),
        ("/v1/completions", {"prompt": ["x"] * 1000, "n": 128}, "n"),
        ("/v1/embeddings", {"input": [1] * 1_000_000}, "input"),
        ("/v1/embeddings", {"input": ["x"] * 20_000}, "input"),
        ("/tokenize", {"prompt": "x" * 10**7}, "prompt"),
        ("/detokenize", {"tokens": [1] * 1_000_001}, "tokens"),
    ],
)
async def test_s6_fields(router: Router, path: str, fields: dict[str, Any], param: str) -> None:
    body = {**(CHAT if path.startswith("/v1/chat") else {"model": MODEL}), **fields}
    answer = await call(router.app, "POST", path, body)
    assert answer.status in (400, 404)
    assert answer.json()["error"]["param"] == param
    assert len(answer.body) < 1000
    assert router.engines.submits == []


@pytest.mark.parametrize("name", ["../etc", "/etc/passwd", "file:///x", "a\x00b", "x" * 10_000, ""])
async def test_s11_a_model_name_is_only_a_key(router: Router, name: str) -> None:
    answer = await ask(router, {}, model=name)
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert not name or name.encode() not in answer.body
    got = await call(router.app, "GET", f"/v1/models/{name}")
    assert got.status == (404 if name else 200)


@pytest.mark.parametrize(
    "name", ["messages", "tools", "bos_token", "add_generation_prompt", "raise_exception", "range"]
)
async def test_s7_template_variables_are_not_replaced(router: Router, name: str) -> None:
    answer = await ask(router, {}, chat_template_kwargs={name: "x"})
    assert (answer.status, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")
    assert (await ask(router, {}, chat_template="{{ 1 }}")).status == 400


def test_s3_public_addresses_need_keys() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(ValueError, match="--insecure-no-auth"):
            resolve(Options(host=host))
    for host in ("127.0.0.1", "::1", "localhost"):
        assert resolve(Options(host=host)).http.host == host
