"""Tools of a request, and the forms in which models write calls of them.

Owns what a client may say about tools, the table of forms, and the grammar of a call that must be
made. Must not know templates, HTTP or engines; how written calls are read is `call_syntax`.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import msgspec

from router.errors import BadRequest, GrammarError
from router.text.call_syntax import JsonCalls, LineCalls, MarkedCalls, TaggedCalls
from router.text.grammar import Make
from router.text.scanner import CallSyntax, ScanRules, ThinkingRule, new_call_id
from router.text.window import WHITE

MAX_TOOLS: Final = 128
MAX_TOOL_BYTES: Final = 1024 * 1024  # of all tools of a request, as JSON
_NAME: Final = re.compile(r"[a-zA-Z0-9_.\-]{1,64}")
_KIND: Final = re.compile(r"[a-z0-9_]{1,40}")  # what may be repeated in an error


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False

    def described(self) -> dict[str, Any]:
        """Name, description if there is one, parameters."""
        description = {"description": self.description} if self.description else {}
        return {"name": self.name, **description, "parameters": self.parameters}

    def listed(self) -> dict[str, Any]:
        """As an entry of OpenAI's list, which is what templates expect."""
        return {"type": "function", "function": self.described()}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`named` with its `name`; otherwise only tools in `allowed` may be called, if it has any."""

    kind: Literal["auto", "none", "required", "named"]
    name: str = ""
    allowed: frozenset[str] = frozenset()

    def callable(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """Those of the tools that may be called."""
        if self.kind == "none":
            return ()
        names = {self.name} if self.kind == "named" else self.allowed
        return tuple(tool for tool in tools if not names or tool.name in names)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, which of them an answer may call, and whether it must."""

    tools: tuple[Tool, ...]
    choice: ToolChoice
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """A call is required."""
        return self.choice.kind in ("required", "named")


# -- what a request says


def tools_of(raw: Any, param: str = "tools") -> tuple[Tool, ...]:
    """OpenAI's list of tools, also in the flat form of /v1/responses. Raises BadRequest."""
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise BadRequest(f"'{param}' must be a list.", param=param)
    entries: list[Any] = raw
    if len(entries) > MAX_TOOLS:
        raise BadRequest(f"'{param}' may hold at most {MAX_TOOLS} tools.", param=param)
    if entries and len(_json(entries, param)) > MAX_TOOL_BYTES:
        raise BadRequest(f"'{param}' may have at most {MAX_TOOL_BYTES} bytes.", param=param)
    tools = tuple(_tool(entry, f"{param}[{i}]") for i, entry in enumerate(entries))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise BadRequest(
                "Two tools have the same name.", param=_place(entries[i], f"{param}[{i}]", "name")
            )
    return tools


def _tool(raw: Any, place: str) -> Tool:
    if not isinstance(raw, Mapping):
        raise BadRequest(f"'{place}' must be an object.", param=place)
    _check_kind(raw, place)
    function: Any = raw.get("function", raw)
    if not isinstance(function, Mapping):
        raise BadRequest(f"'{place}.function' must be an object.", param=f"{place}.function")
    values = cast("Mapping[str, Any]", function)
    name, description, parameters, strict = map(
        values.get, ("name", "description", "parameters", "strict")
    )

    def wrong(member: str, wanted: str) -> BadRequest:
        param = _place(raw, place, member)
        return BadRequest(f"'{param}' must be {wanted}.", param=param)

    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong("name", "1 to 64 letters, digits, dots, dashes and underscores")
    if description is not None and not isinstance(description, str):
        raise wrong("description", "a string")
    if strict is not None and not isinstance(strict, bool):
        raise wrong("strict", "true or false")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise wrong("parameters", "a JSON schema of an object")
    return Tool(name, description or "", cast("dict[str, Any]", parameters), strict is True)


def _check_kind(raw: Mapping[str, Any], place: str) -> None:
    kind = raw.get("type", "function")
    if kind != "function":
        named = f" '{kind}'" if isinstance(kind, str) and _KIND.fullmatch(kind) else ""
        raise BadRequest(
            f"Tools of type{named} are not supported by this server, only of type 'function'.",
            param=f"{place}.type",
        )


def _place(raw: Mapping[str, Any], place: str, member: str) -> str:
    return f"{place}.function.{member}" if "function" in raw else f"{place}.{member}"


def _json(value: Any, param: str) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"'{param}' is not valid.", param=param) from error


def choice_of(raw: Any, tools: Sequence[Tool], param: str = "tool_choice") -> ToolChoice:
    """OpenAI's `tool_choice`, also in the forms of /v1/responses. Raises BadRequest."""
    if raw is None or raw == "auto":
        return ToolChoice("auto" if tools else "none")
    if raw == "none":
        return ToolChoice("none")
    if raw != "required" and not isinstance(raw, Mapping):
        raise BadRequest(f"'{param}' must be 'none', 'auto', 'required' or an object.", param=param)
    if not tools:
        raise BadRequest(f"'{param}' needs 'tools'.", param=param)
    if raw == "required":
        return ToolChoice("required")
    kind: Any = raw.get("type")
    if kind == "function":
        return ToolChoice("named", _chosen(raw, tools, param))
    if kind == "allowed_tools":
        return _allowed(raw, tools, param)
    raise BadRequest(
        f"'{param}.type' must be 'function' or 'allowed_tools'.", param=f"{param}.type"
    )


def _allowed(raw: Mapping[str, Any], tools: Sequence[Tool], param: str) -> ToolChoice:
    inner: Any = raw
    if "allowed_tools" in raw:
        inner, param = raw["allowed_tools"], f"{param}.allowed_tools"
    entries: Any = inner.get("tools") if isinstance(inner, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise BadRequest(f"'{param}.tools' must be a list with tools.", param=f"{param}.tools")
    mode: Any = inner.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise BadRequest(f"'{param}.mode' must be 'auto' or 'required'.", param=f"{param}.mode")
    listed: list[Any] = entries
    names = [_chosen(entry, tools, f"{param}.tools[{i}]") for i, entry in enumerate(listed)]
    return ToolChoice(mode, allowed=frozenset(names))


def _chosen(raw: Any, tools: Sequence[Tool], place: str) -> str:
    """The name in {"function": {"name": …}} or {"name": …}, which one of the tools must have."""
    member = f"{place}.name"
    function: Any = raw
    if isinstance(raw, Mapping) and "function" in raw:
        function, member = raw["function"], f"{place}.function.name"
    name: Any = function.get("name") if isinstance(function, Mapping) else None
    if name not in [tool.name for tool in tools]:
        raise BadRequest(f"'{member}' must be the name of one of the 'tools'.", param=member)
    return str(name)


# -- how models write calls

_TOOL: Final = "\0name"  # stands for the tool's name in a shape
_ARGUMENTS: Final = "\0arguments"


def _short_id() -> str:
    """Mistral's templates refuse every other length."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class _Shape:
    """How calls are written: `before`, then `each` with `between`, then `after`.

    Parts that are words of the syntax are control tokens where the model has them as such.
    """

    syntax: CallSyntax
    each: tuple[str, ...]
    between: str = ""
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    several: bool = True
    new_id: Callable[[], str] = new_call_id


_OBJECT: Final = ('{"name": "', _TOOL, '", "arguments": ', _ARGUMENTS, "}")
# A forced call is written as JSON also where models are used to pairs: it is read all the same.
_TAGGED: Final = _Shape(
    TaggedCalls(), ("<tool_call>", "\n", *_OBJECT, "\n", "</tool_call>"), between="\n"
)
_LINES: Final = _Shape(LineCalls(), (_TOOL, "\n", _ARGUMENTS), several=False)
_SHAPES: Final[dict[str, _Shape]] = {
    "hermes": _TAGGED,
    "qwen3-coder": _TAGGED,
    "glm-4.5": _TAGGED,
    "granite": _Shape(TaggedCalls(), _OBJECT, ", ", ("<|tool_call|>", "["), ("]",)),
    "llama-3": _Shape(
        JsonCalls(), ('{"name": "', _TOOL, '", "parameters": ', _ARGUMENTS, "}"), between="; "
    ),
    "mistral": _Shape(
        MarkedCalls(), _OBJECT, ", ", ("[TOOL_CALLS]", "["), ("]",), new_id=_short_id
    ),
    "mistral-args": _Shape(
        MarkedCalls(), ("[TOOL_CALLS]", _TOOL, "[ARGS]", _ARGUMENTS), new_id=_short_id
    ),
    "chatglm3": _LINES,
    "glm-4": _LINES,
}
TOOL_FORMS: Final = tuple(_SHAPES)
# What vLLM calls them.
OTHER_NAMES: Final = {
    "llama3_json": "llama-3",
    "llama4_json": "llama-3",
    "qwen3_coder": "qwen3-coder",
    "qwen3_xml": "qwen3-coder",
    "glm45": "glm-4.5",
    "phi4_mini_json": "granite",
}
DEFAULT_FORM: Final = "hermes"  # of models that were taught none

# What a template mentions -> the form that its model was taught; the first that fits.
_MENTIONED: Final = (
    ("<arg_key>", "glm-4.5"),
    ("<function=", "qwen3-coder"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("[ARGS]", "mistral-args"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama-3"),
    ('"parameters": ', "llama-3"),
    ("<|observation|>", "glm-4"),
)


def tool_form_in(source: str) -> str:
    """The form that a chat template is about; hermes if none is recognized."""
    return next((form for text, form in _MENTIONED if text in source), DEFAULT_FORM)


@dataclass(frozen=True)
class ToolForm:
    """How one model writes calls. `ids` are its control tokens by name."""

    name: str = DEFAULT_FORM
    ids: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def words(self) -> tuple[str, ...]:
        """What has to be seen in an answer, also where it is a control token."""
        return _SHAPES[self.name].syntax.words

    def scan_rules(self, thinking: ThinkingRule | None, use: ToolUse | None) -> ScanRules:
        """What is looked for in an answer to a request with these tools."""
        callable = () if use is None else use.choice.callable(use.tools)
        if use is None or not callable:
            return ScanRules(thinking)
        shape = _SHAPES[self.name]
        return ScanRules(
            thinking=thinking,
            syntax=shape.syntax,
            names=frozenset(tool.name for tool in callable),
            texts=frozenset(pair for tool in callable for pair in _text_arguments(tool)),
            parallel=use.parallel and use.choice.kind != "named",
            new_id=shape.new_id,
        )

    def call_grammar(
        self, make: Make, tools: Sequence[Tool], choice: ToolChoice, parallel: bool
    ) -> str:
        """For llguidance: one call or more, as this model writes them, and nothing else.

        Raises BadRequest for a schema that cannot be enforced. `make` takes milliseconds.
        """
        one = choice.kind == "named" or not parallel
        callable = choice.callable(tools)
        terms = {
            tool.name: _enforced(make, tool, f"tools[{i}].function.parameters")
            for i, tool in enumerate(tools)
            if tool in callable
        }
        shape = _SHAPES[self.name]
        # Ids mean nothing to the check, which has no model's vocabulary.
        try:
            make("lines", _lark(shape, {}, terms, one=one))
        except GrammarError as error:
            raise BadRequest(
                f"'tools' are too much together: {error.message}", param="tools"
            ) from error
        return _lark(shape, self.ids, terms, one=one)


def _lark(shape: _Shape, ids: Mapping[str, int], terms: Mapping[str, str], *, one: bool) -> str:
    """A grammar of one call or more; `terms` are the arguments of each tool."""
    each = [_lark_line(shape.each, ids, name, term) for name, term in terms.items()]
    between = f"{_quoted(shape.between)} " if shape.between else ""
    calls = "call" if one or not shape.several else f"call ({between}call)*"
    start = (_lark_line(shape.before, ids), calls, _lark_line(shape.after, ids))
    lines = [
        f"start: {' '.join(filter(None, start))}",
        f"call: {' | '.join(f'call_{i}' for i in range(len(each)))}",
        *(f"call_{i}: {line}" for i, line in enumerate(each)),
    ]
    return "\n".join([*lines, ""])


def _lark_line(
    parts: Sequence[str], ids: Mapping[str, int], name: str = "", arguments: str = ""
) -> str:
    """Parts of a shape; neighbouring texts are joined."""
    line: list[str] = []
    text = ""
    for part in (*parts, ""):
        if part not in ids and part not in (_ARGUMENTS, ""):
            text += name if part == _TOOL else part
            continue
        if text:
            line.append(_quoted(text))
            text = ""
        if part == _ARGUMENTS:
            line.append(arguments)
        elif part:
            line.append(f"<[{ids[part]}]>")
    return " ".join(line)


def _quoted(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text)


def _text_arguments(tool: Tool) -> list[tuple[str, str]]:
    """Its arguments that are texts by the schema."""
    properties = tool.parameters.get("properties")
    if not isinstance(properties, Mapping):
        return []
    members = cast("Mapping[str, Any]", properties)
    return [
        (tool.name, key)
        for key, value in members.items()
        if isinstance(value, Mapping) and value.get("type") == "string"
    ]


def _enforced(make: Make, tool: Tool, place: str) -> str:
    """The tool's schema as a term of Lark. Raises BadRequest.

    Arguments that the schema does not name are left out, unless it says that they are welcome.
    """
    schema = {"type": "object", **tool.parameters}
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    try:
        return make("schema", schema).removeprefix("start: ").rstrip()
    except GrammarError as error:
        raise BadRequest(
            f"'{place}' cannot be enforced, as 'tool_choice' asks: {error.message}", param=place
        ) from error


# -- how models think

THINKING_TAGS: Final[dict[str, tuple[str, str]]] = {
    "think": ("<think>", "</think>"),
    "seed-think": ("<seed:think>", "</seed:think>"),
    "mistral-think": ("[THINK]", "[/THINK]"),
}


OTHER_THINKING: Final = {
    "qwen3": "think",
    "deepseek_r1": "think",
    "glm45": "think",
    "seed_oss": "seed-think",
    "mistral": "mistral-think",
    "none": "",
}


def thinking_in(source: str) -> str:
    """The kind of thinking that a chat template is about, "" for none."""
    found = (name for name, tags in THINKING_TAGS.items() if tags[0] in source or tags[1] in source)
    return next(found, "")


def thinking_rule(name: str) -> ThinkingRule | None:
    """By its name in `THINKING_TAGS`; None for ""."""
    return ThinkingRule(*THINKING_TAGS[name]) if name else None


def opens_thinking(prompt_tail: str) -> bool:
    """The prompt ends with a tag that opens thinking, so that the answer begins in it."""
    return prompt_tail.rstrip(WHITE).endswith(tuple(tags[0] for tags in THINKING_TAGS.values()))
