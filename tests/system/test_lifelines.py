"""However a router ends, nothing of it stays: the matrix of shutdowns, SIGKILL at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.lifelines import ENDINGS, SITUATIONS, kill_router_once, measured, shut_down
from tests.router_process import (
    RouterProcess,
    Start,
    is_running,
    text_of,
    tiny_model,
    wait_gone,
)

pytestmark = pytest.mark.slow

KILLS = 5  # the long run has 200
CRASHES = 3
ROUTERS = 8
AT_ONCE = 4

# Each situation and each ending, once at least; tools/soak plays all 35.
CELLS = (
    ("idle", "HUP"),
    ("load", "INT"),
    ("loading", "TERM TERM"),
    ("restarting", "INT"),
    ("hung", "TERM"),
    ("full queue", "INT INT"),
    ("slow reader", "TERM"),
)


def test_r15_matrix_of_shutdowns(tmp_path: Path) -> None:
    assert {cell[0] for cell in CELLS} == set(SITUATIONS)
    assert {cell[1] for cell in CELLS} == set(ENDINGS)
    tiny_model(tmp_path)
    folders = [tmp_path / str(index) for index in range(len(CELLS))]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ends = list(pool.map(lambda cell, folder: shut_down(folder, *cell), CELLS, folders))
    for end in ends:
        measured(f"R15: {end}")
        assert end.code in end.codes, end
        assert end.left == [], end
        assert end.unfinished == 0, end
        assert end.took_s < end.limit_s + 30, end


def test_r16_a1_sigkill_of_the_router_at_random_moments(tmp_path: Path, start: Start) -> None:
    rng = Random(16)
    kills = [kill_router_once(tmp_path, rng) for _ in range(KILLS)]
    longest_s = max(kill.gone_s for kill in kills)
    measured(f"R16: {KILLS} kills, longest until all engines were gone: {longest_s:.3f} s")
    assert all(kill.left == [] for kill in kills), kills
    router = start(script={})
    assert router.complete("hello", max_tokens=5).json()["choices"][0]["text"] == "hello"
    assert len(list(router.runtime.iterdir())) == 1  # its own: the others' were removed
    router.signal(signal.SIGTERM)
    assert router.wait() == 0
    assert router.leftovers() == []


# -- A2: clean-up touches what is ours and dead, and nothing else


def test_a2_the_end_and_the_start_of_one_router_are_not_felt_by_another(start: Start) -> None:
    script = {"tokens_per_s": 50, "rules": [{"match": "*", "reply": "abc ", "repeat": True}]}
    first, second = start(script=script), start(script=script)
    assert second.url
    with first.stream("go", max_tokens=300) as events:
        begun = [next(events)]
        second.signal(signal.SIGTERM)
        assert second.wait() == 0
        third = start(script=script)
        assert third.url  # it has swept
        third.popen.kill()
        third.wait()
        fourth = start(script=script)
        assert fourth.url  # it has removed what the third one left
        events_left = list(events)
    assert text_of(begun + events_left) == "abc " * 75
    assert first.events("engine_died") == []
    assert len(fourth.events("leftovers_removed")) == 1
    assert len(first.engine_pids) == 1


def test_a2_orphans_are_known_by_their_mark_and_not_by_their_name(start: Start) -> None:
    living = start(script={})
    assert living.url
    (folder,) = living.runtime.iterdir()
    dead = living.runtime / f"router-{'d' * 10}"
    dead.mkdir()
    (dead / "lock").write_text("1-2\n")
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    marks = (None, folder.name, "router-of-another-folder", dead.name)
    sleepers = [
        subprocess.Popen(words, env={"ROUTER_INSTANCE": mark} if mark else {}) for mark in marks
    ]
    try:
        *others, orphan = sleepers
        router = start(script={})
        assert router.url
        assert orphan.wait(30) == -signal.SIGKILL
        assert [other.poll() for other in others] == [None] * 3
        assert is_running(living.engine_pid(0))
        removed = router.events("leftovers_removed")
        assert [(event["folders"], event["engines"]) for event in removed] == [(1, 1)]
        assert not dead.exists()
        assert folder.exists()
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


# -- A3: a crash leaves no file


def test_a3_crashes_of_engines_leave_no_file(start: Start) -> None:
    def files() -> set[str]:
        folders = (Path("/dev/shm"), router.runtime)
        return {str(path) for folder in folders for path in folder.rglob("*")}

    router = start(script={}, gpus="cpu,cpu")
    assert router.url
    before = files()
    for count in range(1, CRASHES + 1):
        os.kill(router.engine_pid(0), signal.SIGKILL)
        router.wait_for("engine_ready", 2 + count)
    mine = {path for path in files() - before if path.startswith(str(router.runtime))}
    assert mine == set()
    assert router.complete("hello", max_tokens=5).status_code == 200


# -- A4: codes


def test_a4_a_late_sigterm_does_not_hide_a_fatal_failure(start: Start) -> None:
    fault = {"kind": "crash", "how": "exit", "code": 3}
    router = start(script={"start_faults": [fault]})
    router.wait_for("engine_died")
    router.signal(signal.SIGTERM)
    assert router.wait() == 70
    assert "exit code 3" in router.log.splitlines()[-1]
    assert router.leftovers() == []


# -- R31: many at once, in odd surroundings


def test_r31_eight_routers_at_once_in_odd_surroundings(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    odd: list[dict[str, str]] = [
        {"TMPDIR": str(long)},
        {"XDG_RUNTIME_DIR": str(long)},
        {"XDG_RUNTIME_DIR": "/proc"},  # nobody can write there, not even root
        {"HOME": "/proc", "XDG_CACHE_HOME": "/proc"},
    ]
    environs = [*odd, *[{}] * (ROUTERS - len(odd))]
    model = tiny_model(tmp_path)
    routers = [
        RouterProcess(
            tmp_path, "--models", f"tiny={model}", script={}, env=environ, shell="umask 000"
        )
        for environ in environs
    ]
    try:
        ports = {router.url for router in routers}
        assert len(ports) == ROUTERS
        for router in routers:
            assert router.complete("hello", max_tokens=5).json()["choices"][0]["text"] == "hello"
        for folder in routers[0].runtime.iterdir():
            assert folder.stat().st_mode & 0o777 == 0o700
        for router in routers:
            router.signal(signal.SIGTERM)
        assert [router.wait(60) for router in routers] == [0] * ROUTERS
        assert list(routers[0].runtime.iterdir()) == []
        assert wait_gone([pid for router in routers for pid in router.engine_pids], 5) == []
    finally:
        for router in routers:
            router.close()
