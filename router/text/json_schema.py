"""JSON schemas of clients: what is enforced, and what is refused because it could not be.

Owns the list of keywords, their types, and the bounds that keep a schema cheap to compile. Must not
know llguidance, models or HTTP. What leaves here means the same as what came in, in one dialect:
annotations and unknown words are gone (also `x-guidance`, which would switch the compiler's
options), each target of a `$ref` is a member of `$defs` at the root, old spellings are today's.

Why bounds on top of the compiler's own (llguidance 1.9, measured): an integer below -2^63 + 1 or a
chain of some 2,000 references ends its process, `multipleOf` 1000003 takes 20 s, integers beyond
2^53 lose digits, a reference that never ends only shows when text is made.
"""

from __future__ import annotations

import json
import math
import urllib.parse
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

from router.errors import GrammarError
from router.text.disjoint import disjoint
from router.text.patterns import pattern_fault
from router.text.productive import all_productive

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 32  # schemas within schemas, and values within `const` and `enum`
MAX_SCHEMAS: Final = 4000
MAX_VALUES: Final = 10_000  # of all enums
MAX_TARGETS: Final = 200  # of references
MAX_NESTING: Final = 400  # with all references followed; compiled within 2 MB of stack
MAX_MULTIPLE: Final = 10_000  # common multiple of all `multipleOf`, in units of the smallest digit
MAX_COUNT: Final = 2**31 - 1
MAX_MINIMUM_COUNT: Final = 10_000
MAX_EXACT: Final = 2**53 - 1
_PLACE_CHARS: Final = 120
_SEGMENT_CHARS: Final = 40

Path = tuple[str, ...]

# They limit values in ways that no grammar of ours can follow.
REFUSED: Final = frozenset(
    (
        *("contains", "minContains", "maxContains", "unevaluatedItems"),
        *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"),
        *("if", "then", "else", "not", "extends", "disallow", "divisibleBy"),
        *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
    )
)
TYPES: Final = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS: Final = (
    *("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"),
)
# Any text, or any number, has these formats.
_EMPTY_FORMATS: Final = frozenset(("password", "binary", "path", "float", "double"))
_INTEGER_FORMATS: Final = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-MAX_EXACT, MAX_EXACT),  # fewer than there are, and none that loses digits
    "uint32": (0, 2**32 - 1),
    "uint64": (0, MAX_EXACT),
}
# The compiler's own dates have a 29th of February each year, its times a 61st second.
_DATE: Final = (
    r"(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_TIME: Final = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_PATTERNS: Final = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
}


def enforceable(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema in the one dialect that is compiled; the argument stays as it is.

    Raises GrammarError that names the keyword and its place.
    """
    check_size(schema)
    reader = _Reader(schema)
    result = reader.read_all()
    if not all_productive(result):
        raise GrammarError("A '$ref' leads back to itself: no value that ends can satisfy it.")
    return result


def patterns_of(schema: dict[str, Any]) -> list[tuple[str, str]]:
    """(place, pattern) of each `pattern` and each key of `patternProperties` in the schema."""
    reader = _Reader(schema)
    reader.read_all()
    return reader.patterns


def check_size(value: object) -> None:
    """Raises GrammarError for a value too deep or too large, or one that is no JSON."""
    _check_depth(value, 3 * MAX_DEPTH)
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError("The schema is not valid JSON.") from error
    if size > MAX_BYTES:
        raise GrammarError(f"The schema is larger than {MAX_BYTES // 1024} KiB.")


def place_of(path: Path) -> str:
    """A path as text for a message: each segment cut, nothing that is not printable."""
    segments = (
        "".join(char for char in segment[:_SEGMENT_CHARS] if char.isprintable()) for segment in path
    )
    return ".".join(segments)[:_PLACE_CHARS]


class _Reader:
    """One pass over one schema: counts what is bounded, gathers the targets of references.

    `path` is always that of the keyword's value in the client's schema.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._num_schemas = 0
        self._num_values = 0
        self._deepest = 0
        self._multiples: list[Decimal] = []
        self._targets: dict[Path, str] = {}
        self._waiting: list[Path] = []
        self.patterns: list[tuple[str, str]] = []

    def read_all(self) -> dict[str, Any]:
        """The whole schema. Raises GrammarError."""
        result = self._schema(self._root, (), 0)
        if isinstance(result, bool):
            raise GrammarError("The schema must be an object.")
        nesting = self._deepest
        definitions: dict[str, Any] = {}
        while self._waiting:
            path = self._waiting.pop(0)
            self._deepest = 0
            definitions[self._targets[path]] = self._schema(self._find(path), path, 0)
            nesting += self._deepest + 1
            if nesting > MAX_NESTING:
                raise GrammarError("The schema's references make it nested too deeply.")
        self._check_multiples()
        return {**result, "$defs": definitions} if definitions else result

    def _schema(self, schema: Any, path: Path, depth: int) -> dict[str, Any] | bool:
        self._num_schemas += 1
        self._deepest = max(self._deepest, depth)
        if self._num_schemas > MAX_SCHEMAS:
            raise GrammarError(f"The schema has more than {MAX_SCHEMAS} parts.")
        if depth > MAX_DEPTH:
            raise GrammarError(f"The schema is nested more than {MAX_DEPTH} levels deep.")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise _wrong(path, "must be an object (a schema)")
        result: dict[str, Any] = {}
        for key, value in schema.items():
            if key in REFUSED:
                raise _wrong((*path, key), "cannot be enforced; leave it out")
            read = _KEYWORDS.get(key)
            if read is not None:
                read(self, value, (*path, key), depth, result)
        _finish(schema, result, path)
        return result

    # What each keyword does: check `value`, write to `out`.

    def read_type(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name in TYPES for name in names):
            raise _wrong(path, f"must be one or several of {', '.join(TYPES)}")
        out["type"] = list(dict.fromkeys(names)) if isinstance(value, list) else value

    def read_enum(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        if not isinstance(value, list) or not value:
            raise _wrong(path, "must be a list with at least one value")
        self._num_values += len(value)
        if self._num_values > MAX_VALUES:
            raise GrammarError(f"The schema's enums have more than {MAX_VALUES} values.")
        for item in value:
            _check_exact(item, path, MAX_DEPTH)
        out["enum"] = value

    def read_const(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        _check_exact(value, path, MAX_DEPTH)
        out["const"] = value

    def read_ref(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise _wrong(path, "must point into this schema: '#' or '#/...'")
        above = (self._step(path, end) for end in range(1, len(path)))
        if any(isinstance(node.get("$id"), str) for node in above):
            raise _wrong(path, "cannot be used within a part that has its own '$id'")
        out["$ref"] = f"#/$defs/{self._target(_segments(value), path)}"

    def read_schemas(self, value: Any, path: Path, depth: int, out: dict[str, Any]) -> None:
        if not isinstance(value, list) or not value:
            raise _wrong(path, "must be a list of schemas, with at least one")
        parts = [self._schema(item, (*path, str(i)), depth + 1) for i, item in enumerate(value)]
        name = path[-1]
        if name == "oneOf" and "anyOf" not in self._step(path, len(path) - 1):
            name = "anyOf" if disjoint(value, self._resolved) else name
        out.setdefault(name, []).extend(parts)  # `allOf` may have got some of ours already

    def read_members(self, value: Any, path: Path, depth: int, out: dict[str, Any]) -> None:
        members = _mapping(value, path)
        if path[-1] == "patternProperties":
            for pattern in members:
                self._note_pattern(pattern, (*path, pattern))
        out[path[-1]] = {
            name: self._schema(item, (*path, name), depth + 1) for name, item in members.items()
        }

    def read_definitions(self, value: Any, path: Path, _depth: int, _out: dict[str, Any]) -> None:
        for name in _mapping(value, path):
            self._target((*path, name), path)

    def read_inner(self, value: Any, path: Path, depth: int, out: dict[str, Any]) -> None:
        out[path[-1]] = self._schema(value, path, depth + 1)

    def read_items(self, value: Any, path: Path, depth: int, out: dict[str, Any]) -> None:
        if not isinstance(value, list):
            out["items"] = self._schema(value, path, depth + 1)
            return
        parts = [self._schema(item, (*path, str(i)), depth + 1) for i, item in enumerate(value)]
        if parts:
            out["prefixItems"] = parts
        rest = self._step(path, len(path) - 1).get("additionalItems", True)
        out["items"] = self._schema(rest, (*path[:-1], "additionalItems"), depth + 1)

    def read_property_names(
        self, value: Any, path: Path, _depth: int, _out: dict[str, Any]
    ) -> None:
        limits = value.keys() & {*_KEYWORDS, *REFUSED} if isinstance(value, dict) else None
        if value is not True and (limits is None or (limits and value != {"type": "string"})):
            raise _wrong(path, "cannot be enforced; leave it out")

    def read_required(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise _wrong(path, "must be a list of names")
        out["required"] = list(dict.fromkeys(value))

    def read_count(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _wrong(path, "must be a whole number, not below 0")
        if value > (MAX_MINIMUM_COUNT if path[-1].startswith("min") else MAX_COUNT):
            raise _wrong(path, "is too large to be enforced")
        out[path[-1]] = value

    def read_number(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        if isinstance(value, bool) and path[-1].startswith("exclusive"):
            return  # as draft 4 had it: see `_finish`
        out[path[-1]] = _exact_number(value, path)

    def read_multiple_of(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        number = _exact_number(value, path)
        if number <= 0:
            raise _wrong(path, "must be above 0")
        self._multiples.append(Decimal(repr(number)))
        out["multipleOf"] = number

    def read_pattern(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        if not isinstance(value, str):
            raise _wrong(path, "must be a string (a regular expression)")
        self._note_pattern(value, path)
        if "pattern" in out:  # ours, of a format
            out.setdefault("allOf", []).append({"pattern": out["pattern"]})
        out["pattern"] = value

    def read_format(self, value: Any, path: Path, _depth: int, out: dict[str, Any]) -> None:
        if not isinstance(value, str):
            raise _wrong(path, "must be a string")
        if value in _INTEGER_FORMATS:
            low, high = _INTEGER_FORMATS[value]
            out.setdefault("allOf", []).append({"minimum": low, "maximum": high})
        elif value in _PATTERNS:
            both = {"pattern": _PATTERNS[value]}
            if "pattern" in out:
                out.setdefault("allOf", []).append(both)
            else:
                out.update(both)
        elif value in FORMATS:
            out["format"] = value
        elif value not in _EMPTY_FORMATS:
            known = ", ".join(FORMATS)
            raise _wrong(path, f"cannot be enforced; known formats are {known}")

    def read_unique_items(self, value: Any, path: Path, _depth: int, _out: dict[str, Any]) -> None:
        if value is not False:
            raise _wrong(path, "cannot be enforced; leave it out")

    def _note_pattern(self, pattern: str, path: Path) -> None:
        fault = pattern_fault(pattern)
        if fault is not None:
            raise _wrong(path, fault)
        self.patterns.append((place_of(path), pattern))

    def _target(self, segments: Path, path: Path) -> str:
        """The name in our `$defs` of what a reference points to."""
        if segments not in self._targets:
            if self._find(segments) is None:
                raise _wrong(path, "points to nothing in this schema")
            if len(self._targets) == MAX_TARGETS:
                raise GrammarError(f"The schema has more than {MAX_TARGETS} definitions.")
            self._targets[segments] = f"d{len(self._targets)}"
            self._waiting.append(segments)
        return self._targets[segments]

    def _find(self, segments: Path) -> Any:
        """What lies there, or None."""
        node: Any = self._root
        for segment in segments:
            if isinstance(node, dict):
                node = node.get(segment)
            elif isinstance(node, list) and segment.isdecimal() and int(segment) < len(node):
                node = node[int(segment)]
            else:
                return None
        return node

    def _resolved(self, schema: Any) -> Any:
        """What a schema refers to in the end; itself if nothing, or if that is not clear."""
        for _ in range(MAX_DEPTH):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(reference, str) or not reference.startswith("#/"):
                return schema
            schema = self._find(_segments(reference))
        return None

    def _step(self, path: Path, end: int) -> dict[str, Any]:
        node = self._find(path[:end])
        return node if isinstance(node, dict) else {}

    def _check_multiples(self) -> None:
        if not self._multiples:
            return
        digits = max(-min(0, _exponent(number)) for number in self._multiples)
        scaled = [int(number.scaleb(digits)) for number in self._multiples if digits <= 6]
        if not scaled or math.lcm(*scaled) > MAX_MULTIPLE:
            raise GrammarError(
                "'multipleOf' cannot be enforced: the common multiple of all in the schema must be "
                f"at most {MAX_MULTIPLE} units of their last digit."
            )


_Read = Callable[[_Reader, Any, Path, int, dict[str, Any]], None]

_KEYWORDS: Final[dict[str, _Read]] = {
    "type": _Reader.read_type,
    "enum": _Reader.read_enum,
    "const": _Reader.read_const,
    "$ref": _Reader.read_ref,
    "$defs": _Reader.read_definitions,
    "definitions": _Reader.read_definitions,
    "allOf": _Reader.read_schemas,
    "anyOf": _Reader.read_schemas,
    "oneOf": _Reader.read_schemas,
    "properties": _Reader.read_members,
    "patternProperties": _Reader.read_members,
    "additionalProperties": _Reader.read_inner,
    "propertyNames": _Reader.read_property_names,
    "required": _Reader.read_required,
    "minProperties": _Reader.read_count,
    "maxProperties": _Reader.read_count,
    "items": _Reader.read_items,
    "prefixItems": _Reader.read_schemas,
    "minItems": _Reader.read_count,
    "maxItems": _Reader.read_count,
    "uniqueItems": _Reader.read_unique_items,
    "minLength": _Reader.read_count,
    "maxLength": _Reader.read_count,
    "pattern": _Reader.read_pattern,
    "format": _Reader.read_format,
    "minimum": _Reader.read_number,
    "maximum": _Reader.read_number,
    "exclusiveMinimum": _Reader.read_number,
    "exclusiveMaximum": _Reader.read_number,
    "multipleOf": _Reader.read_multiple_of,
}


def _finish(schema: dict[str, Any], out: dict[str, Any], path: Path) -> None:
    """What depends on several keywords of one schema."""
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        if schema.get(exclusive) is True and bound in out:
            out[exclusive] = out.pop(bound)
    if "prefixItems" in schema and isinstance(schema.get("items"), list):
        raise _wrong((*path, "items"), "must be a schema beside 'prefixItems'")
    # A key may come twice in the text, and count once.
    open_keys = out.get("additionalProperties") is not False or "patternProperties" in out
    if out.get("minProperties", 0) > 1 and open_keys:
        raise _wrong(
            (*path, "minProperties"), "above 1 needs 'additionalProperties': false to be enforced"
        )


def _wrong(path: Path, what: str) -> GrammarError:
    place = place_of(path)
    return GrammarError(f"'{place}' {what}." if place else f"The schema {what}.")


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, "must be an object")
    return value


def _exact_number(value: Any, path: Path) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(path, "must be a number")
    if not -MAX_EXACT <= value <= MAX_EXACT:
        raise _wrong(path, "is too large to be enforced exactly")
    return value


def _check_exact(value: object, path: Path, levels: int) -> None:
    """Raises GrammarError for a constant that is too deep, or has a number that loses digits."""
    _check_depth(value, levels)
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            _exact_number(item, path)


def _check_depth(value: object, levels: int) -> None:
    layer = [value]
    for _ in range(levels):
        layer = [
            child
            for item in layer
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not layer:
            return
    raise GrammarError("The schema is nested too deeply.")


def _segments(reference: str) -> Path:
    """The path that `#` or `#/...` points to."""
    if reference == "#":
        return ()
    segments = urllib.parse.unquote(reference[2:]).split("/")
    return tuple(segment.replace("~1", "/").replace("~0", "~") for segment in segments)


def _exponent(number: Decimal) -> int:
    exponent = number.normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    return exponent
