"""The README's commands, run as they are written (but for the port and made-up paths)."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo_model import demo_model
from tests.serving import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (\S.*(?:\n      .*)*)", README, re.MULTILINE)
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def command(start: str) -> str:
    """The one command of the README that begins so, without its comment."""
    [found] = {text.partition("  #")[0].rstrip() for text in COMMANDS if text.startswith(start)}
    return str(found)


def run(words: str, limit_s: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", words],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """`tools/serve-demo`, on a port of its own."""
    demo_model()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = int(probe.getsockname()[1])
    words = [
        *shlex.split(command("tools/serve-demo")),
        "--port",
        str(number),
        "--kv-memory",
        "500M",
    ]
    with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + 180
        while not ready(number):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        yield number
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=60):
            return True
    except OSError:
        return False


@pytest.mark.slow
def test_the_curl_answers_with_paris(port: int) -> None:
    done = run(command("curl").replace(":8000", f":{port}"))
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.slow
def test_router_bench(port: int) -> None:
    done = run(f"{command('router-bench')} --url http://127.0.0.1:{port} -i 16 -o 4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Successful requests:\s+32", done.stdout)


def test_check_and_tiny_model(tmp_path: Path) -> None:
    made = run(
        command("python tools/make_model.py build/tiny").replace("build/tiny", str(tmp_path))
    )
    assert made.returncode == 0, made.stderr
    words = command("router check").replace("/models/some-llama", str(tmp_path))
    checked = run(words + " --gpus cpu")
    assert checked.returncode == 0, checked.stderr
    assert "nothing was started" in checked.stdout
    shaped = tmp_path / "shape"
    made = run(command("python tools/make_model.py build/big").replace("build/big", str(shaped)))
    assert made.returncode == 0, made.stderr
    assert (shaped / "config.json").is_file()


def test_micro_benchmarks() -> None:
    for name in ("scheduler", "pool", "wire", "detok", "sse"):
        assert name in README
        done = run(f"python -m bench.micro.{name}")
        # 1: over its budget, which depends on the machine and what else it does: no test.
        assert done.returncode in (0, 1), done.stderr
        assert not done.stderr
        assert "budget" in done.stdout


def test_the_tree_is_the_tree() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    folders = {path.partition("/")[0] for path in tracked if "/" in path}
    assert {folder for folder in folders if not folder.startswith(".")} == {
        "engine", "router", "tests", "bench", "tools",
    }  # fmt: skip
    for folder in folders:
        assert folder.startswith(".") or f"    {folder}/" in README
