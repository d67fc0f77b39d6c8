"""Engine processes: what they may know, how their end is judged and told, and real ones."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.protocol import Stats
from router.crash import CRASH_LOOP, Death, cause, exit_code, judge, sentence
from router.engine_process import EngineProcess, EngineSpec
from router.errors import StartError
from router.metrics import Metrics
from router.planning import plan_threads
from router.streams import Casualty, Remains, Stream
from router.supervisor import Supervisor, engine_environment
from tests.router_process import is_running, until

CONFIG = EngineConfig(endpoint="ipc:///nowhere", replica=0, epoch=0, model="m")


def death(code: int, **fields: Any) -> Death:
    values: dict[str, Any] = {
        "served_s": 0.0,
        "condemned": "",
        "out_of_memory": False,
        "last_words": None,
        "tail": (),
    }
    return Death(code, **{**values, **fields})


@pytest.mark.parametrize(
    ("end", "word", "says", "code"),
    [
        (death(-11), "signal", "SIGSEGV", 70),
        (
            death(1, tail=("Traceback", "KeyError: 'x'", "")),
            "exit",
            "KeyError: 'x' (exit code 1)",
            70,
        ),
        (death(78, last_words=("bad layer", 78)), "exit", "bad layer (exit code 78)", 78),
        (death(75), "exit", "exit code 75", 75),
        (death(-9, out_of_memory=True), "out_of_memory", "killed by the kernel, out of memory", 75),
        (death(-9, condemned="no progress for 9 s"), "hang", "killed: no progress for 9 s", 70),
        (death(-9, condemned="its socket is gone"), "condemned", "killed: its socket is gone", 70),
        (death(0), "exit", "exit code 0", 70),
    ],
)
def test_how_an_end_is_told(end: Death, word: str, says: str, code: int) -> None:
    assert (cause(end), sentence(end), exit_code(end)) == (word, says, code)


@given(st.integers(1, 100), st.floats(-1, 1), st.booleans())
def test_back_off(streak: int, jitter: float, first_load: bool) -> None:
    verdict = judge(streak, first_load=first_load, on_fatal="wait", jitter=jitter)
    if streak >= CRASH_LOOP:
        assert verdict.action == "park"
    else:
        assert verdict.action == "restart"
        assert 0.8 * 0.5 * 2 ** (streak - 1) <= verdict.delay_s <= 30 * 1.2


def test_a_failed_first_load_ends_it_all() -> None:
    assert judge(1, first_load=True, on_fatal="exit", jitter=0).action == "exit"
    assert judge(1, first_load=True, on_fatal="wait", jitter=0).action == "restart"
    assert judge(1, first_load=False, on_fatal="exit", jitter=0).action == "restart"


def test_environment_is_an_allow_list() -> None:
    environ = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "HF_HOME": "/hf",
        "HF_TOKEN": "secret",
        "ROUTER_API_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "https_proxy": "http://proxy",
        "XPATH": "x",
    }
    got = engine_environment(environ, threads=3, device="2")
    assert got["PATH"] == "/bin"
    assert got["OMP_NUM_THREADS"] == got["MKL_NUM_THREADS"] == "3"
    assert (got["CUDA_VISIBLE_DEVICES"], got["CUDA_DEVICE_ORDER"]) == ("2", "PCI_BUS_ID")
    assert "secret" not in got.values()
    assert not {"https_proxy", "XPATH"} & set(got)
    assert engine_environment({}, threads=1, device="cpu")["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("cores", "engines", "wanted", "threads"),
    [(2, 1, 0, 2), (2, 2, 0, 1), (16, 1, 0, 15), (16, 4, 0, 3), (1, 4, 0, 1), (8, 2, 5, 5)],
)
def test_threads(cores: int, engines: int, wanted: int, threads: int) -> None:
    assert plan_threads(cores, engines, wanted) == threads


class Book:
    """Stands for the fleet: remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start(self, index: int, epoch: int, identity: bytes) -> None:
        self.told.append(("start", index, epoch, identity))

    def lose(self, index: int, reason: str, *, outside: bool = False) -> list[Stream]:
        self.told.append(("lose", index, reason))
        return []

    def park(self, index: int, reason: str) -> None:
        self.told.append(("park", index, reason))

    def rouse(self, index: int) -> None:
        self.told.append(("rouse", index))

    def remains(self, index: int) -> Remains:
        return Remains(None, Stats(steps=7), time.monotonic(), (Casualty("r1", True),))


def spec(program: str, config: EngineConfig = CONFIG) -> EngineSpec:
    return EngineSpec("m", (sys.executable, "-c", program), dict(os.environ), config)


READS = "import sys; line = sys.stdin.readline(); print('got', line[:9], flush=True); "


def supervisor(book: Book, *programs: str, on_fatal: Any = "exit") -> Supervisor:
    specs = [spec(program) for program in programs]
    return Supervisor(specs, book, Metrics(), on_fatal=on_fatal, clock=time.monotonic)


async def test_orders_go_in_and_lines_come_out() -> None:
    program = READS + "sys.stderr.write('x' * 9000 + '\\n'); sys.stderr.write('no newline')"
    process, lines = EngineProcess.launch(spec(program), 1), list[str]()
    relay = asyncio.create_task(process.relay(lines.append))
    assert await process.exited() == 0
    await relay
    assert lines[0] == 'got {"endpoin'
    assert lines[-1] == "no newline"
    assert sum(line.count("x") for line in lines) >= 4000
    assert list(process.tail) == lines


async def test_the_pipe_is_the_life_line() -> None:
    process = EngineProcess.launch(spec(READS + "sys.stdin.read(); sys.exit(5)"), 1)
    relay = asyncio.create_task(process.relay(lambda _line: None))
    await asyncio.sleep(0.3)
    assert process.popen.stdin is not None
    process.popen.stdin.close()
    assert await process.exited() == 5
    await relay


async def test_grandchildren_go_too() -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
    )
    process, lines = EngineProcess.launch(spec(program), 1), list[str]()
    relay = asyncio.create_task(process.relay(lines.append))
    assert await process.exited() == 0
    await asyncio.wait_for(relay, 60)
    await until(lambda: not is_running(int(lines[0])))


async def test_a_failed_first_load_is_the_failure() -> None:
    book = Book()
    sup = supervisor(book, READS + "print('no such layer'); sys.exit(78)")
    running = asyncio.create_task(sup.run())
    error = await asyncio.wait_for(sup.failure, 60)
    assert isinstance(error, StartError)
    assert error.code == 78
    assert error.message == "engine 0 (m) failed: no such layer (exit code 78)"
    await sup.stop(0.0)
    await running
    assert [entry[0] for entry in book.told] == ["start", "lose", "park"]
    assert book.told[0] == ("start", 0, 1, b"engine-0-1")


async def test_restart_and_stop() -> None:
    book = Book()
    sup = supervisor(book, READS + "import time; time.sleep(60)", on_fatal="wait")
    running = asyncio.create_task(sup.run())
    await until(lambda: bool(book.told))
    sup.changed(0, "dead", "no progress for 9 s")
    await until(lambda: [entry[0] for entry in book.told].count("start") == 2)
    assert book.told[1] == ("lose", 0, "killed: no progress for 9 s")
    await sup.stop(5.0)
    await asyncio.wait_for(running, 60)
    assert book.told[-1][0] == "lose"


async def test_who_heeds_no_sigterm_is_killed() -> None:
    program = READS + "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    book = Book()
    sup = supervisor(book, program)
    running = asyncio.create_task(sup.run())
    await asyncio.sleep(0.5)
    await asyncio.wait_for(sup.stop(0.2), 60)
    await asyncio.wait_for(running, 60)
    assert book.told[-1] == ("lose", 0, "the server is stopping")
    assert sup.life(0).crashes == ()  # it was asked to end


SLEEPS = READS + "import time; time.sleep(60)"


def names(book: Book) -> list[str]:
    return [entry[0] for entry in book.told]


async def test_a_restart_that_was_asked_for_is_no_crash() -> None:
    book = Book()
    sup = supervisor(book, SLEEPS)
    running = asyncio.create_task(sup.run())
    await until(lambda: names(book) == ["start"])
    pid = sup.life(0).pid
    sup.restart(0)
    await until(lambda: names(book) == ["start", "lose", "start"])
    life = sup.life(0)
    assert (life.restarts, life.crashes_in_a_row, life.crashes) == (1, 0, ())
    assert life.pid not in (pid, None)
    assert book.told[2] == ("start", 0, 2, b"engine-0-2")
    await sup.stop(5.0)
    await asyncio.wait_for(running, 5)


async def test_parked_until_a_restart() -> None:
    book = Book()
    sup = supervisor(book, SLEEPS)
    running = asyncio.create_task(sup.run())
    await until(lambda: names(book) == ["start"])
    sup.park(0, "drained by hand")
    await until(lambda: names(book) == ["start", "lose", "park"])
    assert book.told[2] == ("park", 0, "drained by hand")
    assert sup.life(0).pid is None
    assert not sup.failure.done()  # all are parked, but on purpose
    sup.restart(0)
    await until(lambda: names(book)[3:] == ["rouse", "start"])
    await sup.stop(5.0)
    await asyncio.wait_for(running, 5)


async def test_a_crash_loop_is_left_by_a_restart() -> None:
    book = Book()
    sup = supervisor(book, READS + "sys.exit(9)", on_fatal="wait")
    sup._keepers[0].streak = CRASH_LOOP - 1
    running = asyncio.create_task(sup.run())
    await until(lambda: names(book) == ["start", "lose", "park"])
    (told,) = sup.life(0).crashes
    assert (told.cause, told.exit_code, told.next, told.steps) == ("exit", 9, "park", 7)
    assert told.suspects == told.in_flight == ("r1",)
    assert told.memory.free_bytes > 0
    sup.restart(0)
    await until(lambda: len(sup.life(0).crashes) == 2)
    assert sup.life(0).crashes[1].next == "restart"  # forgiven
    await sup.stop(5.0)
    await asyncio.wait_for(running, 5)


async def test_add_and_retire() -> None:
    book = Book()
    sup = supervisor(book, SLEEPS)
    running = asyncio.create_task(sup.run())
    await until(lambda: names(book) == ["start"])
    sup.add(5, spec(READS + "sys.exit(1)"))
    await until(lambda: ("start", 5, 1, b"engine-0-1") in book.told and bool(sup.life(5).crashes))
    assert not sup.failure.done()  # what came later does not end the router
    await asyncio.wait_for(sup.retire(5, 1.0), 10)
    await asyncio.wait_for(sup.retire(0, 5.0), 10)
    assert sup.life(0).pid is sup.life(5).pid is None
    with pytest.raises(KeyError):
        sup.restart(5)
    await sup.stop(5.0)
    await asyncio.wait_for(running, 5)


async def test_a_program_that_is_not_there() -> None:
    book = Book()
    missing = EngineSpec("m", ("/no/such/program",), {}, CONFIG)
    sup = Supervisor([missing], book, Metrics(), on_fatal="exit", clock=time.monotonic)
    running = asyncio.create_task(sup.run())
    await asyncio.wait_for(sup.failure, 20)
    await sup.stop(0.0)
    await running
    assert sup.failure.result().code == 78
    assert "/no/such/program" in sup.failure.result().message
