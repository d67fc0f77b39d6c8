"""Hostile and ordinary templates (operations.md S8)."""

from __future__ import annotations

import asyncio
import itertools
from datetime import datetime
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError

from router.text.pool import TakesLong
from router.text.sandbox import MAX_CHARS, Program, TemplateRefused


def render(source: str, **variables: Any) -> str:
    return Program(source).render(variables)


NESTED = "{% set ns = namespace(x=['aaaaaaaa']) %}" + "{% set ns.x = [ns.x, ns.x] %}" * 40

HOSTILE = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class walk by filter": "{{ ''|attr('__class__') }}",
    "class walk by item": "{{ ''['__class__'] }}",
    "class walk by map": "{{ ['']|map(attribute='__class__')|list }}",
    "class walk by format": "{{ '{0.__class__}'.format('') }}",
    "function globals": "{{ raise_exception.__globals__ }}",
    "generator frame": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "changes its arguments": "{{ messages.append(1) }}",
    "clears a mapping": "{{ messages[0].clear() }}",
    "the budget": "{{ self['_TemplateReference__context'] }}",
    "huge range": "{% for i in range(1000000000) %}{% endfor %}",
    "nested loops": "{% for i in range(10000) %}{% for j in range(10000) %}"
    "{% endfor %}{% endfor %}",
    "calls in loops": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "huge text": "{{ 'x' * 1000000000 }}",
    "huge list": "{{ ([1] * 1000000000)|length }}",
    "doubling by +": "{% set ns = namespace(x='x') %}"
    "{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='x') %}"
    "{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by a block": "{% set ns = namespace(x='x') %}{% for i in range(100) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "doubling by a macro": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}"
    "{% set ns = namespace(x='x') %}{% for i in range(100) %}{% set ns.x = d(ns.x) %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(x='x') %}"
    "{% for i in range(100) %}{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
    "squaring by replace": "{% set a = 'x' * 1000000 %}{{ a|replace('x', a) }}",
    "squaring by join": "{% set a = 'x' * 1000000 %}{{ ([a] * 1000)|join }}",
    "squaring by join method": "{% set a = 'x' * 1000000 %}{{ a.join('y' * 1000) }}",
    "doubling of a list": "{% set ns = namespace(x=[1]) %}"
    "{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "list of lists, printed": NESTED + "{{ ns.x }}",
    "lists of lists, compared": "{% set ns = namespace(x=[1], y=[1]) %}"
    + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}" * 40
    + "{{ ns.x == ns.y }}",
    "mapping of mappings": "{% set ns = namespace(x=1) %}"
    + "{% set ns.x = dict(a=ns.x, b=ns.x) %}" * 40
    + "{{ ns.x }}",
    "namespace of namespaces": "{% set ns = namespace(x=1) %}"
    + "{% set ns = namespace(a=ns, b=ns) %}" * 40
    + "{{ ns }}",
    "list of lists, as json": NESTED + "{{ ns.x|tojson }}",
    "list of lists, as text": NESTED + "{{ ns.x|string|length }}",
    "list of lists, joined": NESTED + "{{ ns.x ~ '' }}",
    "list of lists, formatted": NESTED + "{{ '%s' % ns.x }}",
    "output in a loop": "{% set a = 'x' * 1000000 %}{% for i in range(1000) %}{{ a }}{% endfor %}",
    "padding": "{{ 'x'|center(1000000000) }}",
    "padding by a method": "{{ 'x'.ljust(1000000000) }}",
    "indentation": "{{ 'a\nb'|indent(1000000000) }}",
    "indented json": "{{ [1]|tojson(indent=1000000000) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "format by a filter": "{{ '%1000000000d'|format(1) }}",
    "format by an argument": "{{ '%*d' % (1000000000, 1) }}",
    "format by a method": "{{ '{:1000000000}'.format(1) }}",
    "format by an inner field": "{{ '{:{}}'.format(1, 1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list|length }}",
    "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "squaring of a number": "{% set ns = namespace(x=9) %}"
    "{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=1000000) }}",
    "include": "{% include 'other' %}",
    "import": "{% import 'other' as other %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_end_soon_and_say_nothing(source: str) -> None:
    try:
        result = render(source, messages=[{"role": "user"}])
    except (TemplateError, TypeError, ValueError, OverflowError, RecursionError):
        return
    # the sandbox answers some attribute walks with an undefined value, which prints as nothing
    assert "class" not in result
    assert "globals" not in result
    assert len(result) < 100


def test_recursive_loops_are_refused() -> None:
    with pytest.raises(TemplateError, match="recursive"):
        Program("{% for x in y recursive %}{{ loop(x) }}{% endfor %}")


def test_time_is_limited() -> None:
    ticks = itertools.count()
    program = Program("{% for i in range(9000) %}x{% endfor %}", clock=lambda: float(next(ticks)))
    with pytest.raises(SecurityError, match="too long"):
        program.render({})


def test_the_result_may_be_long_but_not_too_long() -> None:
    text = "x" * (MAX_CHARS // 2)
    assert len(render("{{ a }}{{ a }}", a=text)) == MAX_CHARS
    with pytest.raises(SecurityError):
        render("{{ a }}{{ a }}x", a=text)


def test_a_template_cannot_replace_the_guards() -> None:
    source = (
        "{% set each = 1 %}{% set concatenated = 2 %}{% for i in [1, 2] %}{{ i ~ 'x' }}{% endfor %}"
    )
    assert render(source, budget=1) == "1x2x"


def test_what_chat_templates_use() -> None:
    assert (
        render("{% for i in x %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", x=[1, 2])
        == "1"
    )
    assert render("{{ x|tojson }}", x={"a": "<é>"}) == '{"a": "<é>"}'
    assert render("{{ x|tojson(indent=2) }}", x=[1]) == "[\n  1\n]"
    assert render("{% generation %}{{ x }}{% endgeneration %}", x=1) == "1"
    assert (
        render(
            "{% for m in x %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}", x=[1]
        )
        == "0True1"
    )
    assert render("{% if true %}\n    a\n{% endif %}\nb") == "    a\nb"
    assert render("{{ x.split('</t>')[-1].lstrip('\\n')|trim }}", x="a</t>\n b ") == "b"
    assert render("{{ x[::-1] }}{{ x[1:] }}", x="abc") == "cbabc"
    assert render("{{ x.items()|list|first|last }}", x={"a": 1}) == "1"
    assert render("{% macro m(a, b=2) %}{{ a + b }}{% endmacro %}{{ m(1) }}") == "3"
    assert render("{{ 'a' in x and x is string and y is not defined }}", x="abc") == "True"
    assert (
        render("{{ x|selectattr('a', 'equalto', 1)|map(attribute='a')|list }}", x=[{"a": 1}])
        == "[1]"
    )
    assert render("{{ 'x: %s' % x }}{{ x ~ 1 }}{{ 2 * 3 }}", x=5) == "x: 5516"
    assert render("{{ missing }}") == ""


def test_the_date() -> None:
    program = Program("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2026, 11, 5))
    assert program.render({}) == "05 Nov 2026"


def test_errors_of_the_template() -> None:
    with pytest.raises(TemplateRefused, match="no system here"):
        render("{{ raise_exception('no system here') }}")
    with pytest.raises(UndefinedError):
        render("{{ a.b.c }}")
    with pytest.raises(TemplateError):
        Program("{% if %}")


LOOPS = "{% for i in range(900) %}{% for j in range(900) %}{% endfor %}{% endfor %}"


async def test_s8_a_template_may_not_hold_the_event_loop() -> None:
    program = Program(LOOPS + "{{ x }}")
    with pytest.raises(TakesLong):
        program.render({"x": "a"})
    assert Program("{{ x }}").render({"x": "a"}) == "a"
    assert await asyncio.to_thread(program.render, {"x": "a"}) == "a"
