"""The OpenAPI description: made of the routes, their structs, and the table of ranges.

Owns the form of the document. Must not know paths or handlers: those come with the routes, so that
a route or a field that is added is described without a change here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from router.api import shapes
from router.api.options import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_PROMPTS,
    MAX_SALT_CHARS,
    MAX_STOP_IDS,
    MAX_STOPS,
    RANGES,
)
from router.api.schemas import REFUSED, GenerationRequest

OPENAPI_VERSION: Final = "3.1.0"
REFERENCE: Final = "#/components/schemas/{name}"

Schema = dict[str, Any]
_Refer = Callable[[type | None], Schema]

_IDS: Final[Schema] = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXT_FORMS: Final[list[Schema]] = [
    {"type": "string"},
    _IDS,
    {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
    {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
]
# Fields that are checked by hand: no type of theirs says what they take. (struct, field) -> schema
_BY_HAND: Final[Mapping[tuple[str, str], Schema]] = {
    ("CompletionRequest", "prompt"): {"anyOf": _TEXT_FORMS},
    ("EmbeddingRequest", "input"): {"anyOf": _TEXT_FORMS},
    ("ResponsesRequest", "input"): {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "object"}, "minItems": 1},
        ]
    },
}
_LENGTHS: Final[Mapping[str, Schema]] = {
    "stop": {"maxItems": MAX_STOPS},
    "stop_token_ids": {"maxItems": MAX_STOP_IDS},
    "logit_bias": {"maxProperties": MAX_BIASES},
    "cache_salt": {"minLength": 1, "maxLength": MAX_SALT_CHARS},
    "messages": {"minItems": 1},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
}
# keyword -> the type that a schema must have for the keyword to mean something there
_KEYWORD_TYPES: Final = {
    "maxItems": ("array",),
    "minItems": ("array",),
    "maxProperties": ("object",),
    "minLength": ("string",),
    "maxLength": ("string",),
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
}

_REASONS: Final = {
    400: "A field is missing, of the wrong type or out of range; `param` names it.",
    401: "No key, or none that this server knows.",
    403: "Not for this key, or not for this kind of caller.",
    404: "The model is not served here, or there is no such thing.",
    408: "The body took too long to arrive.",
    409: "Not possible in the state that things are in.",
    413: "The body, or one part of it, is larger than this server takes.",
    415: "The body is not JSON.",
    429: "This client alone asks for too much; see Retry-After.",
    500: "The server could not finish this request.",
    503: "Queue full, model loading, or no live engine; see Retry-After.",
    504: "The time limit passed that the operator has set.",
}
_OF_BODIES: Final = (400, 404, 408, 413, 415, 429, 500, 503, 504)


@dataclass(frozen=True, slots=True)
class About:
    """What a route says of itself.

    `answer` and `body` are structs, or None for "any JSON"; `chunk` is the data of its events where
    it can stream. `media_type` is the answer's if that is no JSON. `anthropic`: errors are told in
    that API's form; `for_anthropic` is another answer for clients that send `anthropic-version`.
    `errors` are statuses besides those that every body can lead to, `query` optional parameters;
    `requires` are fields that the body's struct leaves open.
    """

    summary: str
    body: type | None = None
    answer: type | None = None
    chunk: type | None = None
    media_type: str = "application/json"
    anthropic: bool = False
    errors: tuple[int, ...] = ()
    requires: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    for_anthropic: type | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One route as the router has it; `path` is Starlette's pattern."""

    method: str
    path: str
    about: About
    needs_key: bool


def describe(operations: Iterable[Operation], version: str) -> Schema:
    """The whole document, plain data."""
    operations = list(operations)
    structs: dict[type, None] = {shapes.Error: None}  # a dict keeps their order
    for operation in operations:
        about = operation.about
        kinds = (about.body, about.answer, about.chunk, about.for_anthropic)
        structs |= dict.fromkeys(kind for kind in kinds if kind is not None)
        if about.anthropic:
            structs[shapes.AnthropicError] = None
    found, components = msgspec.json.schema_components(structs, ref_template=REFERENCE)
    references = dict(zip(structs, found, strict=True))

    generating = {
        reference["$ref"].rpartition("/")[2]
        for kind, reference in references.items()
        if issubclass(kind, GenerationRequest)
    }

    def refer(kind: type | None) -> Schema:
        return {} if kind is None else references[kind]

    paths: dict[str, Schema] = {}
    for operation in operations:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, path, refer)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "router", "version": version, "description": _INTRODUCTION},
        "paths": paths,
        "components": {
            "schemas": {
                name: _told(name, schema, refused=REFUSED if name in generating else ())
                for name, schema in sorted(components.items())
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


_INTRODUCTION: Final = (
    "Language models behind the OpenAI API. Fields that are not described are ignored; null means "
    "absent. Every answer carries X-Request-Id, which a request may choose. A streamed answer is "
    "text/event-stream; a failure after its first byte is one more event."
)


def _operation(operation: Operation, path: str, refer: _Refer) -> Schema:
    about = operation.about
    answer = refer(about.answer)
    if about.for_anthropic is not None:
        answer = {"anyOf": [answer, refer(about.for_anthropic)]}
    content: Schema = {about.media_type: {"schema": answer}}
    if about.media_type != "application/json":
        content = {about.media_type: {"schema": {"type": "string"}}}
    if about.chunk is not None:
        content["text/event-stream"] = {
            "schema": {"type": "string"},
            "x-event-data": refer(about.chunk),
        }
    statuses = {*about.errors, *(_OF_BODIES if about.body is not None else ())}
    if operation.needs_key:
        statuses.add(401)
    error = refer(shapes.AnthropicError if about.anthropic else shapes.Error)
    if about.for_anthropic is not None:
        error = {"anyOf": [error, refer(shapes.AnthropicError)]}
    failed = {"application/json": {"schema": error}}
    told: Schema = {
        "summary": about.summary,
        "operationId": _operation_id(operation.method, path),
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **{
                str(status): {"description": _REASONS[status], "content": failed}
                for status in sorted(statuses)
            },
        },
    }
    parameters = [("path", name) for name in re.findall(r"{(\w+)}", path)]
    parameters += [("query", name) for name in about.query]
    if about.for_anthropic is not None:
        parameters.append(("header", "anthropic-version"))
    if parameters:
        told["parameters"] = [
            {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}
            for place, name in parameters
        ]
    if operation.method == "POST" and about.body is not None:
        body = refer(about.body)
        if about.requires:
            body = {"allOf": [body], "required": list(about.requires)}
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if operation.needs_key:
        told["security"] = [{"bearer": []}, {"x-api-key": []}]
    return told


def _operation_id(method: str, path: str) -> str:
    return "_".join([method.lower(), *re.findall(r"\w+", path)])


def _told(struct: str, schema: Schema, refused: Sequence[str]) -> Schema:
    """A struct's schema without what is always refused, with the ranges that are checked later."""
    fields: dict[str, Schema] = schema.get("properties", {})
    if not fields:
        return schema
    told = {
        name: _bounded(_BY_HAND.get((struct, name), field) if _is_any(field) else field, name)
        for name, field in fields.items()
        if name not in refused
    }
    return {**schema, "properties": told}


def _is_any(field: Schema) -> bool:
    return set(field) <= {"default"}


def _bounded(field: Schema, name: str) -> Schema:
    bounds = dict(_LENGTHS.get(name, {}))
    if name in RANGES:
        bounds["minimum"], bounds["maximum"] = RANGES[name]
    if name == "repetition_penalty":
        bounds = {"exclusiveMinimum": 0, "maximum": 2}
    return _with_bounds(field, bounds) if bounds else field


def _with_bounds(schema: Schema, bounds: Schema) -> Schema:
    """`schema`, each of its alternatives with the keywords that fit its type."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [_with_bounds(each, bounds) for each in schema["anyOf"]]}
    kind = schema.get("type")
    fitting = {
        keyword: value
        for keyword, value in bounds.items()
        if kind in _KEYWORD_TYPES.get(keyword, ("integer", "number"))
    }
    return {**schema, **fitting}
