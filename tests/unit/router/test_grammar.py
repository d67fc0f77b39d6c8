"""Grammars of schemas, patterns, choices and Lark: what follows them, and what is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from router.errors import GrammarError
from router.text import json_schema, patterns
from router.text.grammar import (
    MAX_CHOICES,
    after_thinking,
    checked,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    json_schema_rule,
    lark_grammar,
    regex_grammar,
)
from router.text.json_schema import enforceable
from router.text.patterns import repeated_size
from tests import make_schemas
from tests.judging import faults
from tests.sampling import Sampler

SCHEMAS: dict[str, dict[str, Any]] = json.loads(make_schemas.PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler()


def refusal(schema: Any) -> str:
    with pytest.raises(GrammarError) as caught:
        json_schema_grammar(schema)
    return caught.value.message


def test_the_file_of_schemas_is_what_its_script_writes() -> None:
    assert make_schemas.PATH.read_text(encoding="utf-8") == make_schemas.rendered()
    assert len(SCHEMAS) == 200


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_texts_satisfy_the_schema(name: str, sampler: Sampler) -> None:
    schema = SCHEMAS[name]
    grammar = json_schema_grammar(schema)
    rng = random.Random(name)
    for _ in range(2):
        text, ended = sampler.draw(grammar, rng)
        if ended:
            assert faults(schema, text) == [], text


@pytest.mark.slow
def test_many_random_texts_satisfy_each_schema(sampler: Sampler) -> None:
    ended_of: dict[str, int] = {}
    for name, schema in SCHEMAS.items():
        grammar = json_schema_grammar(schema)
        rng = random.Random(f"{name} again")
        texts = [sampler.draw(grammar, rng, most=300) for _ in range(8)]
        ended_of[name] = sum(ended for _, ended in texts)
        assert [faults(schema, text) for text, ended in texts if ended] == [[]] * ended_of[name]
    # A pattern that may begin with anything is rarely met by chance.
    assert sum(count > 0 for count in ended_of.values()) >= 195
    assert sum(ended_of.values()) > 0.9 * 8 * len(SCHEMAS)


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        ({"type": "string", "pattern": r"^\d{4}$"}, ['"2024"'], ['"202"', '"٢٠٢٤"']),
        ({"type": "string", "pattern": r"^\w\s$"}, ['"a "'], ['"é "', '"aa"']),
        ({"type": "string", "pattern": "^a|b$"}, ['"a"', '"xb"', '"ax"'], ['"x"']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"0000-01-01"']),
        ({"type": "string", "format": "date"}, ['"2000-02-29"'], ['"1900-02-29"', '"2023-04-31"']),
        ({"type": "string", "format": "time"}, ['"23:59:59Z"'], ['"23:59:60Z"', '"12:00:00"']),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3", "4.0"]),
        ({"type": "integer", "format": "int32"}, ["2147483647"], ["2147483648"]),
        ({"type": "integer", "maximum": 2**53 - 1}, [str(2**53 - 1)], [str(2**53)]),
        ({"type": "object"}, ["{}", '{"a":1,"b":[{}]}'], ["[]", '{"a":}', "{"]),
        ({"type": "string"}, ['"é"', '"\\n"', '"\\u0001"'], ['"\\ud800"', '"', '"\n"']),
        ({"type": "array", "items": [{"const": 1}], "additionalItems": False}, ["[1]"], ["[1,2]"]),
        ({"type": "array", "items": [{"const": 1}], "additionalItems": False}, ["[]"], ["[2]"]),
        ({"properties": {"a": False}, "type": "object"}, ['{"b":1}'], ['{"a":1}']),
        ({"x-guidance": {"whitespace_flexible": False}, "type": "object"}, ["{ }"], []),
        ({"$defs": {"a": {"type": "null"}}, "$ref": "#/$defs/a"}, ["null"], ["1"]),
        ({"allOf": [{"const": 1}], "format": "date"}, ["1"], ["2"]),
    ],
)
def test_what_follows_a_schema(
    schema: dict[str, Any], yes: list[str], no: list[str], sampler: Sampler
) -> None:
    grammar = json_schema_grammar(schema)
    assert [text for text in yes if not sampler.accepts(grammar, text)] == []
    assert [text for text in no if sampler.accepts(grammar, text)] == []


def test_white_space_is_bounded(sampler: Sampler) -> None:
    grammar = json_schema_grammar({"type": "object"})
    assert sampler.accepts(grammar, "{\n      }")
    assert not sampler.accepts(grammar, "{" + " " * 9 + "}")
    assert not sampler.accepts(grammar, "{} ")
    assert not sampler.accepts(grammar, " {}")
    assert not sampler.accepts(json_object_grammar(), "{" + " " * 9 + "}")


@pytest.mark.parametrize("keyword", sorted(json_schema.REFUSED))
def test_keywords_that_cannot_be_enforced(keyword: str) -> None:
    assert f"'properties.a.{keyword}' cannot" in refusal(
        {"type": "object", "properties": {"a": {keyword: {"type": "string"}}}}
    )
    # As a name, and in a constant, the same word limits nothing.
    json_schema_grammar({"type": "object", "properties": {keyword: {"const": {keyword: 1}}}})


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], "must be an object"),
        (True, "must be an object"),
        ({"type": "strng"}, "'type' must be one or several of"),
        ({"type": ["bogus"]}, "'type' must be"),
        ({"type": []}, "'type' must be"),
        ({"type": {}}, "'type' must be"),
        ({"$defs": {"q": {"$defs": {"p": 1}}}}, "'$defs.q.$defs.p' must be an object"),
        ({"$defs": {"unused": {"type": "strng"}}}, "'$defs.unused.type'"),
        ({"definitions": []}, "'definitions' must be an object"),
        ({"properties": []}, "'properties' must be an object"),
        ({"properties": {"a": 1}}, "'properties.a' must be an object (a schema)"),
        ({"items": 1}, "'items' must be an object"),
        ({"prefixItems": [{}], "items": [{}]}, "'items' must be a schema beside"),
        ({"anyOf": []}, "'anyOf' must be a list of schemas"),
        ({"oneOf": {}}, "'oneOf' must be a list of schemas"),
        ({"allOf": [None]}, "'allOf.0' must be an object"),
        ({"enum": []}, "'enum' must be a list"),
        ({"enum": "a"}, "'enum' must be a list"),
        ({"required": "a"}, "'required' must be a list of names"),
        ({"required": [1]}, "'required' must be a list of names"),
        ({"maxLength": -1}, "'maxLength' must be a whole number"),
        ({"maxLength": 1.5}, "'maxLength' must be a whole number"),
        ({"maxLength": True}, "'maxLength' must be a whole number"),
        ({"maxLength": 10**10}, "'maxLength' is too large"),
        ({"minLength": 10**6}, "'minLength' is too large"),
        ({"minimum": "1"}, "'minimum' must be a number"),
        ({"minimum": True}, "'minimum' must be a number"),
        ({"minimum": -(2**63)}, "'minimum' is too large"),
        ({"const": -(2**63)}, "'const' is too large"),
        ({"const": -(2**63) + 1}, "'const' is too large"),
        ({"enum": [{"a": [2**53]}]}, "'enum' is too large"),
        ({"multipleOf": 0}, "'multipleOf' must be above 0"),
        ({"multipleOf": 1000003}, "'multipleOf' cannot be enforced"),
        ({"multipleOf": 123.4567}, "'multipleOf' cannot be enforced"),
        ({"multipleOf": 1e-9}, "'multipleOf' cannot be enforced"),
        ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "'multipleOf' cannot"),
        ({"pattern": 1}, "'pattern' must be a string"),
        ({"pattern": "("}, "'pattern' is not a valid regular expression"),
        ({"pattern": "^(?=a)b$"}, "'pattern' has a look-ahead"),
        ({"items": {"pattern": r"^(a)\1$"}}, "'items.pattern' has a back reference"),
        ({"pattern": r"\ba"}, "'pattern' has a look-ahead, a look-behind, \\b"),
        ({"pattern": "a^b"}, "'pattern' has"),
        ({"pattern": "x" * 1001}, "'pattern' is longer than 1000"),
        ({"pattern": "(a{1000}){1000}"}, "'pattern' repeats too much"),
        ({"patternProperties": {"(": {}}}, "'patternProperties.(' is not a valid"),
        ({"patternProperties": {"a": {}, "b": {}}}, "whose patterns can match the same name"),
        ({"format": "made-up"}, "'format' cannot be enforced; known formats are date,"),
        ({"format": []}, "'format' must be a string"),
        ({"uniqueItems": True}, "'uniqueItems' cannot be enforced"),
        ({"propertyNames": {"pattern": "^a"}}, "'propertyNames' cannot be enforced"),
        ({"minProperties": 2}, "'minProperties' above 1 needs"),
        ({"$ref": "http://a/b"}, "'$ref' must point into this schema"),
        ({"$ref": "#name"}, "'$ref' must point into this schema"),
        ({"$ref": 1}, "'$ref' must point into this schema"),
        ({"$ref": "#/$defs/x"}, "'$ref' points to nothing"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"allOf": [{"$ref": "#"}, {"type": "object"}]}, "leads back to itself"),
        ({"items": {"$id": "a", "items": {"$ref": "#"}}}, "that has its own '$id'"),
        ({"type": "string", "const": 3}, "allows no value at all"),
        ({"minItems": 2, "maxItems": 1, "type": "array"}, "allows no value at all"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' whose parts can hold"),
        ({"const": "\ud800"}, "not valid JSON"),
        ({"const": float("nan")}, "not valid JSON"),
        ({"description": "x" * 300_000}, "larger than 256 KiB"),
        ({"enum": list(range(10_001))}, "more than 10000 values"),
        ({"properties": {f"p{i}": {} for i in range(4001)}}, "more than 4000 parts"),
    ],
)
def test_schemas_that_are_refused(schema: Any, words: str) -> None:
    assert words in refusal(schema)


def test_a_reference_without_a_way_out_is_found_where_it_can_be_avoided() -> None:
    endless = {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["c"]}
    assert "leads back" in refusal(
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}], "$defs": {"n": endless}}
    )
    pair = {"type": "array", "items": {"$ref": "#/$defs/b"}, "minItems": 1}
    other = {"anyOf": [{"$ref": "#/$defs/a"}]}
    assert "leads back" in refusal({"$ref": "#/$defs/a", "$defs": {"a": pair, "b": other}})
    json_schema_grammar({"$ref": "#/$defs/n", "$defs": {"n": {**endless, "required": []}}})


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(length: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "null"}]} for i in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "null"}}}


def test_depth_is_bounded(sampler: Sampler) -> None:
    grammar = json_schema_grammar(nested(32))
    assert sampler.accepts(grammar, '{"a":' * 32 + "null" + "}" * 32)
    assert "nested" in refusal(nested(33))
    assert "nested" in refusal(nested(5000))
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    assert "nested" in refusal({"const": deep})
    assert "nested" in refusal({"description": deep})
    json_schema_grammar(chain(150))
    assert "definitions" in refusal(chain(250))
    tall = {f"d{i}": nested(20) for i in range(30)}
    assert "nested too deeply" in refusal({"$defs": tall})


def test_sizes_that_compile() -> None:
    json_schema_grammar({"enum": [f"value {i}" for i in range(10_000)]})
    json_schema_grammar({"type": "string", "maxLength": 10**9})
    json_schema_grammar({"type": "array", "maxItems": 10**9})
    names = [f"p{i}" for i in range(400)]
    many = {name: {"type": "string"} for name in names}
    json_schema_grammar({"type": "object", "properties": many, "additionalProperties": False})
    json_schema_grammar({"type": "object", "properties": many, "required": names})


def test_what_only_shows_when_text_is_made_is_refused_too() -> None:
    many = {f"p{i}": {"type": "string"} for i in range(1500)}
    assert "too many optional parts" in refusal({"type": "object", "properties": many})
    assert "too complex" in refusal({"type": "string", "pattern": "^" + "a?" * 450 + "$"})


def test_messages_are_short_and_hold_little_of_the_input() -> None:
    name = "secret\n\x00" * 50
    for schema in (
        {"properties": {name: {"not": {}}}},
        {"properties": {name: {"pattern": "("}}},
        {"$ref": "#/" + name},
        {"pattern": "(" + name},
        {"format": name},
    ):
        message = refusal(schema)
        assert len(message) < 300
        assert message.count("secret") <= 6
        assert message.isprintable()


def test_the_schema_itself_stays_as_it_is() -> None:
    for schema in SCHEMAS.values():
        before = json.dumps(schema)
        enforceable(schema)
        assert json.dumps(schema) == before


def test_a_schema_within_a_lark_grammar(sampler: Sampler) -> None:
    rule = json_schema_rule({"type": "object", "properties": {"a": {"enum": ['"', "\n"]}}})
    grammar = f'start: "<call>" arguments "</call>"\narguments: {rule}\n'
    checked(grammar)
    assert sampler.accepts(grammar, '<call>{"a":"\\""}</call>')
    assert not sampler.accepts(grammar, "<call>{" + " " * 9 + "}</call>")
    with pytest.raises(GrammarError):
        json_schema_rule({"not": {}})


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"\d{4}", ["2024"], ["202", "a2024", "٢٠٢٤"]),
        (r"^\d{4}$", ["2024"], ["202"]),
        ("^a|b$", ["a", "b"], ["ab"]),
        ("a/b", ["a/b"], []),
        (r"a\/b", ["a/b"], []),
        (r"a\\/b", [r"a\/b"], []),
        ("[/]+", ["//"], []),
        ("a\nb", ["a\nb"], ["anb"]),
        (r"\w+@[\w.]+", ["a@b.c"], ["é@b"]),
        ("[^a]", ["b", "\n"], ["a"]),
        ("é+", ["éé"], ["e"]),
        ('"', ['"'], []),
        ("a*", ["", "aa"], ["b"]),
        (r"\$\^", ["$^"], []),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str], sampler: Sampler) -> None:
    grammar = regex_grammar(pattern)
    assert [text for text in yes if not sampler.accepts(grammar, text)] == []
    assert [text for text in no if sampler.accepts(grammar, text)] == []


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "must not be empty"),
        ("([", "invalid regular expression"),
        ("a(?=b)", "look-ahead"),
        (r"(a)\1", "back reference"),
        ("a\\", "ends in a backslash"),
        ("x" * 1001, "longer than 1000"),
        ("(a{1000}){1000}", "repeats too much"),
        ("((((a{20}){20}){20}){20})", "repeats too much"),
        ("(" * 400 + "a" + ")" * 400, "pattern"),
        ("a?" * 500, "too complex"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_patterns_that_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(GrammarError) as caught:
        regex_grammar(pattern)
    assert words in caught.value.message
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("abc", 3),
        ("a{5}", 5),
        ("(ab){2,10}", 20),
        ("((a{10}){10}b){2}", 202),
        (r"[(){9}]{3}", 3),
        (r"\{9}", 3),
        (r"[\]x]{4}", 4),
        ("a{2}{3}", 6),
        ("a{,7}", 7),
        ("(a|b)*c", 4),
        ("a{99999999999999999999}", 999_999_999),
        ("[", 1),
        ("))((", 2),
    ],
)
def test_the_size_of_a_pattern(pattern: str, size: int) -> None:
    assert repeated_size(pattern) == size
    assert patterns.pattern_fault("a{20001}") is not None


def test_choices(sampler: Sampler) -> None:
    texts = [
        "yes",
        "no",
        "no way",
        'a "quote"',
        "back\\slash",
        "line\nbreak",
        "é😀",
        "</s>",
        "\x00",
    ]
    grammar = choice_grammar(texts)
    assert all(sampler.accepts(grammar, text) for text in texts)
    assert not sampler.accepts(grammar, "maybe")
    assert not sampler.accepts(grammar, "yesno")
    choice_grammar([f"choice number {i}" for i in range(MAX_CHOICES)])
    for wrong in ([], [""], ["a", ""], ["x"] * (MAX_CHOICES + 1), ["x" * 50_001], ["\ud800"]):
        with pytest.raises(GrammarError):
            choice_grammar(wrong)


def test_lark_and_gbnf(sampler: Sampler) -> None:
    lark = lark_grammar('start: greeting " " NAME\ngreeting: "hello" | "hi"\nNAME: /[A-Z][a-z]+/\n')
    assert sampler.accepts(lark, "hi Bob")
    assert not sampler.accepts(lark, "hi bob")
    assert sampler.accepts(lark_grammar('%ignore " "\nstart: "a" "b"'), "a b")
    gbnf = lark_grammar('root ::= "a" num ("," num)*\nnum ::= [0-9]+ # digits\n')
    assert sampler.accepts(gbnf, "a1,22")
    assert not sampler.accepts(gbnf, "a1,")


def test_a_grammar_whose_text_is_forced_for_ever_is_judged_all_the_same() -> None:
    lark_grammar("start: /x+/ /x+/")
    lark_grammar("start: a{3}\na: /x+/")
    regex_grammar("x+")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("hello", "grammar"),
        ("start: foo", "name that it does not define"),
        ("start: /(?=a)/", "look-ahead"),
        ("start: /[/", "invalid"),
        ('start: "a', "not valid"),
        ('{"grammars":[{"json_schema":{"x-guidance":{"lenient":true},"not":{}}}]}', "Lark's form"),
        ('start: %json {"x-guidance":{"lenient":true},"not":{}}', "directives"),
        ('%llguidance {"no_forcing":true}\nstart: "a"', "directives"),
        ("start: <|im_start|>", "special tokens"),
        ("start: <[5]>", "special tokens"),
        ("start: @other", "grammar"),
        ("x" * 20_001, "longer than"),
        ("start: " + "(" * 60 + '"a"' + ")" * 60, "brackets"),
        ("\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(301))]), "rules"),
        ("start: /(a{1000}){1000}/", "repeats too much"),
        (
            "\n".join(["start: R0", *(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)), 'R40: "a"']),
            "too large",
        ),
        ("root ::= x", "GBNF"),
        ('foo ::= "a"', "GBNF"),
        ("root ::= " + "(" * 2000, "brackets"),
        ('root ::= "a"{99999999999}', "grammar"),
        ("::=", "GBNF"),
    ],
)
def test_grammars_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(GrammarError) as caught:
        lark_grammar(text)
    assert words in caught.value.message
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("grammar", "answer"),
    [
        (json_schema_grammar({"type": "object"}), '{"a":1}'),
        (regex_grammar("[0-9]+"), "12"),
        (choice_grammar(["yes", "no"]), "yes"),
        (lark_grammar('%ignore " "\nstart: answer\nanswer: "o" "k"'), "o k"),
    ],
)
def test_after_thinking(grammar: str, answer: str, sampler: Sampler) -> None:
    whole = after_thinking(grammar, "</think>")
    checked(whole)
    for thought in ("", "so </thin > < é\n\n", "{}"):
        assert sampler.accepts(whole, f"{thought}</think>{answer}")
        assert sampler.accepts(whole, f"{thought}</think>\n\n{answer}")
    assert not sampler.accepts(whole, answer)
    assert not sampler.accepts(whole, f"a</think>b</think>{answer}")
    assert not sampler.accepts(whole, "a</think>other")


def test_thinking_that_a_special_token_closes(sampler: Sampler) -> None:
    whole = after_thinking(choice_grammar(["yes"]), "</think>", close_id=7)
    assert not sampler.accepts(whole, "thought</think>yes")
    assert "<[7]>" in whole
