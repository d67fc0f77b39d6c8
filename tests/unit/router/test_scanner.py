"""The scanner of thinking and calls: every syntax, whole and in every slicing."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.call_syntax import JsonCalls, LineCalls, MarkedCalls, TaggedCalls
from router.text.scanner import CallSyntax, Delta, Scanner, ScanRules, ThinkingRule, merged

NAMES = frozenset(("f", "get_weather", "get_weather_now"))
TEXTS = frozenset((("get_weather", "city"),))
THINKS = ThinkingRule()


def rules(syntax: CallSyntax | None = None, *, parallel: bool = True) -> ScanRules:
    return ScanRules(THINKS, syntax, NAMES, TEXTS, parallel)


def scan(rules: ScanRules, slices: list[str]) -> list[Delta]:
    """All deltas, neighbours joined; ids are c0, c1, …"""
    numbers = count()
    scanner = Scanner(rules, lambda: f"c{next(numbers)}")
    deltas: list[Delta] = []
    for piece in slices:
        step = scanner.push(piece)
        assert step == merged(step)
        deltas += step
    return merged([*deltas, *scanner.flush()])


def told(deltas: list[Delta]) -> list[tuple[str, ...]]:
    """As tuples that are short to write."""
    return [
        ("call", str(delta.index), delta.id, delta.name)
        if delta.kind == "call"
        else (delta.kind, delta.text)
        for delta in deltas
    ]


def whole(rules: ScanRules, text: str) -> list[tuple[str, ...]]:
    """The deltas of a text at once; letter by letter they must be the same."""
    expected = scan(rules, [text])
    assert scan(rules, list(text)) == expected
    return told(expected)


def call(name: str, arguments: str, index: int = 0) -> list[tuple[str, ...]]:
    return [("call", str(index), f"c{index}", name), ("arguments", arguments)]


def test_thinking() -> None:
    plain = ScanRules(THINKS)
    opened = ScanRules(replace(THINKS, starts_open=True))
    hidden = ScanRules(replace(THINKS, show=False))
    assert whole(plain, "42") == [("content", "42")]
    assert whole(plain, "<think>\nwhy\n</think>\n\n42\n") == [
        ("reasoning", "why"),
        ("content", "42\n"),
    ]
    assert whole(opened, "why</think>42") == [("reasoning", "why"), ("content", "42")]
    assert whole(opened, "<think>why</think>42") == [("reasoning", "why"), ("content", "42")]
    assert whole(plain, "<think>a</think>x<think>b</think>y") == [
        ("reasoning", "a"),
        ("content", "x"),
        ("reasoning", "b"),
        ("content", "y"),
    ]
    assert whole(hidden, "<think>why</think>42") == [("content", "42")]
    assert whole(opened, "why</thi") == [("reasoning", "why</thi")]
    assert whole(plain, "a <thin") == [("content", "a <thin")]
    assert whole(plain, "a < b </think>") == [("content", "a < b </think>")]
    assert whole(ScanRules(), "<think>a</think>") == [("content", "<think>a</think>")]


def test_split_tag_leaves_nothing_behind() -> None:
    """Case 088, and 092: a step with both gives two deltas."""
    scanner = Scanner(ScanRules(replace(THINKS, starts_open=True)))
    steps = [scanner.push(piece) for piece in ("why", "</th", "ink>", "42")]
    assert [told(step) for step in steps] == [[("reasoning", "why")], [], [], [("content", "42")]]
    scanner = Scanner(ScanRules(replace(THINKS, starts_open=True)))
    assert scanner.in_reasoning
    assert told(scanner.push("r</think>c")) == [("reasoning", "r"), ("content", "c")]
    assert not scanner.in_reasoning


TAGGED = rules(TaggedCalls())


def test_tagged_json() -> None:
    one = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}<\\""]}}\n</tool_call>'
    assert whole(TAGGED, f"Sure.\n{one}\n") == [
        ("content", "Sure."),
        *call("f", '{"a": [1, "}<\\""]}'),
    ]
    assert whole(TAGGED, one + "\n" + one) == [
        *call("f", '{"a": [1, "}<\\""]}'),
        *call("f", '{"a": [1, "}<\\""]}', 1),
    ]
    assert whole(TAGGED, "<think>\nw\n</think>\n\n" + one)[0] == ("reasoning", "w")
    swapped = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call> bye'
    assert whole(TAGGED, swapped) == [*call("f", '{"a": 1}'), ("content", "bye")]
    quoted = '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\u4f60\\"}"}</tool_call>'
    assert whole(TAGGED, quoted) == call("f", '{"a": "你"}')
    assert whole(TAGGED, '<tool_call>{"name": "f"}</tool_call>') == call("f", "{}")
    assert whole(TAGGED, '<tool_call>{"name": "f", "arguments": null}</tool_call>') == call(
        "f", "{}"
    )


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f',
        '<tool_call>{"arguments": {"a": 1}',
        "<tool_call>",
        "<tool_ca",
        '<tool_call>{"answer": 1}</tool_call> and more',
        "<tool_call> is a tag",
        '<tool_call>{"name": 3}',
        "<tool_call>{}",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert whole(TAGGED, text) == [("content", text)]
    assert whole(TAGGED, "x \n" + text) == [("content", "x \n" + text)]


def test_cut_calls_keep_their_arguments() -> None:
    assert whole(TAGGED, '<tool_call>{"name": "f", "arguments": {"a": "b') == call("f", '{"a": "b')
    assert whole(TAGGED, '<tool_call>{"name": "f"') == [("call", "0", "c0", "f")]
    missing = '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>bye'
    assert whole(TAGGED, missing) == [*call("f", '{"a": 1'), ("content", "bye")]


def test_one_call_only() -> None:
    """Case 080."""
    one = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    scanner = Scanner(rules(TaggedCalls(), parallel=False))
    assert not scanner.done
    scanner.push(one[:-13])
    assert scanner.done
    assert scanner.push(one + "text") == []
    assert scanner.flush() == []
    assert scanner.num_calls == 1


def test_tags_around_pairs() -> None:
    """GLM-4.5 and Qwen3-Coder."""
    glm = (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
    )
    expected = call("get_weather", '{"city": "12", "days": 3}')
    assert whole(TAGGED, "I look. " + glm) == [("content", "I look."), *expected]
    assert whole(TAGGED, glm.replace("\n", "")) == expected
    assert whole(TAGGED, glm[: glm.index("3")]) == call("get_weather", '{"city": "12"')
    qwen = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\nYork\n</parameter>\n"
        '<parameter=days>\n[1, "x"]\n</parameter>\n<parameter=w>\nNaN\n</parameter>\n'
        "</function>\n</tool_call>\nbye"
    )
    assert whole(TAGGED, qwen) == [
        *call("get_weather", '{"city": "New\\nYork", "days": [1, "x"], "w": "NaN"}'),
        ("content", "bye"),
    ]
    assert whole(TAGGED, "<tool_call>f</tool_call>") == call("f", "{}")
    for text in ("<tool_call>other\n<arg_key>", "<tool_call><function=other>", "<tool_call>f"):
        assert whole(TAGGED, text) == [("content", text)]


def test_tags_before_a_list() -> None:
    """Granite and Phi-4."""
    one = '{"name": "f", "arguments": {"a": 1}}'
    expected = [*call("f", '{"a": 1}'), *call("f", '{"a": 1}', 1)]
    assert whole(TAGGED, f"<|tool_call|>[{one}, {one}]<|/tool_call|>") == expected
    assert whole(TAGGED, f"<tool_call>[{one},{one}]</tool_call>\nx") == [
        *expected,
        ("content", "x"),
    ]
    assert whole(TAGGED, "<|tool_call|>[1]") == [("content", "<|tool_call|>[1]")]


JSON = rules(JsonCalls())


def test_bare_json() -> None:
    """Llama 3."""
    one = '{"name": "f", "parameters": {"a": "b"}}'
    assert whole(JSON, one) == whole(JSON, "<|python_tag|>" + one) == call("f", '{"a": "b"}')
    assert whole(JSON, f"\n{one}; {one}") == [
        *call("f", '{"a": "b"}'),
        *call("f", '{"a": "b"}', 1),
    ]
    assert whole(JSON, '{"type": "function", "name": "f", "parameters": {}}') == call("f", "{}")
    assert whole(JSON, "Well: <|python_tag|>" + one)[0] == ("content", "Well:")
    assert whole(JSON, one + "; and more") == [
        *call("f", '{"a": "b"}'),
        ("content", "; and more"),
    ]
    assert whole(JSON, "<think>w</think>\n" + one) == [
        ("reasoning", "w"),
        *call("f", '{"a": "b"}'),
    ]
    cut = '{"name": "f", "parameters": {"a": "b'
    assert whole(JSON, cut) == call("f", '{"a": "b')


@pytest.mark.parametrize(
    "text",
    [
        '{"city": "Rome", "name": "f", "parameters": {}}',
        '{"name": "f", "age": 3}',
        '{"name": "other", "parameters": {"a": 1}}',
        '{"name": "f"',
        "{ x }",
        "{}",
        'Use {"name": "f", "parameters": {}}',
    ],
)
def test_other_json_is_content(text: str) -> None:
    assert whole(JSON, text) == [("content", text)]


def test_marked_calls() -> None:
    """Mistral, old and new."""
    marked = rules(MarkedCalls())
    one = '{"name": "f", "arguments": {"a": "]"}}'
    expected = call("f", '{"a": "]"}')
    assert whole(marked, f"[TOOL_CALLS] [{one}]") == expected
    assert whole(marked, f"[TOOL_CALLS][{one}, {one}]") == [*expected, *call("f", '{"a": "]"}', 1)]
    assert whole(marked, 'x [TOOL_CALLS]f{"a": "]"}') == [("content", "x"), *expected]
    assert whole(marked, '[TOOL_CALLS]f[ARGS]{"a": "]"}[TOOL_CALLS]f[CALL_ID]aB1[ARGS]{}') == [
        *expected,
        *call("f", "{}", 1),
    ]
    with_id = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}, "id": "VvvODy9mT"}]'
    assert whole(marked, with_id) == expected
    for text in ("[TOOL_CALLS]", "[TOOL_CALLS] f is", "[TOOL_CALLS][1]", "[TOOL_CALLS]other{}"):
        assert whole(marked, text) == [("content", text)]
    assert whole(marked, f"[TOOL_CALLS][{one}, 3]") == [*expected, ("content", ", 3]")]


LINES = rules(LineCalls())


def test_calls_behind_a_line() -> None:
    """GLM-4 and ChatGLM3."""
    expected = call("get_weather", '{"city": "北京"}')
    assert whole(LINES, 'get_weather\n{"city": "北京"}') == expected
    python = "get_weather\n ```python\ntool_call(city='北京')\n```"
    assert whole(LINES, python) == expected
    assert whole(LINES, "I look.<|assistant|> " + python + "<|assistant|>\n Done.") == [
        ("content", "I look."),
        *expected,
        ("content", "Done."),
    ]
    several = """f
```python
tool_call(a=1.5, b="it's, (so)", c=[1, {'x': None}], d=true, e='\\n\\'', f=what, g=-2)
```"""
    assert whole(LINES, several) == call(
        "f",
        '{"a": 1.5, "b": "it\'s, (so)", "c": [1, {"x": null}], "d": true, "e": "\\n\'", '
        '"f": "what", "g": -2}',
    )
    assert whole(LINES, "f\n```python\ntool_call()\n```") == call("f", "{}")
    cut = "f\n```python\ntool_call(a=1, b='x"
    assert whole(LINES, cut) == call("f", '{"a": 1')
    for text in ("get_weather", "get_weather is", "get_weather\nis", "f\n```python\nprint(1)"):
        assert whole(LINES, text) == [("content", text)]
    assert whole(LINES, 'other\n{"a": 1}') == [("content", 'other\n{"a": 1}')]
    assert whole(LINES, 'get_weather_now\n{"a": 1}') == call("get_weather_now", '{"a": 1}')


@pytest.mark.parametrize("value", ["1e999", "{1: 2}", "{(1, 2): 3}", "b'x'", "1+2j", "('" * 999])
def test_odd_literals_are_still_json(value: str) -> None:
    deltas = scan(LINES, [f"f\ntool_call(a={value})"])
    arguments = "".join(delta.text for delta in deltas if delta.kind == "arguments")
    if not value.startswith("('"):  # that one never ends

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        assert isinstance(json.loads(arguments, parse_constant=refuse), dict)


@given(st.data())
def test_slicing_never_matters(data: st.DataObject) -> None:
    text = data.draw(
        st.lists(
            st.sampled_from(
                [
                    *(
                        "<|tool_call|>",
                        "<think>",
                        "</think>",
                        "<tool_call>",
                        "</tool_call>",
                        "\n",
                        " ",
                        "x",
                        "你",
                    ),
                    *('{"name": "f", "arguments": {"a": "b"}}', '{"name": "f"', ', "parameters":'),
                    *("{", "}", '"', "\\", "[", "]", ",", ";", "<", "f\n", "get_weather", "null"),
                    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|assistant|>"),
                    *("```python\n", "tool_call(", "a='b'", "a=1", ")", "```", "<function=f>"),
                    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</parameter>"),
                    *("<parameter=a>", "</function>", "f", '"name": ', '"arguments": '),
                ]
            ),
            max_size=12,
        ).map("".join)
    )
    syntax = data.draw(
        st.sampled_from([None, TaggedCalls(), JsonCalls(), MarkedCalls(), LineCalls()])
    )
    thinking = data.draw(
        st.sampled_from([None, THINKS, ThinkingRule("<think>", "</think>", starts_open=True)])
    )
    rules = ScanRules(thinking, syntax, NAMES, TEXTS, data.draw(st.booleans()))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    slices = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert scan(rules, slices) == scan(rules, [text]) == scan(rules, list(text))


def test_ids_look_like_openais() -> None:
    scanner = Scanner(TAGGED)
    delta = scanner.push('<tool_call>{"name": "f",')[0]
    assert delta.id.startswith("call_")
    assert len(delta.id) == 29
