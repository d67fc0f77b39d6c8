"""The jinja2 environment for templates that came with a model: they are programs of strangers.

Owns the limits. Must not know messages or tokens. On top of jinja2's immutable sandbox (no private
attributes, no mutation of arguments) it bounds what one rendering may use: loop passes and calls
are counted, and no operator, filter, method, macro or block makes a text beyond MAX_CHARS.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from router.text.pool import TakesLong

MAX_CHARS = 8 * 1024 * 1024  # of the result and of every text on the way there
MAX_RANGE = 10_000
MAX_STEPS = 1_000_000  # loop passes and calls per rendering
MAX_WIDTH = 10_000  # of padding, indentation and the like
MAX_BITS = 4096  # of whole numbers
HURRY_S = 0.01
_STEPS_PER_LOOK = 256  # at the clock

_BUDGET = "router.budget"  # no identifier: templates can neither read nor replace it
_LEFT_OUT = ("pprint", "random", "urlize", "xmlattr")  # filters that no chat template needs
_TEXT_MAKERS = frozenset(("format", "join", "replace", "string", "tojson"))
_WIDE_FORMAT = re.compile(r"\d{6}|%[^a-zA-Z%]*\*|:[^}:]*\{")


class TemplateRefused(TemplateError):
    """The template itself called raise_exception; the message is its author's."""


class Budget:
    """What one rendering may still do. Raises `SecurityError` when it is used up."""

    __slots__ = ("_clock", "_deadline", "_hurry", "_steps")

    def __init__(self, seconds: float, clock: Callable[[], float], *, hurry: bool = False) -> None:
        """With `hurry` it is TakesLong that is raised, and sooner."""
        self._clock = clock
        self._deadline = clock() + (min(seconds, HURRY_S) if hurry else seconds)
        self._hurry = hurry
        self._steps = 0

    def spend(self) -> None:
        """One loop pass or call."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        if self._steps % _STEPS_PER_LOOK == 0 and self._clock() > self._deadline:
            if self._hurry:
                raise TakesLong
            raise SecurityError("it takes too long")


class Program:
    """A compiled template; several threads may render it at once."""

    def __init__(
        self,
        source: str,
        *,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Raises jinja2.TemplateError when it is no template, RecursionError when too deep."""
        environment = _Sandbox(now)
        tree = _Guarded().visit(environment.parse(source))
        self._template = environment.from_string(tree)
        self._seconds = seconds
        self._clock = clock

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises `TemplateRefused`, `SecurityError` beyond a limit, or whatever a wrong template
        runs into: another jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ...

        On an event loop's thread it raises `TakesLong` after HURRY_S: no template may hold that.
        """
        budget = Budget(self._seconds, self._clock, hurry=_on_event_loop())
        parts = self._template.generate({**variables, _BUDGET: budget})
        return _joined(_within_limit(parts))


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def measured(value: object) -> object:
    """The value itself, if it is no longer than MAX_CHARS when written out.

    Lists may hold one list many times, so a few of them can stand for terabytes of text.
    """
    if isinstance(value, str):
        left = MAX_CHARS - len(value)
    else:
        left = MAX_CHARS
        pending: list[object] = [value]
        while pending and left >= 0:
            item = pending.pop()
            left -= 8 + (len(item) if isinstance(item, str) else 0)  # a pointer and the text
            if isinstance(item, Mapping):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                pending += item
            elif isinstance(item, Namespace):
                raise SecurityError("a namespace has no text")
    if left < 0:
        raise SecurityError(f"a text grows beyond {MAX_CHARS:,} characters")
    return value


def _within_limit(parts: Iterable[str]) -> Iterator[str]:
    left = MAX_CHARS
    for part in parts:
        left -= len(part)
        if left < 0:
            raise SecurityError(f"the result grows beyond {MAX_CHARS:,} characters")
        yield part


def _joined(parts: Iterable[str]) -> str:
    return "".join(list(_within_limit(parts)))


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefused(str(message))


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"range() of more than {MAX_RANGE:,} numbers")
    return numbers


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As chat templates expect it: not escaped for HTML, unlike jinja2's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _check_call(name: str, args: Sequence[object]) -> None:
    """Refuses arguments that make a text much longer than they are; args[0] is the text or list."""
    if any(isinstance(arg, int) and abs(arg) > MAX_WIDTH for arg in args[1:]):
        raise SecurityError(f"a number beyond {MAX_WIDTH:,} given to {name}")
    if name in ("format", "format_map") and _WIDE_FORMAT.search(str(args[0])):
        raise SecurityError("a format wider than needed")
    if name == "replace" and len(args) > 2 and all(isinstance(arg, str) for arg in args[:3]):
        text, old, new = (str(arg) for arg in args[:3])
        _check_length(len(text) + text.count(old) * len(new))
    if name == "join":
        texts = [arg for arg in args[:2] if isinstance(arg, str)]
        parts = next((arg for arg in args[:2] if isinstance(arg, list | tuple)), ())
        _check_length(len(parts) * max(map(len, texts), default=0))
        measured(parts)


def _check_length(length: int) -> None:
    if length > MAX_CHARS:
        raise SecurityError(f"a text grows beyond {MAX_CHARS:,} characters")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # pass_context and its like put one argument in front
    hidden = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)  # copies jinja2's mark of that argument too
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = args[hidden:]
        if name in _TEXT_MAKERS:
            measured(given)
        _check_call(name, [*given, *kwargs.values()])
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _check_length(len(result))
        return result

    return bounded


@pass_context
def _each(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a for loop, counted."""
    budget: Budget = context.parent[_BUDGET]
    for item in items:
        budget.spend()
        yield item


def _concatenated(*parts: object) -> str:
    """jinja2's ~ operator."""
    measured(parts)
    return _joined(map(str, parts))


class _Guarded(NodeTransformer):
    """Puts the counting and measuring functions into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TemplateError("recursive loops are not supported in chat templates")
        self.generic_visit(node)
        node.iter = _call("each", [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._literal(node, node.items)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return self._literal(node, [pair.value for pair in node.items])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return node if node.ctx != "load" else self._literal(node, node.items)

    def _literal(self, node: nodes.Expr, items: Sequence[nodes.Expr]) -> nodes.Expr:
        """Measures a list when it is made, so that comparing or printing it is bounded too."""
        self.generic_visit(node)
        if all(isinstance(item, nodes.Const) for item in items):
            return node
        return _call("measured", [node], node.lineno)


def _call(function: str, args: Sequence[nodes.Node], line: int) -> nodes.Call:
    # an attribute of the environment: a template cannot put its own variable in the place
    target = nodes.EnvironmentAttribute(function)
    call = nodes.Call(target, list(args), [], None, None)
    call.set_lineno(line)
    return call


class _GenerationTag(Extension):
    """{% generation %}: marks what to train on; in a server only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - the type that jinja2 declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """See the module's docstring."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_joined)  # macros, {% set %} and {% call %} blocks
    each = staticmethod(_each)
    measured = staticmethod(measured)
    concatenated = staticmethod(_concatenated)

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=measured,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        for name in _LEFT_OUT:
            del self.filters[name]
        self.filters["tojson"] = _to_json
        for name, function in self.filters.items():
            self.filters[name] = _bounded_filter(name, function)

        def strftime_now(pattern: str) -> str:
            return now().strftime(pattern)

        names: dict[str, Any] = self.globals
        del names["lipsum"]
        names["range"] = _range
        names["raise_exception"] = _raise_exception
        names["strftime_now"] = strftime_now

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.parent[_BUDGET]
        budget.spend()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            _check_call(function.__name__, [owner, *args, *kwargs.values()])
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            _check_length(len(result))
        return measured(result) if isinstance(result, dict) else result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 1) if operator == "**" else 1)
            if bits + right.bit_length() > MAX_BITS:
                raise SecurityError(f"a number grows beyond {MAX_BITS:,} bits")
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check_length(len(left) + len(right))
        elif operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        elif operator == "%" and isinstance(left, str):
            measured(right)
            _check_call("format", [left])
        result = super().call_binop(context, operator, left, right)
        return measured(result) if isinstance(result, list | tuple) else result


def _check_repeat(items: object, times: object) -> None:
    if isinstance(items, str | list | tuple) and isinstance(times, int):
        _check_length(len(items) * times)
