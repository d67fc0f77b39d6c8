"""Typed reads from config.json: a missing or wrong value raises `ModelError` with its key.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import ModelError


class ConfigKeys:
    """One JSON object of config.json; `prefix` is how its keys are called in errors."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self._prefix = prefix

    def has(self, key: str) -> bool:
        """The key is there and not null."""
        return self.values.get(key) is not None

    def number(self, key: str, default: float | None = None) -> float:
        """An integer or a fraction."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        return float(value)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.wrong(key, "a positive integer")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def section(self, key: str) -> ConfigKeys:
        """An inner object; empty if it is not there."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return ConfigKeys(value, f"{self._prefix}{key}.")

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers, or () if it is not there."""
        value = self.values.get(key)
        if value is None:
            return ()
        items: Sequence[Any] = value if isinstance(value, list) else ()
        if len(items) != length or any(isinstance(item, bool) for item in items):
            raise self.wrong(key, f"a list of {length} numbers")
        if not all(isinstance(item, int | float) for item in items):
            raise self.wrong(key, f"a list of {length} numbers")
        return tuple(float(item) for item in items)

    def expect(self, key: str, wanted: object) -> None:
        """Raises unless the value is `wanted` or missing."""
        value = self._get(key, wanted)
        if value != wanted:
            raise ModelError(
                f"config.json: {self._prefix}{key} {value!r} is not supported ({wanted!r} is)"
            )

    def choice(self, key: str, known: Mapping[str, Any], default: str) -> Any:
        """`known` at the value of `key`. Raises with the list of known values."""
        value = self.text(key, default)
        if value not in known:
            names = ", ".join(known)
            raise ModelError(
                f"config.json: {self._prefix}{key} {value!r} is not supported ({names} are)"
            )
        return known[value]

    def wrong(self, key: str, wanted: str) -> ModelError:
        """The error for a value of the wrong kind."""
        value = self.values.get(key)
        return ModelError(f"config.json: {self._prefix}{key} must be {wanted}, it is {value!r}")

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"config.json: {self._prefix}{key} is missing")
        return default
