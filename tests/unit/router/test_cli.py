"""The wiring up to the first process: what would be started, and the exit codes of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.arguments import parse
from router.cli import main, make_plan
from router.errors import StartError
from tests.router_process import tiny_model


def plan(*words: str):  # type: ignore[no-untyped-def]
    return make_plan(parse(words, {}).config, {})


def test_the_same_model_twice_is_one_with_two_replicas(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    got = plan("--models", f"{model},{model}", "--gpus", "cpu,cpu")
    assert [source.names for source in got.models] == [("tiny",)]
    assert [replica.model for replica in got.replicas] == [0, 0]


def test_one_model_on_all_devices(tmp_path: Path) -> None:
    got = plan("--models", f"a|b={tiny_model(tmp_path)}", "--gpus", "cpu,cpu,cpu")
    assert [source.names for source in got.models] == [("a", "b")]
    assert len(got.replicas) == len(got.engines) == 3


def test_two_models_share_one_device(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    got = plan("--models", f"a={model},b={model}", "--gpus", "cpu")
    assert [source.names for source in got.models] == [("a",), ("b",)]
    assert [(replica.model, replica.device) for replica in got.replicas] == [(0, "cpu"), (1, "cpu")]


def test_one_name_for_two_models_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    with pytest.raises(StartError, match="'a' would name two models") as caught:
        plan("--models", f"a={model},a|b={model}", "--gpus", "cpu")
    assert caught.value.code == 64


def test_mistakes_become_one_sentence_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prot", "1"]) == 64
    assert capsys.readouterr().err == "router: unknown flag --prot: did you mean --port?\n"


def test_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["check", "--models", str(tiny_model(tmp_path)), "--device", "cpu"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "--device -> --gpus cpu" in out
    assert "tiny on cpu: float32" in out
