"""Reports of models on the wrong device, and of engines in each other's memory or cores."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from router import planning
from router.config import Options, resolve
from router.devices import (
    NO_DEVICES,
    Card,
    cards_by_name,
    choose_devices,
    find_cards,
    free_bytes_of,
    parse_cards,
)
from router.errors import StartError
from router.planning import plan_threads
from tests.router_process import ROOT, run_router, tiny_model

A, B, C = "GPU-aaaa1111-0", "GPU-bbbb2222-0", "GPU-cccc3333-0"
# The driver numbers by PCI bus; CUDA's own order (fastest first) would be another.
TEXT = f"0, {A}, Slow Card, 24000\n1, {B}, Fast Card, 80000\n2, {C}, Fast Card, 80000\n"
CARDS = parse_cards(TEXT)


@pytest.mark.parametrize(
    ("asked", "visible", "expected"),
    [
        ((), None, ("0", "1", "2")),
        ((), "2,1", ("2", "1")),
        ((), f"{C}, {A}", (C, A)),
        ((), "GPU-bbbb", ("GPU-bbbb",)),
        ((), "MIG-GPU-aaaa/1/0", ("MIG-GPU-aaaa/1/0",)),
        ((), "", ("cpu",)),
        *(((), nothing, ("cpu",)) for nothing in NO_DEVICES),
        (("2", "cpu"), "0", ("2", "cpu")),
        ((B,), None, (B,)),
    ],
)
def test_a22_devices_by_all_their_names(
    asked: tuple[str, ...], visible: str | None, expected: tuple[str, ...]
) -> None:
    assert choose_devices(asked, CARDS, visible) == expected


@pytest.mark.parametrize(
    ("asked", "visible", "cards", "code"),
    [
        (("3",), None, CARDS, 69),
        (("GPU-dddd",), None, CARDS, 69),
        (("0",), None, [], 69),
        ((), "3", CARDS, 69),
        ((), "0,7", CARDS, 69),
        ((), "0", [], 69),
        (("1", B), None, CARDS, 64),
        ((), "0,GPU-aaaa", CARDS, 64),
    ],
)
def test_a22_what_is_not_there_is_no_cpu(
    asked: tuple[str, ...], visible: str | None, cards: list[Card], code: int
) -> None:
    with pytest.raises(StartError) as caught:
        choose_devices(asked, cards, visible)
    assert caught.value.code == code


def test_a22_an_engine_is_told_the_uuid() -> None:
    """An index means another card once one of them is gone; a UUID does not."""
    known = cards_by_name(("2", "GPU-aaaa", "cpu"), CARDS)
    assert {device: card.uuid for device, card in known.items()} == {"2": C, "GPU-aaaa": A}
    assert free_bytes_of("2", CARDS) == 80_000 * 2**20


def test_a22_from_the_driver_to_the_engines_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "find_cards", lambda: CARDS)
    model = tiny_model(tmp_path)
    config = resolve(Options(models=f"tiny={model}", gpus="2,0", engine_command="x"))
    site = planning.Site({"CUDA_VISIBLE_DEVICES": "1"}, "ipc://x")
    (planned,) = planning.plan_models(config, site)
    told = [engine.spec.environment for engine in planned.engines]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in told] == [C, A]
    assert {each["CUDA_DEVICE_ORDER"] for each in told} == {"PCI_BUS_ID"}
    assert {engine.spec.config.device for engine in planned.engines} == {"cuda:0"}


def test_a22_a_driver_that_does_not_answer_is_no_missing_card(tmp_path: Path) -> None:
    assert find_cards(tmp_path, tool="false") == []  # no device, no question
    (tmp_path / "nvidia0").touch()
    for tool in ("false", str(tmp_path / "missing")):
        with pytest.raises(StartError, match="--gpus cpu") as caught:
            find_cards(tmp_path, tool=tool)
        assert caught.value.code == 69
        assert str(tmp_path) not in caught.value.message


def test_a22_a_missing_card_ends_the_command(tmp_path: Path) -> None:
    words = ("check", "--models", str(tiny_model(tmp_path)))
    for more, env in ((("--gpus", "97"), {}), ((), {"CUDA_VISIBLE_DEVICES": "97"})):
        code, output, _ = run_router(*words, *more, env=env)
        assert code == 69
        assert "no GPU '97'" in output


def test_a21_engines_of_one_card_share_it_by_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets are given by one planner, not taken by whoever measures first."""
    monkeypatch.setattr(planning, "find_cards", lambda: parse_cards(f"0, {A}, Card, 2000"))
    one, two = (
        tiny_model(folder) for folder in (tmp_path / "1", tmp_path / "2") if not folder.mkdir()
    )
    config = resolve(Options(models=f"one={one},two={two}", gpus="0"))
    plan = planning.make_plan(config, {})
    assert [place.device for place in plan.replicas] == ["0", "0"]
    assert sum(engine.total_bytes for engine in plan.engines) <= 2000 * 2**20
    assert all(engine.kv_bytes > 0 for engine in plan.engines)


@pytest.mark.parametrize(("cores", "engines"), [(1, 1), (2, 2), (8, 2), (8, 3), (64, 8), (2, 8)])
def test_a25_engines_share_the_cores(cores: int, engines: int) -> None:
    threads = plan_threads(cores, engines)
    assert threads >= 1
    assert threads * engines <= max(cores, engines)


def test_a25_threads_are_set_before_anything_is_imported(tmp_path: Path) -> None:
    config = resolve(
        Options(models=f"tiny={tiny_model(tmp_path)}", gpus="cpu,cpu", engine_command="x")
    )
    (planned,) = planning.plan_models(config, planning.Site(os.environ, "ipc://x"))
    for engine in planned.engines:
        threads = str(engine.spec.config.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        assert [engine.spec.environment[name] for name in names] == [threads] * 2


def test_a25_engines_are_fresh_interpreters() -> None:
    """The router starts programs; it never forks itself, and never holds torch."""
    for file in (ROOT / "router").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("fork", "forkpty", "preexec_fn"), file
            if isinstance(node, ast.keyword):
                assert node.arg != "preexec_fn", file
    code = (
        "import sys, pkgutil, importlib, router\n"
        "for each in pkgutil.walk_packages(router.__path__, 'router.'):\n"
        "    importlib.import_module(each.name)\n"
        "print(sorted({'torch', 'transformers', 'multiprocessing.pool'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
