"""Writes tests/data/schemas.json: 200 JSON schemas as clients send them, and at the edges.

`python -m tests.make_schemas` writes the file; a test compares it. Half of them are written by
hand, half are combinations drawn with a seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "data" / "schemas.json"
TOTAL = 200

Schema = dict[str, Any]


def obj(required: list[str] | None = None, **members: Schema) -> Schema:
    """An object as strict clients write it: closed, all members required unless told."""
    return {
        "type": "object",
        "properties": members,
        "required": list(members) if required is None else required,
        "additionalProperties": False,
    }


def text(**limits: Any) -> Schema:
    """A string."""
    return {"type": "string", **limits}


def whole(**limits: Any) -> Schema:
    """An integer."""
    return {"type": "integer", **limits}


def number(**limits: Any) -> Schema:
    """A number."""
    return {"type": "number", **limits}


def array(items: Schema, **limits: Any) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **limits}


def ref(name: str) -> Schema:
    """A reference to a definition."""
    return {"$ref": f"#/$defs/{name}"}


def maybe(schema: Schema) -> Schema:
    """Or null, as pydantic writes it."""
    return {"anyOf": [schema, {"type": "null"}]}


SHORT = text(maxLength=12)
FLAG: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}


def _scalars() -> dict[str, Schema]:
    schemas: dict[str, Schema] = {
        "null": NULL,
        "boolean": FLAG,
        "integer": whole(),
        "number": number(),
        "string": text(),
        "string-0": text(maxLength=0),
        "string-1": text(minLength=1, maxLength=1),
        "string-3-5": text(minLength=3, maxLength=5),
        "string-float-length": text(minLength=1.0, maxLength=4.0),
        "integer-1-6": whole(minimum=1, maximum=6),
        "integer-negative": whole(minimum=-20, maximum=-10),
        "integer-across-zero": whole(minimum=-7, maximum=12),
        "integer-from": whole(minimum=1000),
        "integer-to": whole(maximum=-3),
        "integer-exclusive": whole(exclusiveMinimum=9, exclusiveMaximum=12),
        "integer-fraction-bounds": whole(minimum=0.5, maximum=3.5),
        "integer-large": whole(minimum=0, maximum=2**53 - 1),
        "integer-multiple": whole(multipleOf=7),
        "integer-multiple-range": whole(multipleOf=25, minimum=100, maximum=1000),
        "integer-int32": whole(format="int32"),
        "integer-int64": whole(format="int64"),
        "number-unit": number(minimum=0, maximum=1),
        "number-exclusive": number(exclusiveMinimum=0, exclusiveMaximum=1),
        "number-fractions": number(minimum=-1.25, maximum=2.75),
        "number-narrow": number(minimum=0.1, maximum=0.3),
        "number-from": number(minimum=-273.15),
        "number-cents": number(multipleOf=0.01, minimum=0, maximum=100),
        "number-halves": number(multipleOf=0.5),
        "enum-strings": {"enum": ["red", "green", "blue"]},
        "enum-typed": text(enum=["low", "medium", "high"]),
        "enum-prefixes": {"enum": ["a", "ab", "abc", ""]},
        "enum-mixed": {"enum": [1, "1", 1.5, True, None, [1], {"a": 1}]},
        "enum-filtered": text(enum=["yes", 1, None]),
        "enum-escapes": {
            "enum": ['"', "\\", "\n", "/", "é", "你好", "😀", "\u2028", "\x00", "\x7f"]
        },
        "enum-numbers": {"enum": [0, -1, 1e-7, 123456.789, 1e15, 0.1]},
        "enum-long": {"enum": [f"value number {i}" for i in range(300)]},
        "const-string": {"const": "fixed"},
        "const-object": {"const": {"kind": "x", "list": [1, None, "é"]}},
        "const-empty": {"const": {}},
        "types": {"type": ["string", "null"], "maxLength": 6},
        "types-numbers": {"type": ["integer", "null"], "minimum": 3, "maximum": 5},
        "no-type-limits": {"minLength": 2, "maxLength": 4, "minimum": 5, "maxItems": 2},
    }
    return schemas


def _patterns() -> dict[str, Schema]:
    patterns = {
        "digits": r"^\d{4}$",
        "word": r"^\w{2,6}$",
        "space": r"^[a-z]+\s[a-z]+$",
        "plate": "^[A-Z]{1,3}-[0-9]{1,4}$",
        "alternatives": "^(cat|dog|bird)s?$",
        "semver": r"^(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})$",
        "hex-colour": "^#(?:[0-9a-fA-F]{3}){1,2}$",
        "phone": r"^\+[1-9]\d{6,14}$",
        "not-digits": r"^\D{3}$",
        "not-space": r"^\S{1,8}$",
        "negated": '^[^aeiou"\\\\]{2,4}$',
        "dot": "^a.c$",
        "quotes": '^"[a-z]*"$',
        "backslash": r"^C:\\[a-z]{1,5}$",
        "slash": "^/[a-z]+(/[a-z]+)*$",
        "non-ascii": "^[äöü]{1,3}ß?$",
        "emoji": "^😀+$",
        "begins": "^ab",
        "ends": "[a-y]z$",
        "either-end": "^a|b$",
        "newline": r"^a\nb$",
        "dash-in-class": r"^[\w.-]{1,10}$",
        "optional": "^(a(b(c)?)?)?$",
    }
    schemas = {f"pattern-{name}": text(pattern=pattern) for name, pattern in patterns.items()}
    schemas["pattern-lengths"] = text(pattern="^[ab]*c?$", minLength=2, maxLength=5)
    schemas["pattern-two"] = {"allOf": [text(pattern="^a"), text(pattern="z$", maxLength=6)]}
    return schemas


def _formats() -> dict[str, Schema]:
    names = ["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6"]
    names += ["uuid", "uri", "password"]
    schemas = {f"format-{name}": text(format=name) for name in names}
    schemas["format-and-length"] = text(format="email", maxLength=20)
    schemas["format-and-pattern"] = text(format="date", pattern="^20[0-9]{2}-")
    schemas["format-no-type"] = {"format": "date"}
    return schemas


def _lists_and_objects() -> dict[str, Schema]:
    tags = array(text(maxLength=6), maxItems=4)
    return {
        "list": array(whole(minimum=0, maximum=99)),
        "list-2-3": array(FLAG, minItems=2, maxItems=3),
        "list-exactly-0": array(FLAG, maxItems=0),
        "list-of-lists": array(array({"enum": [0, 1]}, maxItems=3), minItems=1, maxItems=3),
        "list-untyped": {"type": "array", "maxItems": 2},
        "list-not-unique": array({"enum": [1, 2]}, uniqueItems=False, maxItems=4),
        "tuple": {"type": "array", "prefixItems": [SHORT, whole(maximum=9)], "items": False},
        "tuple-full": {"type": "array", "prefixItems": [FLAG, NULL], "items": False, "minItems": 2},
        "tuple-rest": {"type": "array", "prefixItems": [NULL], "items": FLAG, "maxItems": 4},
        "object-empty": obj(),
        "object-any": {"type": "object"},
        "object-open": {"type": "object", "properties": {"a": FLAG}, "required": ["a"]},
        "object-optional": obj([], a=FLAG, b=whole(maximum=5), c=NULL),
        "object-mixed": obj(["b"], a=FLAG, b=SHORT, c=NULL),
        "object-map": {"type": "object", "additionalProperties": whole(minimum=0, maximum=9)},
        "object-map-zod": {
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": FLAG,
        },
        "object-rest": {**obj(["id"], id=whole()), "additionalProperties": SHORT},
        "object-required-extra": {"type": "object", "required": ["x"], "properties": {"y": NULL}},
        "object-pattern-keys": {
            "type": "object",
            "patternProperties": {"^x_[a-z]{1,3}$": FLAG},
            "additionalProperties": False,
        },
        "object-pattern-and-names": {
            "type": "object",
            "properties": {"x_id": {"const": True}, "n": NULL},
            "patternProperties": {"^x_": FLAG},
            "required": ["x_id"],
            "additionalProperties": False,
        },
        "object-at-least-1": {**obj([], a=FLAG, b=NULL), "minProperties": 1},
        "object-at-most-1": {"type": "object", "additionalProperties": NULL, "maxProperties": 1},
        "object-forbidden-member": {
            "type": "object",
            "properties": {"a": False, "b": FLAG},
            "required": ["b"],
            "additionalProperties": NULL,
        },
        "object-odd-names": obj(
            **{"": NULL, "a b": FLAG, 'q"q': NULL, "$ref": NULL, "é": FLAG, "x-guidance": NULL}
        ),
        "object-keyword-names": {
            "type": "object",
            "properties": {"type": SHORT, "properties": FLAG, "required": NULL, "not": NULL},
            "required": ["type", "required"],
            "additionalProperties": False,
        },
        "nested-5": obj(a=obj(b=obj(c=obj(d=obj(e=whole(maximum=3)))))),
        "product": obj(name=SHORT, price=number(minimum=0, maximum=1000), tags=tags),
        "wide": obj(**{f"field_{i:02}": FLAG for i in range(12)}),
        "anything": {},
    }


def _combined() -> dict[str, Schema]:
    person = obj(name=SHORT, age=whole(minimum=0, maximum=120))
    cat = obj(kind={"const": "cat"}, lives=whole(minimum=1, maximum=9))
    dog = obj(kind={"const": "dog"}, good=FLAG)
    tree = obj(value=whole(maximum=9), children=array(ref("node"), maxItems=2))
    expression: Schema = {"anyOf": [whole(maximum=9), obj(left=ref("e"), right=ref("e"))]}
    return {
        "any-of": {"anyOf": [SHORT, whole(), NULL]},
        "any-of-limits": {"anyOf": [text(), whole()], "maxLength": 3, "minimum": 7},
        "one-of-types": {"oneOf": [whole(), SHORT]},
        "one-of-discriminated": {
            "oneOf": [cat, dog],
            "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/cat"}},
        },
        "one-of-refs": {"oneOf": [ref("cat"), ref("dog")], "$defs": {"cat": cat, "dog": dog}},
        "all-of-ranges": {"allOf": [whole(minimum=3), whole(maximum=8)]},
        "all-of-objects": {
            "allOf": [
                {"type": "object", "properties": {"a": FLAG}, "required": ["a"]},
                {"type": "object", "properties": {"b": NULL}, "required": ["b"]},
            ]
        },
        "all-of-one": {
            "allOf": [ref("p")],
            "description": "as old pydantic",
            "$defs": {"p": person},
        },
        "nullable": obj(nick=maybe(SHORT), age=maybe(whole(minimum=0, maximum=9))),
        "nullable-openapi": {"type": "string", "nullable": True, "maxLength": 5},
        "definitions": {"$ref": "#/definitions/p", "definitions": {"p": person}},
        "ref-with-limits": {"$ref": "#/$defs/s", "maxLength": 3, "$defs": {"s": text(minLength=2)}},
        "ref-to-member": {
            "type": "object",
            "properties": {"a": whole(maximum=5), "b": {"$ref": "#/properties/a"}},
            "required": ["b"],
            "additionalProperties": False,
        },
        "ref-escaped": {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": FLAG}},
        "ref-root": obj(["v"], v=FLAG, next={"$ref": "#"}),
        "ref-chain": {
            "$ref": "#/$defs/a",
            "$defs": {"a": ref("b"), "b": ref("c"), "c": {"enum": ["end"]}},
        },
        "tree": {"$ref": "#/$defs/node", "$defs": {"node": tree}},
        "expression": {"$ref": "#/$defs/e", "$defs": {"e": expression}},
        "linked-list": {
            "$ref": "#/$defs/n",
            "$defs": {"n": obj(v=FLAG, next=maybe(ref("n")))},
        },
        "pydantic": {
            "$defs": {
                "Address": {
                    **obj(street=text(maxLength=10, title="Street"), zip=text(pattern=r"^\d{5}$")),
                    "title": "Address",
                },
                "Level": text(enum=["junior", "senior"], title="Level"),
            },
            **obj(
                ["name", "address"],
                name=text(title="Name", maxLength=8),
                level={"$ref": "#/$defs/Level", "default": "junior"},
                address=ref("Address"),
                joined={**maybe(text(format="date")), "default": None, "title": "Joined"},
            ),
            "title": "Employee",
            "description": "Someone who works here.",
        },
        "annotations": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$id": "https://example.com/thing.json",
            "$comment": "none of this limits anything",
            "title": "T",
            "description": "D",
            "default": {},
            "examples": [{"a": 1}],
            "deprecated": True,
            "readOnly": True,
            "x-order": 3,
            **obj(a=text(maxLength=3, contentEncoding="base64", writeOnly=True)),
        },
        "weather-call": obj(
            location=text(description="City and state", maxLength=15),
            unit=text(enum=["celsius", "fahrenheit"]),
            days=whole(minimum=1, maximum=7),
        ),
        "steps": obj(
            steps=array(obj(explanation=SHORT, output=SHORT), minItems=1, maxItems=3),
            final_answer=SHORT,
        ),
        "entities": array(
            obj(
                span=SHORT,
                label=text(enum=["person", "place", "date"]),
                score=number(minimum=0, maximum=1),
            ),
            maxItems=2,
        ),
    }


def _drawn_scalar(rng: random.Random) -> Schema:
    low, size = rng.randint(-1000, 1000), rng.randint(0, 500)
    digits = rng.choice((1, 2, 3))
    return rng.choice(
        [
            FLAG,
            NULL,
            SHORT,
            whole(minimum=low, maximum=low + size),
            whole(exclusiveMinimum=low, exclusiveMaximum=low + size + 2),
            number(minimum=round(low / 7, digits), maximum=round((low + size) / 7 + 1, digits)),
            number(exclusiveMinimum=round(low / 3, digits)),
            whole(multipleOf=rng.randint(2, 60), minimum=low),
            text(minLength=size % 3, maxLength=3 + size % 5),
            text(pattern=rng.choice([r"^\d+$", "^[a-f]{2,8}$", "^(yes|no)$", "x", r"^\w+@\w+$"])),
            text(format=rng.choice(["date", "time", "ipv4", "uuid", "date-time"])),
            {"enum": rng.sample(["a", "b", 1, 2.5, None, False, "é", [], {"k": "v"}], 3)},
            {"const": rng.choice(["c", 17, -0.5, True, [None], {"a": {"b": []}}])},
        ]
    )


def _drawn(rng: random.Random, depth: int) -> Schema:
    if depth == 0 or rng.random() < 0.25:
        return _drawn_scalar(rng)
    kind = rng.randrange(6)
    if kind < 2:
        names = rng.sample(["id", "name", "value", "items", "é", "a.b", "note"], rng.randint(1, 4))
        members = {name: _drawn(rng, depth - 1) for name in names}
        schema = obj([name for name in names if rng.random() < 0.6], **members)
        rest = rng.choice([False, False, False, _drawn_scalar(rng)])
        return {**schema, "additionalProperties": rest}
    if kind == 2:
        least = rng.randint(0, 2)
        return array(_drawn(rng, depth - 1), minItems=least, maxItems=least + rng.randint(0, 2))
    if kind == 3:
        return {"anyOf": [_drawn(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == 4:
        return maybe(_drawn(rng, depth - 1))
    first = [_drawn(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": rng.randint(0, 1)}


def schemas() -> dict[str, Schema]:
    """All 200, by name."""
    named = {**_scalars(), **_patterns(), **_formats(), **_lists_and_objects(), **_combined()}
    rng = random.Random(2026)
    drawn = 0
    while len(named) < TOTAL:
        schema = _drawn(rng, 1 + drawn % 3)
        if drawn % 5 == 4:
            schema = {"$defs": {"part": schema}, **obj(["a"], a=ref("part"), b=ref("part"))}
        named[f"drawn-{drawn:02}"] = schema
        drawn += 1
    return named


def rendered() -> str:
    """The file's text: one schema a line."""
    lines = (
        f"{json.dumps(name)}: {json.dumps(schema, ensure_ascii=True)}"
        for name, schema in schemas().items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    PATH.write_text(rendered(), encoding="utf-8")
