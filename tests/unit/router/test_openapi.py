"""The description of what is served, and the page that shows it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import pytest_asyncio

from router.api.fixed import page_policy
from router.api.openapi import About, Operation, describe
from router.api.schemas import ChatRequest
from tests.router_parts import MODEL, Answer, Router, call, chat, complete, router_parts, text_play

KEY = "sk-test"
KEYED = {"authorization": f"Bearer {KEY}"}


@pytest_asyncio.fixture
async def router(tmp_path: Path) -> AsyncIterator[Router]:
    async with router_parts(tmp_path / MODEL, lambda _: text_play("Hel", "lo")) as parts:
        yield parts


async def described(router: Router) -> dict[str, Any]:
    answer = await call(router.app, "GET", "/openapi.json")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def answer_schema(document: dict[str, Any], path: str, method: str = "post") -> dict[str, Any]:
    """The schema of the 200 answer, with the components that it refers to."""
    content = document["paths"][path][method]["responses"]["200"]["content"]
    return {**content["application/json"]["schema"], "components": document["components"]}


def check(document: dict[str, Any], path: str, method: str, answer: Answer) -> None:
    assert answer.status == 200, answer.body
    schema = answer_schema(document, path, method)
    jsonschema.Draft202012Validator(schema).validate(answer.json())


def table_of(router: Router) -> list[tuple[str, str]]:
    """(method, path pattern) of each route that the app really has."""
    boundary: Any = router.app
    return [
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for route in boundary._app.routes
        for method in route.methods - {"HEAD"}
    ]


async def test_every_route_is_described(router: Router) -> None:
    document = await described(router)
    told = [(method, path) for path, item in document["paths"].items() for method in item]
    assert sorted(told) == sorted(table_of(router))
    operations = [op for item in document["paths"].values() for op in item.values()]
    assert len({op["operationId"] for op in operations}) == len(operations)
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["summary"]
    for path, item in document["paths"].items():
        if "post" in item and not path.startswith("/admin/"):  # those need no body
            body = item["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert body, f"{path} does not say what it takes"


async def test_it_is_a_valid_document_as_schemathesis_reads_it(router: Router) -> None:
    import schemathesis

    document = await described(router)
    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    assert document["openapi"].startswith("3.1")
    for component in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(component)
    references = set(re.findall(r"#/components/schemas/([^\"']+)", str(document)))
    assert references <= set(document["components"]["schemas"])


async def test_answers_are_as_described(router: Router) -> None:
    document = await described(router)
    app = router.app
    for stream_off in (
        await chat(app),
        await chat(app, n=2, logprobs=True, top_logprobs=2, return_token_ids=True),
    ):
        check(document, "/v1/chat/completions", "post", stream_off)
    answer = await complete(app, logprobs=2, echo=True, return_token_ids=True)
    check(document, "/v1/completions", "post", answer)
    for encoding in ("float", "base64"):
        body = {"model": MODEL, "input": ["a", "b"], "encoding_format": encoding}
        answer = await call(app, "POST", "/v1/embeddings", body)
        check(document, "/v1/embeddings", "post", answer)
    body = {"model": MODEL, "prompt": "ab", "return_token_strs": True}
    check(document, "/tokenize", "post", await call(app, "POST", "/tokenize", body))
    body = {"model": MODEL, "tokens": [65]}
    check(document, "/detokenize", "post", await call(app, "POST", "/detokenize", body))
    body = {"model": MODEL, "input": "hi"}
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        check(document, path, "post", await call(app, "POST", path, body))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        check(document, path, "post", await call(app, "POST", path, body))
    for path in ("/v1/models", "/health", "/health/live", "/health/started", "/version"):
        check(document, path, "get", await call(app, "GET", path))
    for path in ("/v1/models/{name}", "/v1/models"):
        for headers in ({}, {"anthropic-version": "2023-06-01"}):
            got = await call(app, "GET", path.replace("{name}", MODEL), headers=headers)
            check(document, path, "get", got)
    check(document, "/tokenizer_info", "get", await call(app, "GET", "/tokenizer_info"))


async def test_events_are_as_described(router: Router) -> None:
    document = await described(router)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for path, answer in (
        ("/v1/chat/completions", await chat(router.app, **options, logprobs=True)),
        ("/v1/completions", await complete(router.app, **options)),
    ):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        schema = content["text/event-stream"]["x-event-data"]
        schema = {**schema, "components": document["components"]}
        for event in answer.events():
            jsonschema.Draft202012Validator(schema).validate(event)


async def test_an_anthropic_error_is_as_described(router: Router) -> None:
    document = await described(router)
    operation = document["paths"]["/v1/messages"]["post"]
    answer = await call(router.app, "POST", "/v1/messages", {"model": MODEL, "messages": []})
    assert answer.status == 400
    schema = operation["responses"]["400"]["content"]["application/json"]["schema"]
    schema = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer.json())
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["max_tokens"]


async def test_errors_are_as_described(router: Router) -> None:
    document = await described(router)
    for status, answer in (
        ("400", await chat(router.app, temperature=3)),
        ("404", await chat(router.app, model="other")),
        (
            "415",
            await call(router.app, "POST", "/v1/chat/completions", headers={"content-type": "a"}),
        ),
    ):
        assert answer.status == int(status)
        told = document["paths"]["/v1/chat/completions"]["post"]["responses"][status]
        schema = told["content"]["application/json"]["schema"]
        schema = {**schema, "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json())


@pytest.mark.parametrize(
    ("field", "value", "fits"),
    [
        ("temperature", 2, True),
        ("temperature", 2.5, False),
        ("temperature", None, True),
        ("repetition_penalty", 0, False),
        ("n", 0, False),
        ("n", 128, True),
        ("stop", ["a"] * 33, False),
        ("stop", "a" * 33, True),
        ("stop_token_ids", [1] * 129, False),
        ("seed", 2**63, False),
        ("top_logprobs", 21, False),
        ("cache_salt", "", False),
        ("foo", {"unknown": True}, True),
    ],
)
async def test_ranges_are_those_that_are_checked(
    router: Router, field: str, value: Any, fits: bool
) -> None:
    document = await described(router)
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    messages = [{"role": "user", "content": "a"}]
    body = {"model": MODEL, "messages": messages, "logprobs": True, field: value}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == fits
    answer = await call(router.app, "POST", "/v1/chat/completions", body)
    assert answer.status == (200 if fits else 400)


async def test_what_is_always_refused_is_not_described(router: Router) -> None:
    schemas = (await described(router))["components"]["schemas"]
    assert "functions" not in schemas["ChatRequest"]["properties"]
    assert "truncate_prompt_tokens" in schemas["EmbeddingRequest"]["properties"]
    assert schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]


async def test_both_need_the_key(tmp_path: Path) -> None:
    keys = (hashlib.sha256(KEY.encode()).digest(),)
    async with router_parts(tmp_path / MODEL, lambda _: text_play("a"), keys=keys) as parts:
        for path in ("/openapi.json", "/docs"):
            assert (await call(parts.app, "GET", path)).status == 401
            assert (await call(parts.app, "GET", path, headers=KEYED)).status == 200
        document = (await call(parts.app, "GET", "/openapi.json", headers=KEYED)).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert operation["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert "401" in operation["responses"]
    assert "security" not in document["paths"]["/health"]["get"]


async def test_the_page_runs_its_own_script_and_nothing_else(router: Router) -> None:
    answer = await call(router.app, "GET", "/docs")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy == page_policy(answer.body.decode())
    assert "default-src 'none'" in policy
    assert policy.count("sha256-") == 2
    assert "unsafe" not in policy
    html = answer.body.decode()
    assert "innerHTML" not in html
    assert not re.search(r"(src|href)=|https?://", html)


def test_an_anthropic_route_tells_its_own_errors() -> None:
    about = About("Chat.", ChatRequest, anthropic=True)
    document = describe([Operation("POST", "/v1/messages", about, needs_key=True)], "1")
    content = document["paths"]["/v1/messages"]["post"]["responses"]["400"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/AnthropicError"}
    assert msgspec.json.encode(document)
