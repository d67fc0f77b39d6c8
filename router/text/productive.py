"""Whether text that follows a schema can ever end.

Owns nothing. Must not know keywords' types: it is given what `json_schema` has read.
"""

from __future__ import annotations

from typing import Any

_SCALARS = frozenset(("null", "boolean", "integer", "number", "string"))


def all_productive(schema: dict[str, Any]) -> bool:
    """False if some reference leads back to itself without a way out.

    Such a part passes every compiler, and its text goes on for ever. References point to members
    of the root's `$defs`. A part that could be avoided counts too: a model would walk into it.
    """
    definitions: dict[str, Any] = schema.get("$defs", {})
    known: set[str] = set()
    grown = True
    while grown:
        fresh = {
            name
            for name, part in reversed(definitions.items())
            if name not in known and _ends(part, known)
        }
        known |= fresh
        grown = bool(fresh)
    return len(known) == len(definitions)


def _ends(schema: Any, known: set[str]) -> bool:
    if isinstance(schema, bool):
        return True  # `false` allows nothing: that is for the compiler to say
    if "const" in schema or "enum" in schema:
        return True
    if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in known:
        return False
    if not all(_ends(part, known) for part in schema.get("allOf", ())):
        return False
    for choice in ("anyOf", "oneOf"):
        if choice in schema and not any(_ends(part, known) for part in schema[choice]):
            return False
    types = schema.get("type")
    names = set(types if isinstance(types, list) else [types])
    if types is None or names & _SCALARS:
        return True
    return ("object" in names and _object_ends(schema, known)) or (
        "array" in names and _array_ends(schema, known)
    )


def _object_ends(schema: dict[str, Any], known: set[str]) -> bool:
    members = schema.get("properties", {})
    return all(_ends(members.get(name, True), known) for name in schema.get("required", ()))


def _array_ends(schema: dict[str, Any], known: set[str]) -> bool:
    least = schema.get("minItems", 0)
    first = schema.get("prefixItems", [])
    if not all(_ends(part, known) for part in first[:least]):
        return False
    return least <= len(first) or _ends(schema.get("items", True), known)
