"""Runs a client's script in that client's own environment, which `tools/clients` makes.

Owns where the environments are and what a client process may see of this one. "main" is the
environment of the tests. A client that is not installed skips its tests, with the reason.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ROOT

ENVIRONMENTS = ROOT / "build" / "clients"
SCRIPTS = Path(__file__).parent / "scripts"
LIMIT_S = 300.0  # for one script, and for a test that plays it
# Nothing may be fetched while a client runs, and nothing of the developer's own may reach it.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "127.0.0.1",
}


# Who is played: the environment and the script.
CLIENTS = {
    "openai 3": ("main", "openai_sdk.py"),
    "openai 2": ("agents", "openai_sdk.py"),
    "openai 1": ("openai1", "openai_sdk.py"),
    "openai for node": ("node", "openai_node.mjs"),
    "langchain": ("main", "langchain_chat.py"),
    "langchain with openai 2": ("agents", "langchain_chat.py"),
    "llama-index": ("agents", "llama_index_like.py"),
    "litellm": ("agents", "litellm_proxy.py"),
    "autogen": ("agents", "autogen_client.py"),
    "anthropic 2": ("main", "anthropic_sdk.py"),
    "anthropic 0": ("openai1", "anthropic_sdk.py"),
}
LM_EVAL = "lm-eval"


class Results:
    """What the cases of one script gave, by their names; `crash` is why there are none."""

    def __init__(self, results: Mapping[str, Any], crash: str = "") -> None:
        self._results = results
        self._crash = crash

    def __getitem__(self, case: str) -> Any:
        """Fails the test if that case, or the script, ended in an exception of its own."""
        if self._crash:
            pytest.fail(f"the client's script failed:\n{self._crash}", pytrace=False)
        result = self._results[case]
        if isinstance(result, dict) and "crashed" in result:
            pytest.fail(f"the client's case {case!r} failed:\n{result['crashed']}", pytrace=False)
        return result


def environment(name: str) -> Path:
    """The folder of an environment; skips where it is missing."""
    wait_installed()
    folder = ENVIRONMENTS / name
    if not (folder / ".installed").exists():
        reason = ENVIRONMENTS / f"{name}.reason"
        why = reason.read_text().strip() if reason.exists() else "tools/clients brings it"
        pytest.skip(f"the client environment {name} is not installed: {why}")
    return folder


@cache
def wait_installed() -> None:
    """tools/test makes the environments beside the first tests, and holds a lock meanwhile."""
    lock = ENVIRONMENTS / ".lock"
    if lock.exists():
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)


def play(client: str, home: Path, settings: Mapping[str, Any]) -> Results:
    """Runs one of `CLIENTS` once, with `settings`; `home` stands in for the user's folder."""
    name, script = CLIENTS[client]
    if name == "main":
        return run([sys.executable, str(SCRIPTS / script)], home, settings)
    if name != "node":
        return run_python(name, script, home, settings)
    folder = environment(name)
    node = shutil.which("node")
    assert node is not None, "node was there when tools/clients ran"
    copy = folder / script  # node looks for packages from the script's own folder upwards
    shutil.copyfile(SCRIPTS / script, copy)
    return run([node, str(copy)], home, settings)


def run_python(name: str, script: str, home: Path, settings: Mapping[str, Any]) -> Results:
    """Runs one of `scripts/` with the Python of environment `name`."""
    python = environment(name) / "bin" / "python"
    return run([str(python), str(SCRIPTS / script)], home, settings)


def run(command: list[str], home: Path, settings: Mapping[str, Any]) -> Results:
    """The script's last line is its answer; a client may print lines of its own before it."""
    done = subprocess.run(
        command,
        input=json.dumps(settings),
        env={"PATH": os.environ["PATH"], "HOME": str(home), **_OFFLINE},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        return Results({}, done.stderr[-5000:])
    return Results(json.loads(done.stdout.splitlines()[-1]))
