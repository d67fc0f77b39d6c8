"""Whether the parts of a `oneOf` exclude each other, so that it means the same as `anyOf`.

Owns nothing. Must not know how schemas are compiled. The compiler decides simple cases itself, but
not those behind references, which is how pydantic writes a union with a discriminator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def disjoint(parts: Sequence[Any], resolve: Callable[[Any], Any]) -> bool:
    """True if no value can satisfy two of the parts; False if that is not plain to see.

    Either the types tell them apart, or, among objects, a required member that has other texts in
    each. `resolve` follows the references of a schema.
    """
    seen: set[str] = set()
    objects: list[dict[str, Any]] = []
    for part in map(resolve, parts):
        types = _types(part)
        if not types or types & seen:
            return False
        if "object" in types:
            objects.append(part)
        seen |= types - {"object"}
    if len(objects) < 2:
        return True
    shared = set.intersection(*(set(_names(part)) for part in objects))
    return any(_tells_apart(name, objects, resolve) for name in shared)


def _types(schema: Any) -> set[str]:
    types = schema.get("type") if isinstance(schema, dict) else None
    names = types if isinstance(types, list) else [types]
    return {"number" if name == "integer" else name for name in names if isinstance(name, str)}


def _names(schema: dict[str, Any]) -> list[str]:
    """Of the members that must be there."""
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _tells_apart(
    name: str, objects: Sequence[dict[str, Any]], resolve: Callable[[Any], Any]
) -> bool:
    seen: set[str] = set()
    for part in objects:
        members = part.get("properties")
        member = resolve(members.get(name)) if isinstance(members, dict) else None
        if not isinstance(member, dict):
            return False
        texts = [member["const"]] if "const" in member else member.get("enum")
        if not isinstance(texts, list) or not texts:
            return False
        if not all(isinstance(text, str) for text in texts) or seen & set(texts):
            return False
        seen |= set(texts)
    return True
