"""What an answer must look like, as text that llguidance compiles: schemas, patterns, choices.

Owns how each kind becomes a grammar, the white space allowed in JSON, and the words for what is
wrong. Must not know HTTP, field names, models or engines. All functions are pure and take CPU time
(a millisecond as a rule, at most some hundred): the router has them called in a process of their
own, see `grammar_process`. llguidance is imported by the first one that needs it, 0.1 s.

A grammar that leaves here is enforced as a whole or refused: the compiler's warnings are errors,
and the first steps are tried, because some limits only show there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, Literal

from router.errors import GrammarError
from router.text.json_schema import check_size, enforceable, patterns_of
from router.text.lark import as_lark, check_lark
from router.text.patterns import pattern_fault

MAX_CHOICES: Final = 1000
MAX_CHOICE_CHARS: Final = 50_000

# Small models pad JSON with blanks when they may; a line break and four levels of two fit.
_OPTIONS: Final = {
    "whitespace_pattern": "[ \\n\\r\\t]{1,8}",
    "lenient": False,
    "coerce_one_of": False,
}
# Below the engine's limits, since a model's vocabulary takes more steps than single bytes do.
_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 300_000,
    "verbose_errors": False,
}
_TRIED_STEPS: Final = 12

Kind = Literal["schema", "pattern", "choices", "lark", "lines"]
Make = Callable[[Kind, Any], str]
_END: Final = 256  # the id behind the bytes

# What llguidance says (1.9) → what we say. The first that is found counts.
_REASONS: Final = (
    ("look-around", "has a look-ahead or look-behind, which cannot be enforced"),
    ("lookarounds", "has a look-ahead, a look-behind, \\b, or ^ and $ in the middle"),
    ("backreferences", "has a back reference, which cannot be enforced"),
    ("invalid regex", "has an invalid regular expression"),
    ("regex parse error", "is not a valid regular expression"),
    ("circular references", "has other keywords beside a '$ref' that leads back to them"),
    ("oneOf constraints", "has a 'oneOf' whose parts can hold at once; use 'anyOf'"),
    ("min/maxProperties", "has 'minProperties' or 'maxProperties' beside optional 'properties'"),
    ("not disjoint", "has 'patternProperties' whose patterns can match the same name"),
    ("patternProp", "has 'patternProperties' that cannot be enforced"),
    ("Unsatisfiable", "allows no value at all"),
    ("is empty", "allows no value at all, or is too complex to tell"),
    ("float range", "has a range of numbers that cannot be enforced"),
    ("unknown name", "uses a name that it does not define"),
    ("too large", "is too large"),
    ("too big", "is too large"),
    ("too many", "is too complex"),
    ("items; max is", "is too complex: too many optional parts in one place"),
    ("limit", "is too complex"),
)


def json_schema_grammar(schema: dict[str, Any]) -> str:
    """JSON that satisfies the schema. Raises GrammarError."""
    grammar = f"start: {json_schema_rule(schema)}\n"
    reason = _fault(grammar)
    if reason is None:
        return grammar
    for place, pattern in patterns_of(schema):
        alone = _fault(f"start: {_json_rule({'type': 'string', 'pattern': pattern})}\n")
        if alone is not None:
            raise GrammarError(f"'{place}' {alone}.")
    raise GrammarError(f"The schema {reason}.")


def json_schema_rule(schema: dict[str, Any]) -> str:
    """The schema as a Lark term, `%json {...}`, for a grammar that `check` will see.

    Raises GrammarError for what is refused without compiling.
    """
    return _json_rule(enforceable(schema))


def json_object_grammar() -> str:
    """Any JSON object."""
    return f"start: {_json_rule({'type': 'object'})}\n"


def regex_grammar(pattern: str) -> str:
    """Text that matches the pattern from its first character to its last. Raises GrammarError."""
    reason = pattern_fault(pattern) if pattern else "must not be empty"
    if reason is not None:
        raise GrammarError(f"The pattern {reason}.")
    grammar = f"start: /{_regex_to_lark(pattern)}/\n"
    reason = _fault(grammar)
    if reason is not None:
        raise GrammarError(f"The pattern {reason}.")
    return grammar


def choice_grammar(choices: list[str]) -> str:
    """One of the texts. Raises GrammarError."""
    if not choices or not all(choices):
        raise GrammarError("There must be at least one choice, and none may be empty.")
    if len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_CHOICE_CHARS:
        raise GrammarError(
            f"There may be {MAX_CHOICES} choices with {MAX_CHOICE_CHARS} characters together."
        )
    check_size(choices)
    texts = dict.fromkeys(json.dumps(choice, ensure_ascii=False) for choice in choices)
    # One terminal: as many alternatives of a rule would each be followed on their own.
    grammar = f"start: CHOICE\nCHOICE: {' | '.join(texts)}\n"
    reason = _fault(grammar)
    if reason is not None:
        raise GrammarError(f"The list of choices {reason}.")
    return grammar


def lark_grammar(text: str) -> str:
    """A grammar in Lark's form, or in GBNF (which has `::=`). Raises GrammarError."""
    lark = as_lark(text)
    check_lark(lark)
    reason = _fault(lark, initial_lexer_fuel=100_000)  # terminals that double: a second per million
    if reason is not None:
        raise GrammarError(f"The grammar {reason}.")
    return lark


def after_thinking(grammar: str, close: str, close_id: int | None = None) -> str:
    """Any text up to and including the closing tag, then the grammar.

    For prompts that open a thinking block. `close_id`: the tag's id where it is a special token,
    which no text matches. The grammar must have been checked.
    """
    parts: list[dict[str, Any]]
    if grammar.startswith("{"):
        parts = json.loads(grammar)["grammars"]
    else:
        parts = [{"lark_grammar": grammar}]
    head = "start: thinking /\\n{0,2}/ @answer\n"
    if close_id is None:
        head += f"thinking[suffix={json.dumps(close, ensure_ascii=False)}]: /(.|\\n)*/\n"
    else:
        head += f"thinking: /(.|\\n)*/ <[{close_id}]>\n"
    first = {**parts[0], "name": "answer"}
    return json.dumps({"grammars": [{"lark_grammar": head}, first, *parts[1:]]})


def checked(lines: str) -> str:
    """A grammar of our own making, from parts of a client's. Raises GrammarError."""
    reason = _fault(lines)
    if reason is not None:
        raise GrammarError(f"The grammar {reason}.")
    return lines


def make(kind: Kind, value: Any) -> str:
    """The grammar of that kind, see the functions above. Raises GrammarError."""
    return _MAKERS[kind](value)


_MAKERS: Final[dict[Kind, Callable[[Any], str]]] = {
    "schema": json_schema_grammar,
    "pattern": regex_grammar,
    "choices": choice_grammar,
    "lark": lark_grammar,
    "lines": checked,
}


def _json_rule(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS}, ensure_ascii=False)


def _regex_to_lark(pattern: str) -> str:
    from llguidance import regex_to_lark

    # \d and \w as JavaScript and JSON Schema have them: ASCII.
    return regex_to_lark(pattern, "dw")


def _fault(grammar: str, **bounds: Any) -> str | None:
    """Why it cannot be enforced, as the rest of a sentence. `bounds` instead of some limits."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**{**_LIMITS, **bounds})
    _, complaints = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    if complaints:
        return _reason(complaints[0])
    return _fault_of_first_steps(grammar, limits)


def _fault_of_first_steps(grammar: str, limits: Any) -> str | None:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    # Without slices, which only speed up large vocabularies, this takes 0.1 ms.
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])
    matcher = LLMatcher(tokenizer, _unforced(grammar), log_level=0, limits=limits)
    for step in range(_TRIED_STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little") if not matcher.is_error() else 0
        if matcher.is_error():
            return _reason(matcher.get_error())
        allowed = [byte for byte in range(_END) if mask >> byte & 1]
        if not allowed:
            break
        matcher.consume_token(allowed[step * 97 % len(allowed)])
    return None


def _unforced(grammar: str) -> str:
    """The same, without looking for text that must follow: for `/x+/ /x+/` that search never ends,
    because the first pattern takes every x. The engine does without it too.
    """
    option = '%llguidance {"no_forcing": true}\n'
    if not grammar.startswith("{"):
        return option + grammar
    parts = json.loads(grammar)["grammars"]
    for part in parts:
        if part.get("lark_grammar"):
            part["lark_grammar"] = option + part["lark_grammar"]
    return json.dumps({"grammars": parts})


def _reason(complaint: str) -> str:
    """llguidance's complaint in our words: it may hold anything that the client sent."""
    usual = "is not valid, or cannot be enforced"
    return next((words for sign, words in _REASONS if sign in complaint), usual)


class _Bytes:
    """A vocabulary of all bytes, as llguidance wants to be told of one."""

    eos_token_id = _END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(_END)), b"<end>")
    special_token_ids = (_END,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
