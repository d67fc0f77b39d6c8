"""What differs between two configurations, and what of it can change while the server runs."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.arguments import parse
from router.config import RouterConfig
from router.reload import (
    Change,
    Wanted,
    compare,
    fixed_changes,
    limit_changes,
    text_options,
)


def config(*words: str) -> RouterConfig:
    return parse(words, {}).config


PLAIN = config()


def wanted(
    names: str, path: str = "/m", devices: str = "cpu", source: RouterConfig = PLAIN
) -> Wanted:
    return Wanted(
        tuple(names.split("|")),
        path,
        source.engine,
        text_options(source),
        tuple(devices.split(",")),
    )


def test_the_same_is_no_change() -> None:
    models = [wanted("a|b"), wanted("c", "/c", "0,1")]
    assert compare(models, models) == []
    assert compare(models, models[::-1]) == []  # the order is only shown


def test_newcomers_come_first_and_leavers_last() -> None:
    changes = compare([wanted("a"), wanted("b")], [wanted("b", "/other"), wanted("c")])
    assert changes == [
        Change("add", "c", more=("cpu",)),
        Change("replace", "b", ("cpu",), ("cpu",), "another source"),
        Change("remove", "a", fewer=("cpu",)),
    ]


def test_options_make_another_model() -> None:
    other = config("--quant", "int8", "--chat-format", "llama-2")
    (change,) = compare([wanted("a")], [wanted("a", source=other)])
    assert (change.kind, change.detail) == ("replace", "other options: quant, chat-format")


def test_names_and_replicas() -> None:
    assert compare([wanted("a|x", devices="0,1")], [wanted("a|y|z", devices="1,2,3")]) == [
        Change("rename", "a", detail="other names: y, z"),
        Change("replicas", "a", ("2", "3"), ("0",), "2 -> 3"),
    ]


@given(st.data())
def test_changes_carried_out_give_what_was_wanted(data: st.DataObject) -> None:
    """Applied one after the other to the old models, they give the new ones."""
    model = st.builds(
        wanted,
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["/m", "/n"]),
        st.lists(st.sampled_from("012"), min_size=1, max_size=4).map(",".join),
    )
    models = st.lists(model, unique_by=lambda each: each.name)
    old, new = data.draw(models), data.draw(models)
    state = {each.name: (each.path, sorted(each.devices)) for each in old}
    for change in compare(old, new):
        path, devices = state.pop(change.model, ("", []))
        if change.kind in ("add", "replace"):
            path = next(each.path for each in new if each.name == change.model)
        for device in change.fewer:
            devices.remove(device)
        if change.kind != "remove":
            state[change.model] = (path, sorted([*devices, *change.more]))
    assert state == {each.name: (each.path, sorted(each.devices)) for each in new}


@pytest.mark.parametrize(
    "words",
    [
        ("--port", "1"),
        ("--host", "::1"),
        ("--hang-timeout", "3"),
        ("--drain-timeout", "3"),
        ("--on-fatal", "wait"),
        ("--log-level", "error"),
        ("--log-format", "json"),
        ("--metrics-names", "vllm"),
        ("--cors-origins", "*"),
        ("--allowed-hosts", "*"),
    ],
)
def test_what_holds_until_the_next_start_is_named(words: tuple[str, str]) -> None:
    assert fixed_changes(PLAIN, config(*words)) == [words[0].removeprefix("--")]


def test_limits_can_change() -> None:
    new = config("--max-queue", "3", "--idle-unload", "60", "--request-timeout", "9")
    assert fixed_changes(PLAIN, new) == []
    assert limit_changes(PLAIN, new) == [
        "max-queue: 512 -> 3",
        "request-timeout: 0.0 -> 9.0",
        "idle-unload: 0.0 -> 60.0",
    ]


def test_every_option_is_one_or_the_other() -> None:
    """A new limit must be put into one of the two lists."""
    names = {field.name for field in msgspec.structs.fields(type(PLAIN.limits))}
    changed = dict.fromkeys(names - {"on_fatal"}, 12345.0)
    other = msgspec.structs.replace(
        PLAIN, limits=msgspec.structs.replace(PLAIN.limits, **changed, on_fatal="wait")
    )
    assert len(fixed_changes(PLAIN, other)) + len(limit_changes(PLAIN, other)) == len(names)
