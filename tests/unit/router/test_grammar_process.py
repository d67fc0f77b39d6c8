"""Grammars that end the process which compiles them, or never end: only their requests notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from router.errors import GrammarError, Overloaded
from router.supervisor import child_environment
from router.text.grammar import Kind, Make, make
from router.text.grammar_process import GrammarProcesses
from tests.serving import ROOT, wait_for

# What the compiler might do with a text that it was not made for.
EVIL = """
import os, pathlib, time
from router.text import grammar

def evil(text):
    if text == "abort":
        os.abort()
    if text == "spin":
        while True:
            pass
    if text == "sleep":
        time.sleep(60)
    if text == "memory":
        return "x" * (2 << 30)
    if text == "once" and not os.path.exists(FLAG):
        pathlib.Path(FLAG).touch()
        os.abort()
    return "start: " + repr(text)

grammar._MAKERS["lark"] = evil
"""

Build = Callable[..., GrammarProcesses]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Processes whose compiler does strange things to some texts."""
    made: list[GrammarProcesses] = []
    flag = f"FLAG = {str(tmp_path / 'flag')!r}\n"
    (tmp_path / "sitecustomize.py").write_text(flag + EVIL)
    environment = {**child_environment(os.environ), "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def build(**limits: float) -> GrammarProcesses:
        made.append(GrammarProcesses(environment, **limits))
        return made[-1]

    yield build
    for processes in made:
        processes.close()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("schema", {"type": "object", "properties": {"é": {"const": [1, 2.5, None, 10**17]}}}),
        ("pattern", r"\d{3}-[a-zß]"),
        ("choices", ["ja", "nein 🎵"]),
        ("lark", 'start: "a" | "b"'),
        ("lark", 'root ::= "a" | "b"'),
        ("lines", 'start: "a"\n'),
        ("schema", {"not": {}}),
        ("schema", {"type": "string", "pattern": "(?=x)"}),
        ("schema", {"enum": ["\ud800"]}),
        ("schema", {"const": float("nan")}),
        ("pattern", "("),
        ("choices", []),
        ("lark", "start: nobody"),
        ("lines", "start: /(/"),
    ],
)
def test_it_makes_what_is_made_here(kind: Kind, value: Any) -> None:
    processes = GrammarProcesses(child_environment(os.environ))
    try:
        assert outcome(processes.make, kind, value) == outcome(make, kind, value)
        assert outcome(processes.make, kind, value) == outcome(make, kind, value)
        assert len(processes.pids()) <= 1
    finally:
        processes.close()


def outcome(function: Make, kind: Kind, value: Any) -> str:
    """What it makes, or says."""
    try:
        return function(kind, value)
    except GrammarError as error:
        return error.message.removeprefix("The schema").removeprefix("It")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("abort", "It cannot be compiled."),
        ("memory", "It cannot be compiled."),
        ("spin", "It takes more than 0.2 s to compile."),
    ],
)
def test_s16_a_grammar_that_breaks_the_compiler_is_refused(
    build: Build, text: str, says: str
) -> None:
    processes = build(cpu_s=0.2 if text == "spin" else 30.0, patience_s=60.0)
    assert processes.make("lark", "good") == "start: 'good'"
    for _ in range(2):
        with pytest.raises(GrammarError) as caught:
            processes.make("lark", text)
        assert caught.value.message == says
    assert processes.make("lark", "good") == "start: 'good'"
    assert len(processes.pids()) == 1


def test_s16_one_that_only_waits_is_ended_too(build: Build) -> None:
    processes = build(patience_s=0.5)
    with pytest.raises(GrammarError):
        processes.make("lark", "sleep")
    assert processes.pids() == []


def test_a_death_that_was_nobodys_fault_is_not_felt(build: Build) -> None:
    processes = build()
    assert processes.make("lark", "once") == "start: 'once'"
    [pid] = processes.pids()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert processes.make("lark", "good") == "start: 'good'"
    assert not psutil.pid_exists(pid)


def test_s16_one_that_spins_holds_nobody_up(build: Build) -> None:
    processes = build(cpu_s=60.0, patience_s=60.0)
    with ThreadPoolExecutor(2) as threads:
        spinning = threads.submit(processes.make, "lark", "spin")
        assert threads.submit(processes.make, "lark", "good").result(60) == "start: 'good'"
        assert not spinning.done()
        processes.close()
        with pytest.raises((GrammarError, Overloaded)):
            spinning.result(60)
    with pytest.raises(Overloaded):
        processes.make("lark", "spin")


def test_one_that_does_not_start_is_no_fault_of_the_grammar(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.text.grammar_process._COMMAND", ("/nowhere/python",))
    with pytest.raises(Overloaded):
        build().make("lark", "good")


PARENT = """
import os
from router.text.grammar_process import GrammarProcesses
processes = GrammarProcesses(dict(os.environ))
processes.make("lark", 'start: "a"')
print(*processes.pids(), flush=True)
os.kill(os.getpid(), 9)
"""


def test_it_leaves_with_its_parent() -> None:
    parent = subprocess.run(
        [sys.executable, "-c", PARENT], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert parent.returncode == -signal.SIGKILL
    wait_for(lambda: not psutil.pid_exists(int(parent.stdout)))
