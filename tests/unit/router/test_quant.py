"""What is said of a --quant that cannot be, before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from router.arguments import parse
from router.errors import EXIT_CONFIG, StartError
from router.planning import make_plan

WORDS = ("--gpus", "cpu", "--models", "/no/such/model", "--quant")


def refusal(*words: str) -> StartError:
    with pytest.raises(StartError) as caught:
        make_plan(parse([*WORDS, *words], {}).config, {})
    assert caught.value.code == EXIT_CONFIG
    return caught.value


def test_fp8_is_not_built_in() -> None:
    assert "fp8 is not built in yet: take int8" in refusal("fp8").message


@pytest.mark.parametrize("quant", ["nf4", "bnb-int8"])
def test_without_bitsandbytes(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    said = refusal(quant).message
    assert f"--quant {quant} needs bitsandbytes" in said
    assert "pip install 'llm-router[bitsandbytes]'" in said
    assert "/no/such/model does not exist" in refusal("int8").message


@pytest.mark.parametrize("quant", ["fp8", "nf4"])
def test_another_engine_decides_for_itself(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert "does not exist" in refusal(quant, "--engine-command", "some-engine").message
