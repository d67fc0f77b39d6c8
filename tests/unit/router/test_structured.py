"""Every spelling of the form that an answer must have, and what each refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from router.api.structured import Structured, from_format, grammar_of
from router.errors import MAX_MESSAGE_CHARS, BadRequest
from router.text.grammar import make
from tests.sampling import Sampler

FIELDS = (
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
    *("guided_grammar", "guided_json_object", "guided_whitespace_pattern"),
    *("json_schema", "regex", "ebnf", "grammar"),
)
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
LARK = 'start: "on" | "off"'
GBNF = 'root ::= "on" | "off"'


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler()


def asked(**fields: Any) -> Structured | None:
    return grammar_of(make, SimpleNamespace(**{**dict.fromkeys(FIELDS), **fields}))


def refusal(**fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        asked(**fields)
    return caught.value


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "param", "yes", "no"),
    [
        ({"response_format": json_schema(POINT)}, "response_format", '{"x":1}', "{}"),
        ({"response_format": json_schema(POINT, strict=True)}, "response_format", '{"x":1}', "1"),
        ({"response_format": json_schema(POINT, strict=None)}, "response_format", '{"x":1}', "1"),
        ({"response_format": json_schema({})}, "response_format", "[1]", "x"),
        ({"response_format": {"type": "json_object"}}, "response_format", '{"a":[]}', "[]"),
        (
            {"response_format": {"type": "json_object", "schema": POINT}},
            "response_format",
            '{"x":1}',
            "{}",
        ),
        (
            {"response_format": {"type": "json_schema", "schema": POINT}},
            "response_format",
            '{"x":1}',
            "{}",
        ),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, "response_format", "aa", "b"),
        ({"response_format": {"type": "grammar", "grammar": LARK}}, "response_format", "on", "no"),
        ({"structured_outputs": {"json": POINT}}, "structured_outputs.json", '{"x":1}', "{}"),
        (
            {"structured_outputs": {"json": json.dumps(POINT)}},
            "structured_outputs.json",
            '{"x":1}',
            "{}",
        ),
        ({"structured_outputs": {"regex": r"\d+"}}, "structured_outputs.regex", "12", "a"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs.choice", "b", "c"),
        ({"structured_outputs": {"grammar": LARK}}, "structured_outputs.grammar", "off", "no"),
        (
            {"structured_outputs": {"json_object": True}},
            "structured_outputs.json_object",
            "{}",
            "1",
        ),
        ({"guided_json": POINT}, "guided_json", '{"x":1}', "{}"),
        ({"guided_json": json.dumps(POINT)}, "guided_json", '{"x":1}', "{}"),
        ({"guided_json": {}}, "guided_json", "[null]", "nul"),
        ({"guided_regex": "^a{2}$"}, "guided_regex", "aa", "a"),
        ({"guided_choice": ["a", "b"]}, "guided_choice", "a", "ab"),
        ({"guided_grammar": GBNF}, "guided_grammar", "on", "no"),
        ({"guided_json_object": True}, "guided_json_object", "{}", "[]"),
        ({"json_schema": POINT}, "json_schema", '{"x":1}', "{}"),
        ({"json_schema": json.dumps(POINT)}, "json_schema", '{"x":1}', "{}"),
        ({"regex": "a|b"}, "regex", "b", "c"),
        ({"ebnf": GBNF}, "ebnf", "off", "no"),
        ({"grammar": GBNF}, "grammar", "off", "no"),
        ({"grammar": LARK}, "grammar", "off", "no"),
    ],
)
def test_each_spelling(
    fields: dict[str, Any], param: str, yes: str, no: str, sampler: Sampler
) -> None:
    structured = asked(**fields)
    assert structured is not None
    assert structured.param == param
    assert sampler.accepts(structured.grammar, yes)
    assert not sampler.accepts(structured.grammar, no)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "regex": "", "json_object": False}},
        {"structured_outputs": {"disable_additional_properties": False}},
        {"guided_json_object": False, "guided_regex": "", "grammar": "", "json_schema": ""},
    ],
)
def test_what_asks_for_nothing(fields: dict[str, Any]) -> None:
    assert asked(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": []}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": ["text"]}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": 1}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": json_schema({"type": "strng"})}, "response_format.json_schema.schema"),
        (
            {"response_format": json_schema({"$defs": {"q": {"$defs": {"p": 1}}}})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": json_schema({"type": ["bogus"]})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": json_schema({"pattern": "^(?=a)b$"})},
            "response_format.json_schema.schema",
        ),
        ({"response_format": json_schema("{}")}, "response_format.json_schema.schema"),
        ({"response_format": json_schema([])}, "response_format.json_schema.schema"),
        ({"response_format": json_schema({}, name=1)}, "response_format.json_schema.name"),
        ({"response_format": json_schema({}, strict="yes")}, "response_format.json_schema.strict"),
        (
            {"response_format": json_schema({}, description=1)},
            "response_format.json_schema.description",
        ),
        ({"response_format": {"type": "json_object", "schema": 1}}, "response_format.schema"),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"response_format": {"type": "grammar"}}, "response_format.grammar"),
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"structured_outputs": {"json": 1}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 5000}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": {}}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        (
            {"structured_outputs": {"disable_additional_properties": True}},
            "structured_outputs.disable_additional_properties",
        ),
        ({"guided_json": 1}, "guided_json"),
        ({"guided_json": "not json"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_regex": "(["}, "guided_regex"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        ({"guided_json_object": 1}, "guided_json_object"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_whitespace_pattern": ""}, "guided_whitespace_pattern"),
        ({"json_schema": []}, "json_schema"),
        ({"json_schema": {"not": {}}}, "json_schema"),
        ({"regex": "(["}, "regex"),
        ({"ebnf": 3}, "ebnf"),
        ({"grammar": "start: %json {}"}, "grammar"),
        ({"regex": "a", "grammar": LARK}, "grammar"),
    ],
)
def test_each_refusal_names_its_field(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert error.status == 400
    assert f"'{param}'" in error.message


def test_two_forms_are_refused_by_both_names() -> None:
    error = refusal(response_format={"type": "json_object"}, guided_regex="a")
    assert error.param == "guided_regex"
    assert "'response_format'" in error.message
    error = refusal(structured_outputs={"regex": "a", "choice": ["a"]})
    assert error.param == "structured_outputs.choice"
    assert "'structured_outputs.regex'" in error.message
    assert asked(response_format={"type": "text", "x": 1}, regex="a") is not None


def test_a_refused_keyword_is_named_with_its_place() -> None:
    schema = {"type": "object", "properties": {"year": {"type": "string", "pattern": "(?=a)"}}}
    message = refusal(response_format=json_schema(schema)).message
    assert "'properties.year.pattern' has a look-ahead" in message


class Address(BaseModel):
    street: str
    zip: int | None = None


class Employee(BaseModel):
    """Someone."""

    name: str
    home: Address
    others: list[Address]


def test_what_clients_make_of_pydantic_models(sampler: Sampler) -> None:
    schema = Employee.model_json_schema()
    structured = asked(response_format=json_schema(schema, strict=True))
    assert structured is not None
    assert sampler.accepts(
        structured.grammar,
        '{"name": "A", "home": {"street": "B", "zip": null}, "others": [{"street": "C"}]}',
    )


def test_the_formats_of_other_routes(sampler: Sampler) -> None:
    for kind, param in (("text.format", "text.format"), ("output_config.format", "x.format")):
        structured = from_format(
            make, {"type": "json_schema", "name": kind, "schema": POINT}, param
        )
        assert structured is not None
        assert structured.param == param
        assert sampler.accepts(structured.grammar, '{"x":1}')
    assert from_format(make, None, "text.format") is None
    assert from_format(make, {"type": "text"}, "text.format") is None
    with pytest.raises(BadRequest) as caught:
        from_format(make, {"type": "json_schema", "schema": {"not": {}}}, "text.format")
    assert caught.value.param == "text.format.schema"


words = st.sampled_from(
    [
        *("type", "properties", "items", "$ref", "$defs", "enum", "const", "anyOf", "oneOf"),
        *("allOf", "pattern", "format", "required", "minimum", "maxLength", "multipleOf", "schema"),
        *("json_schema", "json_object", "json", "regex", "choice", "grammar", "object", "string"),
        *("integer", "array", "#", "#/$defs/a", "a", "x*", "date", "(", "start: a", "root ::= a"),
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=2), values)
def test_any_json_gives_a_grammar_or_our_error(fields: dict[str, Any], schema: Any) -> None:
    attempts = [fields, {"json_schema": schema}, {"response_format": json_schema(schema)}]
    errors: list[BadRequest] = []
    for attempt in attempts:
        try:
            asked(**attempt)
        except BadRequest as error:
            errors.append(error)
    assert all(error.param and len(error.message) < MAX_MESSAGE_CHARS for error in errors)
