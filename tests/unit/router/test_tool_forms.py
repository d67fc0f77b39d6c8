"""What a request may say about tools, and grammars of calls that must be made."""

from __future__ import annotations

import json
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import AddedToken

from router.arguments import HELP
from router.errors import BadRequest
from router.text.grammar import after_thinking, make
from router.text.model import load_text, thinking_of, tool_form_of
from router.text.scanner import Scanner, ThinkingRule
from router.text.served import ServedModel
from router.text.tool_forms import (
    OTHER_NAMES,
    OTHER_THINKING,
    THINKING_TAGS,
    TOOL_FORMS,
    Tool,
    ToolChoice,
    ToolForm,
    ToolUse,
    choice_of,
    opens_thinking,
    thinking_in,
    thinking_rule,
    tool_form_in,
    tools_of,
)
from tests.text_models import byte_level, write_folder

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("get_weather", "The weather.", CITY)
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}}
OTHER = Tool("f", "", NUMBERS)
TOOLS = (WEATHER, OTHER)


def function(**members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **members}}


def test_tools_of() -> None:
    assert tools_of(None) == tools_of([]) == ()
    listed = {"type": "function", "function": {"name": "f", "parameters": NUMBERS, "strict": True}}
    assert tools_of([listed]) == (Tool("f", "", NUMBERS, strict=True),)
    flat = {"type": "function", "name": "f", "description": "d", "parameters": None, "strict": None}
    (tool,) = tools_of([flat])
    assert tool == Tool("f", "d", {"type": "object", "properties": {}})
    assert tool.listed() == {
        "type": "function",
        "function": {
            "name": "f",
            "description": "d",
            "parameters": {"type": "object", "properties": {}},
        },
    }


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ("f", "tools"),
        ([1], "tools[0]"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": 3}], "tools[0].type"),
        ([{"type": "function", "function": None}], "tools[0].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([{"type": "function"}], "tools[0].name"),
        ([function(), function(name="a b")], "tools[1].function.name"),
        ([function(name="a" * 65)], "tools[0].function.name"),
        ([function(), function()], "tools[1].function.name"),
        ([function(description=1)], "tools[0].function.description"),
        ([function(parameters=[])], "tools[0].function.parameters"),
        ([function(parameters={"type": "array"})], "tools[0].function.parameters"),
        ([function(strict="yes")], "tools[0].function.strict"),
        ([function(name=f"f{i}") for i in range(129)], "tools"),
        ([function(description="x" * 1024 * 1024)], "tools"),
    ],
)
def test_wrong_tools(raw: Any, param: str) -> None:
    with pytest.raises(BadRequest) as error:
        tools_of(raw)
    assert error.value.param == param


def test_a_wrong_type_is_named() -> None:
    with pytest.raises(BadRequest, match="'web_search' are not supported"):
        tools_of([{"type": "web_search"}])
    with pytest.raises(BadRequest, match="Tools of type are not"):
        tools_of([{"type": "<script>"}])


def test_choice_of() -> None:
    assert choice_of(None, TOOLS) == choice_of("auto", TOOLS) == ToolChoice("auto")
    assert choice_of(None, ()) == choice_of("auto", ()) == ToolChoice("none")
    assert choice_of("none", TOOLS).callable(TOOLS) == ()
    assert choice_of("required", TOOLS) == ToolChoice("required")
    named = ToolChoice("named", "f")
    assert choice_of({"type": "function", "function": {"name": "f"}}, TOOLS) == named
    assert choice_of({"type": "function", "name": "f"}, TOOLS) == named
    assert named.callable(TOOLS) == (OTHER,)
    inner = {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}
    allowed = choice_of({"type": "allowed_tools", "allowed_tools": inner}, TOOLS)
    assert allowed == ToolChoice("required", allowed=frozenset("f"))
    assert choice_of({"type": "allowed_tools", **inner}, TOOLS) == allowed
    assert allowed.callable(TOOLS) == (OTHER,)


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ("f", "tool_choice"),
        (1, "tool_choice"),
        ({}, "tool_choice.type"),
        ({"type": "custom"}, "tool_choice.type"),
        ({"type": "function"}, "tool_choice.name"),
        ({"type": "function", "function": None}, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "g"}}, "tool_choice.function.name"),
        ({"type": "allowed_tools"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "allowed_tools": 1}, "tool_choice.allowed_tools.tools"),
        ({"type": "allowed_tools", "tools": [{"name": "g"}]}, "tool_choice.tools[0].name"),
        ({"type": "allowed_tools", "tools": [{"name": "f"}], "mode": 1}, "tool_choice.mode"),
    ],
)
def test_wrong_choices(raw: Any, param: str) -> None:
    with pytest.raises(BadRequest) as error:
        choice_of(raw, TOOLS)
    assert error.value.param == param


@pytest.mark.parametrize("raw", ["required", {"type": "function", "name": "f"}])
def test_a_choice_needs_tools(raw: Any) -> None:
    with pytest.raises(BadRequest, match="needs 'tools'"):
        choice_of(raw, ())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "function", "name", "tools", "allowed_tools", "mode", "parameters"]
            ),
            inner | st.sampled_from(["function", "f", "allowed_tools", "auto", "object"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_nothing_but_bad_requests(raw: Any) -> None:
    for check in (lambda: tools_of(raw), lambda: tools_of([raw]), lambda: choice_of(raw, TOOLS)):
        with suppress(BadRequest):
            check()


# -- grammars, followed over a vocabulary of bytes


MARKS = ("<tool_call>", "<|tool_call|>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
PIECES = [*(bytes([byte]) for byte in range(256)), *(mark.encode() for mark in MARKS), b"</s>"]
EOS = len(PIECES) - 1
IDS = {mark: 256 + i for i, mark in enumerate(MARKS)}


class Pieces:
    """Bytes, and control tokens behind them."""

    tokens = PIECES
    special_token_ids = (*IDS.values(), EOS)
    eos_token_id = EOS
    bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Pieces()))


def sample(vocabulary: LLTokenizer, grammar: str, seed: int) -> list[int]:
    """A random answer that follows the grammar."""
    matcher = LLMatcher(vocabulary, grammar)
    assert not matcher.is_error(), matcher.get_error()
    random_of = random.Random(seed)
    ids: list[int] = []
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(len(PIECES)) if mask[i // 8] >> i % 8 & 1]
        plain = [i for i in allowed if 32 <= i < 127 or i in (10, *IDS.values())]
        closing = [i for i in allowed if i in (EOS, 34, 125)]
        token = random_of.choice(
            closing if closing and random_of.random() < 0.4 else plain or allowed
        )
        assert matcher.consume_token(token)
        ids.append(token)
        assert len(ids) < 2000
    return ids


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", TOOL_FORMS)
def test_forced_calls_are_read_back(vocabulary: LLTokenizer, name: str, *, marked: bool) -> None:
    form = ToolForm(name, {word: IDS[word] for word in ToolForm(name).words if word in IDS})
    if not marked:
        form = ToolForm(name)
    most = 0
    for kind, parallel in (("required", True), ("required", False), ("named", True)):
        choice = ToolChoice("named", "f") if kind == "named" else ToolChoice("required")
        use = ToolUse(TOOLS, choice, parallel)
        grammar = form.call_grammar(make, use.tools, choice, parallel)
        assert not LLMatcher.validate_grammar(grammar)
        for seed in range(6):
            ids = sample(vocabulary, grammar, seed)
            text = b"".join(PIECES[i] for i in ids if i != EOS).decode()
            scanner = Scanner(form.scan_rules(None, use))
            deltas = [*scanner.push(text), *scanner.flush()]
            assert {delta.kind for delta in deltas} <= {"call", "arguments"}, text
            calls = [delta for delta in deltas if delta.kind == "call"]
            assert len(calls) == 1 or (parallel and kind == "required"), text
            most = max(most, len(calls))
            for call in calls:
                if kind == "named":
                    assert call.name == "f"
                pieces = [d.text for d in deltas if d.kind == "arguments" and d.index == call.index]
                arguments = json.loads("".join(pieces))
                assert set(arguments) <= ({"city"} if call.name == "get_weather" else {"a", "b"})
            assert any(i in ids for i in form.ids.values()) == bool(form.ids) or name == "llama-3"
    assert most > 1 or name in ("chatglm3", "glm-4")


def test_grammars_keep_clients_from_their_options() -> None:
    schema = {"type": "object", "properties": {}, "x-guidance": {"lenient": True}}
    grammar = ToolForm().call_grammar(make, (Tool("f", "", schema),), ToolChoice("required"), True)
    assert '"lenient": true' not in grammar
    bad = Tool("f", "", {"type": "object", "properties": {"a": {"type": "strng"}}})
    with pytest.raises(BadRequest) as error:
        ToolForm().call_grammar(make, (WEATHER, bad), ToolChoice("required"), True)
    assert error.value.param == "tools[1].function.parameters"
    assert error.value.message.startswith("'tools[1].function.parameters' cannot be enforced")


@pytest.mark.parametrize("marked", [True, False])
def test_a_forced_call_after_thinking(vocabulary: LLTokenizer, *, marked: bool) -> None:
    form = ToolForm("hermes", {word: IDS[word] for word in MARKS[::2][:2]} if marked else {})
    choice = ToolChoice("required")
    use = ToolUse(TOOLS, choice, parallel=False)
    # a tag that random letters write now and then
    thinking = ThinkingRule("~", "a", starts_open=True)
    grammar = after_thinking(form.call_grammar(make, TOOLS, choice, False), thinking.close)
    for seed in range(4):
        ids = sample(vocabulary, grammar, seed)
        text = b"".join(PIECES[i] for i in ids if i != EOS).decode()
        scanner = Scanner(form.scan_rules(thinking, use))
        kinds = [delta.kind for delta in [*scanner.push(text), *scanner.flush()]]
        assert kinds[-2:] == ["call", "arguments"]
        assert set(kinds[:-2]) <= {"reasoning"}


def test_many_tools() -> None:
    tools = tuple(Tool(f"f{i}", "d", CITY) for i in range(128))
    assert ToolForm().call_grammar(make, tools, ToolChoice("required"), True).count("%json") == 128


def test_scan_rules() -> None:
    form, thinking = ToolForm("mistral"), ThinkingRule()
    assert form.scan_rules(thinking, None).syntax is None
    unused = ToolUse(TOOLS, ToolChoice("none"))
    assert form.scan_rules(thinking, unused).syntax is None
    assert not unused.forced
    rules = form.scan_rules(thinking, ToolUse(TOOLS, ToolChoice("auto")))
    assert rules.names == {"f", "get_weather"}
    assert rules.texts == {("get_weather", "city")}
    assert len(rules.new_id()) == 9
    assert rules.parallel


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{{ messages }}", "hermes"),
        ("<tool_call>{{ call }}</tool_call>", "hermes"),
        ("<tool_call>\n<function=name>", "qwen3-coder"),
        ("<tool_call>{{ name }}<arg_key>", "glm-4.5"),
        ("<|tool_call|>", "granite"),
        ("[TOOL_CALLS] [", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral-args"),
        ('Respond in the format {"name": function name, "parameters": dictionary', "llama-3"),
        ("<|observation|>", "glm-4"),
    ],
)
def test_detection(source: str, form: str) -> None:
    assert tool_form_in(source) == form


def test_thinking_in_templates() -> None:
    assert thinking_in("{% if '</think>' in content %}") == "think"
    assert thinking_in("{{ messages }}") == ""
    assert thinking_rule("") is None
    assert thinking_rule("mistral-think") == ThinkingRule("[THINK]", "[/THINK]")
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<think>\n\n</think>\n\n")
    assert not opens_thinking("<think><|im_end|>\n<|im_start|>assistant\n")


def test_the_help_names_all_parsers() -> None:
    named = re.findall(r"[\w.-]+", HELP["tool-parser"].partition(":")[2].partition("(")[0])
    assert sorted(named) == sorted(TOOL_FORMS)
    named = re.findall(r"[\w.-]+", HELP["reasoning-parser"].partition(":")[2].partition("(")[0])
    assert sorted(named) == sorted((*THINKING_TAGS, "or", "none"))
    assert set(OTHER_NAMES.values()) <= set(TOOL_FORMS)
    assert set(OTHER_THINKING.values()) <= {*THINKING_TAGS, ""}


def test_control_tokens_of_calls_and_thinking_are_seen(tmp_path: Path) -> None:
    vocabulary = byte_level()
    added = ["<tool_call>x", "[TOOL_CALLS]", "<think>", "<other>"]
    vocabulary.add_special_tokens([AddedToken(name, normalized=False) for name in added])
    settings = {"chat_template": "{{ tools }}[TOOL_CALLS][/THINK]<think>"}
    text = load_text(write_folder(tmp_path, vocabulary, settings=settings))
    ids = {name: vocabulary.token_to_id(name) for name in added}
    form = tool_form_of(text, "")
    assert form == ToolForm("mistral", {"[TOOL_CALLS]": ids["[TOOL_CALLS]"]})
    thinking = thinking_of(text, "")
    model = ServedModel(
        ("m",), text.tokenizer, text.template, 9, 0, tool_form=form, thinking=thinking
    )
    pieces, plain = model.scanned_pieces, text.tokenizer.pieces()
    assert [i for i, piece in enumerate(pieces) if piece != plain[i]] == [
        ids["[TOOL_CALLS]"],
        ids["<think>"],
    ]
    assert pieces[ids["<think>"]] == b"<think>"
    assert model.control_id("<think>") == ids["<think>"]
    assert model.control_id("</think>") is None
