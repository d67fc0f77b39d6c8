"""Which form a request wants for its answer, from every spelling that clients use.

Owns the names of these fields and what is said about them. Must not know how grammars are made
(`router.text.grammar`; `make` is that module's or stands for it), models or engines. Grammars are
compiled on the way, some milliseconds and more: call it in a thread. Whatever is asked for is
enforced or refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol

import msgspec

from router.errors import BadRequest, GrammarError
from router.text.grammar import Make, json_object_grammar


@dataclass(frozen=True)
class Structured:
    """A grammar for the answer, and the field that asked for it."""

    grammar: str
    param: str


class FormFields(Protocol):
    """The fields of a request that say how its answer must look; `None` is absent."""

    @property
    def response_format(self) -> Any:
        """OpenAI's."""

    @property
    def structured_outputs(self) -> Any:
        """vLLM's."""

    @property
    def guided_json(self) -> Any:
        """vLLM's before."""

    @property
    def guided_regex(self) -> Any:
        """vLLM's before."""

    @property
    def guided_choice(self) -> Any:
        """vLLM's before."""

    @property
    def guided_grammar(self) -> Any:
        """vLLM's before."""

    @property
    def guided_json_object(self) -> Any:
        """vLLM's before."""

    @property
    def guided_whitespace_pattern(self) -> Any:
        """vLLM's before; always refused."""

    @property
    def json_schema(self) -> Any:
        """SGLang's and llama.cpp's."""

    @property
    def regex(self) -> Any:
        """SGLang's."""

    @property
    def ebnf(self) -> Any:
        """SGLang's."""

    @property
    def grammar(self) -> Any:
        """llama.cpp's."""


# (make, value, its field) -> grammar, None if nothing is asked
_Build = Callable[[Make, Any, str], str | None]


def grammar_of(make: Make, request: FormFields) -> Structured | None:
    """The one form that the request asks for, or None.

    Raises BadRequest, `param` naming the field: for a wrong type, for two forms, for what cannot
    be enforced.
    """
    if request.guided_whitespace_pattern is not None:
        _refuse("guided_whitespace_pattern", "is not supported; white space in JSON is bounded")
    asked: list[tuple[str, Any, _Build]] = [
        (name, getattr(request, name), build) for name, build in _BUILDERS.items()
    ]
    asked += _members_of(request.structured_outputs)
    present = [
        (param, value, build)
        for param, value, build in asked
        if value is not None and not _asks_nothing(value, build)
    ]
    if len(present) > 1:
        _refuse(present[1][0], f"cannot be combined with '{present[0][0]}': one form for an answer")
    for param, value, build in present:
        grammar = build(make, value, param)
        return None if grammar is None else Structured(grammar, param)
    return None


def from_format(make: Make, format: object, param: str) -> Structured | None:
    """As `grammar_of`, for one object like `response_format`: also Responses' `text.format` and
    Anthropic's `output_config.format`, whose schema lies beside the type. `param`: its field.
    """
    if format is None:
        return None
    grammar = _format(make, format, param)
    return None if grammar is None else Structured(grammar, param)


def _format(make: Make, value: Any, param: str) -> str | None:
    wanted = _object(value, param)
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object" and wanted.get("schema") is None:
        return json_object_grammar()
    if kind == "json_object":  # as llama.cpp has it
        return _schema(make, wanted["schema"], f"{param}.schema")
    if kind == "json_schema":
        nested = wanted.get("json_schema")
        if nested is None and "schema" in wanted:
            return _schema(make, wanted["schema"], f"{param}.schema")
        inner = f"{param}.json_schema"
        described = _object(nested, inner)
        _check_names(described, inner)
        return _schema(make, described.get("schema"), f"{inner}.schema")
    if kind == "regex":
        name = "pattern" if "pattern" in wanted else "regex"
        return _regex(make, wanted.get(name), f"{param}.{name}")
    if kind == "grammar":
        return _grammar(make, wanted.get("grammar"), f"{param}.grammar")
    _refuse(f"{param}.type", "must be 'text', 'json_object', 'json_schema', 'regex' or 'grammar'")


def _check_names(described: Mapping[str, Any], param: str) -> None:
    for name, kind, words in (
        ("name", str, "a string"),
        ("description", str, "a string"),
        ("strict", bool, "true or false"),
    ):
        value = described.get(name)
        if value is not None and not isinstance(value, kind):
            _refuse(f"{param}.{name}", f"must be {words}")


def _schema(make: Make, value: Any, param: str) -> str:
    if value is True:
        value = {}
    with _naming(param):
        return make("schema", _object(value, param))


def _schema_or_text(make: Make, value: Any, param: str) -> str:
    if not isinstance(value, str):
        return _schema(make, value, param)
    try:
        schema = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        _refuse(param, "must be a JSON schema: an object, or its text")
    return _schema(make, schema, param)


def _regex(make: Make, value: Any, param: str) -> str:
    if not isinstance(value, str):
        _refuse(param, "must be a string (a regular expression)")
    with _naming(param):
        return make("pattern", value)


def _choice(make: Make, value: Any, param: str) -> str:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        _refuse(param, "must be a list of strings")
    with _naming(param):
        return make("choices", value)


def _grammar(make: Make, value: Any, param: str) -> str:
    if not isinstance(value, str):
        _refuse(param, "must be a string (a grammar)")
    with _naming(param):
        return make("lark", value)


def _json_object(_make: Make, value: Any, param: str) -> str:
    if value is not True:
        _refuse(param, "must be true or false")
    return json_object_grammar()


def _refused(_make: Make, _value: Any, param: str) -> str:
    _refuse(param, "is not supported by this server")


_BUILDERS: Final[dict[str, _Build]] = {
    "response_format": _format,
    "guided_json": _schema_or_text,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "guided_json_object": _json_object,
    "json_schema": _schema_or_text,
    "regex": _regex,
    "ebnf": _grammar,
    "grammar": _grammar,
}
# Of `structured_outputs`.
_MEMBERS: Final[dict[str, _Build]] = {
    "json": _schema_or_text,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _json_object,
    "structural_tag": _refused,
    "whitespace_pattern": _refused,
    "disable_additional_properties": _refused,
}


def _members_of(value: Any) -> list[tuple[str, Any, _Build]]:
    if value is None:
        return []
    members = _object(value, "structured_outputs")
    return [(f"structured_outputs.{name}", members.get(name), _MEMBERS[name]) for name in _MEMBERS]


def _asks_nothing(value: object, build: _Build) -> bool:
    """Empty texts, `false` switches and the format `text` are as good as absent."""
    if build is _format:
        return isinstance(value, dict) and value.get("type") == "text"
    return value is False if build in (_json_object, _refused) else value == ""


def _object(value: object, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(param, "must be an object")
    return value


def _refuse(param: str, what: str) -> NoReturn:
    raise BadRequest(f"'{param}' {what}.", param=param)


@contextmanager
def _naming(param: str) -> Generator[None]:
    """What cannot be enforced becomes an answer to the client that names the field."""
    try:
        yield
    except GrammarError as error:
        raise BadRequest(f"'{param}': {error.message}", param=param) from error
