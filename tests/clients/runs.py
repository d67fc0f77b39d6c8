"""Runs a client's script in that client's own environment, which `tools/clients` makes.

Owns where the environments are and what a client process may see of this one. "main" is the
environment of the tests. A client that is not installed skips its tests, with the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ROOT

ENVIRONMENTS = ROOT / "build" / "clients"
SCRIPTS = Path(__file__).parent / "scripts"
LIMIT_S = 300.0
# Nothing may be fetched while a client runs, and nothing of the developer's own may reach it.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "127.0.0.1",
}


class Results:
    """What the cases of one script gave, by their names."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._results = results

    def __getitem__(self, case: str) -> Any:
        """Fails the test if that case ended in an exception of its own."""
        result = self._results[case]
        if isinstance(result, dict) and "crashed" in result:
            pytest.fail(f"the client's case {case!r} failed:\n{result['crashed']}", pytrace=False)
        return result


def environment(name: str) -> Path:
    """The folder of an environment; skips where it is missing."""
    folder = ENVIRONMENTS / name
    if not (folder / ".installed").exists():
        reason = ENVIRONMENTS / f"{name}.reason"
        why = reason.read_text().strip() if reason.exists() else "tools/clients brings it"
        pytest.skip(f"the client environment {name} is not installed: {why}")
    return folder


def python_of(name: str) -> Path:
    """The interpreter of an environment."""
    return Path(sys.executable) if name == "main" else environment(name) / "bin" / "python"


def play(command: list[str], home: Path, **settings: Any) -> Results:
    """Runs a script with `settings` on its standard input. `home` stands in for the user's."""
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        input=json.dumps(settings),
        env={"PATH": os.environ["PATH"], "HOME": str(home), **_OFFLINE},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Results(json.loads(done.stdout))


def play_python(name: str, script: str, home: Path, **settings: Any) -> Results:
    """Runs one of `scripts/` with the Python of environment `name`."""
    return play([str(python_of(name)), str(SCRIPTS / script)], home, **settings)
