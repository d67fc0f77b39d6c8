"""Requests made from our own /openapi.json, right ones and wrong ones, against the whole router.

Whatever is sent: the status is one that the document names for that route, the body has the form
that it names for that status, and what is refused has not reached an engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import jsonschema
import pytest
import requests
import schemathesis
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.router_parts import Answer, Router, call, router_parts, text_play

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_CASES = 500  # in all
BASE_URL = "http://127.0.0.1"
# What the transport may refuse before a route is asked, and what hypothesis can do with a path.
EVERYWHERE = {404, 405}
_WORDS = {"type": "string", "minLength": 1, "maxLength": 40, "pattern": "^[a-z ]+$"}
_ROLES = {"enum": ["user", "assistant"]}
# Of these fields, where there are several, the first one is given.
_TEXTS = ("input", "prompt", "messages")
_SENSIBLE: dict[str, Any] = {
    "input": _WORDS,
    "prompt": _WORDS,
    "messages": {
        "type": "array",
        "minItems": 1,
        "maxItems": 4,
        "items": {
            "type": "object",
            "properties": {"role": _ROLES, "content": _WORDS},
            "required": ["role", "content"],
            "additionalProperties": False,
        },
    },
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 16, "maximum": 143}},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 20},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
    "temperature": {"type": "number", "minimum": 0, "maximum": 1},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "stream": {"type": "boolean"},
    "stop": _WORDS,
    "echo": {"type": "boolean"},
    "user": _WORDS,
    "encoding_format": {"enum": ["float", "base64"]},
}


@dataclass(frozen=True)
class Service:
    """The router, its loop, and the document that it gives."""

    portal: BlockingPortal
    router: Router
    document: dict[str, Any]

    def send(self, case: schemathesis.Case) -> Answer:
        """The case's request, byte for byte, to the application."""
        request = requests.Request(**case.as_transport_kwargs(base_url=BASE_URL)).prepare()
        body = request.body or b""
        raw = body.encode() if isinstance(body, str) else body
        headers = {str(name): str(value) for name, value in request.headers.items()}
        path = unquote(urlsplit(str(request.url)).path)
        method = str(request.method)
        send = partial(call, self.router.app, method, path, headers=headers, raw=raw)
        return self.portal.call(send)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("model")
    with start_blocking_portal() as portal:
        parts = router_parts(folder, lambda _: text_play("Hello", " there"))
        with portal.wrap_async_context_manager(parts) as router:
            answer: Answer = portal.call(call, router.app, "GET", "/openapi.json")
            yield Service(portal, router, answer.json())


def resolved(document: dict[str, Any], node: Any) -> Any:
    """The node, or what it refers to."""
    while isinstance(node, dict) and "$ref" in node:
        target = document
        for key in node["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        node = target
    return node


def check_form(document: dict[str, Any], response: Any, answer: Answer) -> None:
    """The content type is one that is named, and JSON is valid against its schema."""
    content = resolved(document, response).get("content", {})
    if not content:
        return
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content, f"{kind} is not among {sorted(content)}"
    if kind == "application/json" and "schema" in content[kind]:
        schema = {**content[kind]["schema"], "components": document.get("components", {})}
        jsonschema.Draft202012Validator(schema).validate(answer.json())
    if kind == "text/event-stream":
        assert answer.ended


def check(service: Service, case: schemathesis.Case) -> int:
    """One request and everything that must hold for its answer. Returns the status."""
    submits = service.router.engines.submits
    before = len(submits)
    answer = service.send(case)
    told = f"{answer.status} {answer.body[:300]!r}\n{case.as_curl_command()}"
    assert answer.status < 500, told
    responses = case.operation.definition.raw["responses"]
    named = responses.get(str(answer.status))
    assert named is not None or answer.status in EVERYWHERE, f"not documented: {told}"
    if answer.status >= 400:
        assert len(submits) == before, f"an engine was asked: {told}"
        assert answer.headers["content-type"] == "application/json", told
        assert len(answer.body) < 8192, told
    if named is not None:
        check_form(service.document, named, answer)
    return answer.status


def with_names(node: Any, names: list[str]) -> Any:
    """The document for one who has seen the list of models: any other name is but a 404."""
    if isinstance(node, list):
        return [with_names(entry, names) for entry in node]
    if not isinstance(node, dict):
        return node
    changed = {key: with_names(value, names) for key, value in node.items()}
    if "model" in changed.get("properties", {}):
        changed["properties"]["model"] = {"enum": names}
    if changed.get("in") == "path":
        changed["schema"] = {"enum": names}
    return changed


def sensible(document: dict[str, Any]) -> dict[str, Any]:
    """The document with what most programs send, and nothing else."""
    document = deepcopy(document)
    for path in document["paths"].values():
        for operation in path.values():
            body = operation.get("requestBody")
            if body is None:
                continue
            content = body["content"]["application/json"]
            schema = content["schema"]
            known = resolved(document, schema.get("allOf", [schema])[0])["properties"]
            texts = [name for name in _TEXTS if name in known]
            others = texts[1:]
            fields = {
                name: _SENSIBLE.get(name, known[name])
                for name in known
                if name == "model" or (name in _SENSIBLE and name not in others)
            }
            needed = ("model", *texts[:1], "max_tokens", "tokens")
            required = [name for name in needed if name in fields]
            content["schema"] = {
                "type": "object",
                "properties": fields,
                "required": required,
                "additionalProperties": False,
            }
    return document


def plain(value: Any) -> Any:
    """12.0 as 12: to JSON Schema it is an integer, most programs write it so, and we want it so."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def operations(document: dict[str, Any], mode: GenerationMode) -> list[Any]:
    """All that have something to vary."""
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(modes=[mode])
    found = [result.ok() for result in schema.get_all_operations()]
    return [one for one in found if one.body or (mode.is_positive and one.path_parameters)]


@pytest.mark.parametrize("kind", ["sensible", "described", "wrong"])
def test_r14_requests_made_from_our_own_document(service: Service, kind: str) -> None:
    """What programs send, everything that fits the description, and what doesn't fit it."""
    mode = GenerationMode.NEGATIVE if kind == "wrong" else GenerationMode.POSITIVE
    document = with_names(service.document, list(service.router.model.names))
    chosen = operations(sensible(document) if kind == "sensible" else document, mode)
    assert len(chosen) >= 5
    statuses: list[int] = []

    def send(case: schemathesis.Case) -> None:
        if kind == "sensible":
            case.body = plain(case.body)
        statuses.append(check(service, case))

    for operation in chosen:  # half more than the share of each: some have few different ones
        strategy = operation.as_strategy(generation_mode=mode)
        fuzz(strategy, -(-NUM_CASES // (len(chosen) * 2)), send)
    assert len(statuses) >= NUM_CASES // 3
    if kind == "sensible":
        # By chance a body now and then holds what no model can do: 158 of 176 were answered once.
        assert statuses.count(200) > 0.75 * len(statuses)


def fuzz(strategy: Any, num_examples: int, body: Callable[[schemathesis.Case], object]) -> None:
    """Runs `body` on that many cases; always the same ones in CI."""

    @given(case=strategy)
    @settings(
        max_examples=num_examples,
        derandomize=os.environ.get("HYPOTHESIS_PROFILE") == "ci",
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    def play(case: schemathesis.Case) -> None:
        body(case)

    play()
