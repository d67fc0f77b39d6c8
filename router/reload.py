"""What differs between the configuration that runs and the one that was read (pure).

Owns the rules: what can change while the server runs, and what a changed model means. It compares
values; who carries a change out, and in which order, is the roster's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from router.config import EngineOptions, RouterConfig

Kind = Literal["add", "remove", "replace", "rename", "replicas"]


class TextOptions(msgspec.Struct, frozen=True):
    """What the operator says of models' texts."""

    chat_format: str
    chat_template: str
    tool_parser: str
    reasoning_parser: str


class Wanted(msgspec.Struct, frozen=True):
    """One model as a configuration wants it: `path` is where its files lie, `devices` has an entry
    for each replica."""

    names: tuple[str, ...]
    path: str
    engine: EngineOptions
    text: TextOptions
    devices: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is compared by."""
        return self.names[0]

    def is_same_model(self, other: Wanted) -> bool:
        """Do requests for one get the same answers from the other?"""
        return (self.name, self.path, self.engine, self.text) == (
            other.name,
            other.path,
            other.engine,
            other.text,
        )


class Change(NamedTuple):
    """One difference. `more` and `fewer` are devices of replicas that come and go."""

    kind: Kind
    model: str
    more: tuple[str, ...] = ()
    fewer: tuple[str, ...] = ()
    detail: str = ""


def text_options(config: RouterConfig) -> TextOptions:
    """Those of a configuration."""
    return TextOptions(
        config.chat_format, config.chat_template, config.tool_parser, config.reasoning_parser
    )


def compare(old: Sequence[Wanted], new: Sequence[Wanted]) -> list[Change]:
    """The changes from `old` to `new`, those first that bring engines, those last that take them.

    A model is known by its first name.
    """
    before = {model.name: model for model in old}
    after = {model.name: model for model in new}
    changes = [Change("add", m.name, more=m.devices) for m in new if m.name not in before]
    for model in new:
        if model.name in before:
            changes += _changes_of(before[model.name], model)
    changes += [Change("remove", m.name, fewer=m.devices) for m in old if m.name not in after]
    return changes


def _changes_of(old: Wanted, new: Wanted) -> list[Change]:
    if not new.is_same_model(old):
        return [Change("replace", new.name, new.devices, old.devices, _difference(old, new))]
    changes: list[Change] = []
    if new.names != old.names:
        now = ", ".join(new.names[1:]) or "none"
        changes.append(Change("rename", new.name, detail=f"other names: {now}"))
    more, fewer = Counter(new.devices), Counter(old.devices)
    if more != fewer:
        changes.append(
            Change(
                "replicas",
                new.name,
                tuple((more - fewer).elements()),
                tuple((fewer - more).elements()),
                f"{len(old.devices)} -> {len(new.devices)}",
            )
        )
    return changes


def _difference(old: Wanted, new: Wanted) -> str:
    """What makes it another model, in the operator's words."""
    if old.path != new.path:
        return "another source"
    names = [
        field.name.replace("_", "-")
        for struct, left, right in (
            (EngineOptions, old.engine, new.engine),
            (TextOptions, old.text, new.text),
        )
        for field in msgspec.structs.fields(struct)
        if getattr(left, field.name) != getattr(right, field.name)
    ]
    return "other options: " + ", ".join(names)


# Limits that are asked for at each request; the rest of the process is built on the others.
_LIMITS: Final = (
    "max_concurrency", "max_queue", "max_queue_tokens", "request_timeout_s", "queue_timeout_s",
    "first_token_timeout_s", "idle_unload_s",
)  # fmt: skip


def limit_changes(old: RouterConfig, new: RouterConfig) -> list[str]:
    """Limits that differ and can change while the server runs, as the operator spells them."""
    return [
        f"{_flag(name)}: {getattr(old.limits, name)} -> {getattr(new.limits, name)}"
        for name in _LIMITS
        if getattr(old.limits, name) != getattr(new.limits, name)
    ]


def fixed_changes(old: RouterConfig, new: RouterConfig) -> list[str]:
    """Options that differ but hold until the next start, as the operator spells them."""
    before, after = _fixed(old), _fixed(new)
    return [name for name, value in before.items() if after[name] != value]


def _fixed(config: RouterConfig) -> dict[str, object]:
    http, limits = config.http, config.limits
    return {
        "host": http.host,
        "port": http.port,
        "api-key-file": http.api_keys,
        "admin-key-file": http.admin_keys,
        "cors-origins": http.cors_origins,
        "allowed-hosts": http.allowed_hosts,
        "metrics-names": http.metrics_names,
        "drain-timeout": limits.drain_timeout_s,
        "hang-timeout": limits.hang_timeout_s,
        "on-fatal": limits.on_fatal,
        "log-format": config.log_format,
        "log-level": config.log_level,
    }


def _flag(name: str) -> str:
    return name.removesuffix("_s").replace("_", "-")
