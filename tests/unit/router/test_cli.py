"""The wiring up to the first process: what would be started, and the exit codes of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router.arguments import parse
from router.cli import main
from router.errors import StartError
from router.planning import Site, make_plan, plan_models, served_model
from router.text.model import load_tokenizer
from router.text.template import ChatTemplate
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


def test_a_broken_tokenizer_is_found_by_check(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tiny_model(tmp_path)
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert main(["check", "--models", str(model), "--gpus", "cpu"]) == 78
    assert "tokenizer.json is no usable tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("padding", [0, 40])
def test_ids_without_text_are_told_to_the_engine(tmp_path: Path, padding: int) -> None:
    model = tiny_model(tmp_path)
    file = model / "config.json"
    size = load_tokenizer(model).vocab_size
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["vocab_size"] = size + padding
    file.write_text(json.dumps(settings), encoding="utf-8")
    config = parse(["--models", str(model), "--gpus", "cpu", "--load-format", "dummy"], {}).config
    (model_plan,) = plan_models(config, Site({}, "ipc:///none"))
    (engine,) = model_plan.engines
    assert engine.spec.config.text_ids == (size if padding else 0)


def test_a_chat_format_for_models_without_a_template(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    words = ["--models", f"a={model}", "--gpus", "cpu", "--conv-template", "llama-2"]
    config = parse(words, {}).config
    template = served_model(config, make_plan(config, {}), 0).template
    assert isinstance(template, ChatTemplate)
    assert "[INST]" in template.source
    with pytest.raises(StartError, match="exclude each other"):
        parse(["--chat-format", "a", "--chat-template", "b"], {})


def test_how_a_model_calls_and_thinks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    file = tmp_path / "t.jinja"
    file.write_text("{{ tools }}[TOOL_CALLS]<think>", encoding="utf-8")
    words = ["check", "--models", f"a={model}", "--gpus", "cpu"]
    assert main([*words, "--chat-template", str(file)]) == 0
    assert "a: tool calls as mistral, thinking in <think>\n" in capsys.readouterr().out
    parsers = ["--tool-parser", "llama3_json", "--reasoning-parser", "none"]
    assert main([*words, "--chat-template", str(file), *parsers]) == 0
    assert "a: tool calls as llama-3, no thinking\n" in capsys.readouterr().out
    for flag in ("--tool-parser", "--reasoning-parser"):
        assert main([*words, flag, "telepathy"]) == 78
        assert f"{flag} 'telepathy' is not known; known are" in capsys.readouterr().err
