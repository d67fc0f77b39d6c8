"""Grammars that clients write: bounds before they are compiled; GBNF as Lark.

Owns the bounds. Must not compile anything. Why (llguidance 1.9, measured): 20,000 rules that name
each other end its process; and special tokens or options of the compiler are not the client's to
choose.
"""

from __future__ import annotations

import re
from typing import Final

from router.errors import GrammarError
from router.text.patterns import pattern_fault

MAX_CHARS: Final = 20_000
MAX_RULES: Final = 300
MAX_BRACKETS: Final = 50

_ALLOWED: Final = ("%ignore", "%import")
_TOKEN: Final = re.compile(
    r"""
    (?P<comment>//[^\n]*|\#[^\n]*)
    | (?P<string>"(?:[^"\\\n]|\\.)*+")
    | (?P<pattern>/(?:[^/\\\n]|\\.)++/)
    | (?P<unclosed>["/].*)
    | (?P<special><[^<>\s]*>)
    | (?P<directive>%\w+)
    | (?P<rule>^[?!]*+\w++[^\s:"/<]*+\s*+:)
    | (?P<open>[(\[])
    | (?P<close>[)\]])
    """,
    re.VERBOSE | re.MULTILINE,
)


def as_lark(text: str) -> str:
    """The grammar in Lark's form; GBNF is known by `::=`. Raises GrammarError."""
    if not text.strip():
        raise GrammarError("The grammar is empty.")
    if len(text) > MAX_CHARS:
        raise GrammarError(f"The grammar is longer than {MAX_CHARS} characters.")
    if text.lstrip().startswith("{"):
        raise GrammarError("The grammar must be in Lark's form or in GBNF.")
    if "::=" not in text:
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    _check_brackets(text)
    try:
        lark = gbnf_to_lark(text)
    except Exception as error:  # it raises plain ones, whatever the client wrote
        raise GrammarError(
            "The grammar is not valid GBNF: each name needs a rule, and 'root' is the first."
        ) from error
    return lark.removeprefix("%llguidance {}\n")


def check_lark(text: str) -> None:
    """Raises GrammarError for a grammar that is too large, or takes what it may not."""
    depth = rules = 0
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "unclosed":  # up to the end of the line: no look for each
            raise GrammarError("The grammar is not valid: a text or pattern is not closed.")
        if kind == "special":
            raise GrammarError("A grammar cannot name special tokens (<...>).")
        if kind == "directive" and token.group() not in _ALLOWED:
            raise GrammarError("A grammar can have '%ignore' and '%import', no other directives.")
        if kind == "pattern":
            fault = pattern_fault(token.group()[1:-1])
            if fault is not None:
                raise GrammarError(f"A pattern of the grammar {fault}.")
        rules += kind == "rule"
        depth += (kind == "open") - (kind == "close")
        if depth > MAX_BRACKETS:
            raise GrammarError(f"The grammar has more than {MAX_BRACKETS} brackets in brackets.")
    if rules > MAX_RULES:
        raise GrammarError(f"The grammar has more than {MAX_RULES} rules.")


def _check_brackets(text: str) -> None:
    """Of any text: brackets in strings count too."""
    depth = 0
    for char in text:
        depth = max(0, depth + (char in "([") - (char in ")]"))
        if depth > MAX_BRACKETS:
            raise GrammarError(f"The grammar has more than {MAX_BRACKETS} brackets in brackets.")
