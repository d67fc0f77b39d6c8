"""Real engine processes over real ZeroMQ: what is promised of both, the true one and the fake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.protocol import (
    Abort,
    Busy,
    Drain,
    Fatal,
    Ping,
    Pong,
    Pooling,
    Ready,
    Sampling,
    StepOutput,
    Submit,
    encode,
    pack_tokens,
    unpack_floats,
    unpack_tokens,
)
from tests.engine_process import EPOCH, FAKE, REAL, engine_process, start
from tools.tiny_model import VOCAB_SIZE, encode_text, write_tiny_model

START_S = 30.0  # an interpreter and the imports, on a slow machine
GONE_S = 30.0  # promised is 1 s: the rest is for slow machines
ENDLESS = 1500  # tokens: more than a test waits for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def slow_script(tmp_path: Path) -> Sequence[str]:
    """The fake needs to be told to take its time; the true one does so by itself."""
    path = tmp_path / "slow.json"
    path.write_text('{"tokens_per_s": 200, "rules": [{"repeat": true}]}')
    return ("--script", str(path))


@pytest.fixture(params=[FAKE, REAL], ids=["fake", "real"])
def command(request: pytest.FixtureRequest, slow_script: Sequence[str]) -> Sequence[str]:
    return [*request.param, *slow_script] if request.param is FAKE else request.param


def test_hello(command: Sequence[str], model: str) -> None:
    with engine_process(command, model=model, max_batch=5, epoch=EPOCH) as engine:
        ready = engine.ready()
        assert [type(message) for message in engine.messages] == [Busy, Ready]
        assert ready.epoch == EPOCH
        assert (ready.limits.vocab_size, ready.limits.max_batch) == (VOCAB_SIZE, 5)


def test_answers_abort_and_ping(command: Sequence[str], model: str) -> None:
    with engine_process(command, model=model) as engine:
        engine.ready()
        engine.submit(1, "first", 6)
        engine.submit(2, "second", ENDLESS)
        engine.submit(3, "", 6)
        answers = engine.finish([1, 3])
        assert (answers[1].reason, len(answers[1].tokens)) == ("length", 6)
        assert answers[3].reason == "error"
        engine.send(Abort(EPOCH, (2, 99)), Ping(EPOCH, 7))
        engine.expect(Pong)
        answer = engine.finish([2])[2]
        assert answer.reason == "abort"
        assert 0 < len(answer.tokens) < ENDLESS
        engine.send(Ping(EPOCH, 8))
        pong = engine.expect(Pong)
        assert pong.n == 8
        assert (pong.stats.waiting, pong.stats.running, pong.stats.blocks_held) == (0, 0, 0)


def test_garbage_and_other_epochs_are_skipped(command: Sequence[str], model: str) -> None:
    with engine_process(command, model=model) as engine:
        engine.ready()
        engine.send_frame(os.urandom(300))
        engine.send_frame(b"")
        engine.send_frame(encode(Drain(EPOCH)), b"a second part")
        engine.send_frame(encode(Drain(EPOCH - 1)))
        engine.submit(1, "still here", 4)
        assert engine.finish([1])[1].reason == "length"
        engine.send(Ping(EPOCH, 1))
        assert engine.expect(Pong).stats.bad_frames == 3
        engine.send(Drain(EPOCH))
        assert engine.wait() == 0
        assert engine.stderr().count("frame skipped") == 1


@pytest.mark.parametrize("by", ["drain", "sigterm", "sigint"])
def test_drain(command: Sequence[str], model: str, by: str) -> None:
    """Running and waiting sequences finish, later ones end with an abort, then exit 0."""
    with engine_process(command, model=model, max_batch=2) as engine:
        engine.ready()
        for id_ in (1, 2, 3):
            engine.submit(id_, f"request {id_}", 40)
        engine.expect(StepOutput)
        if by == "drain":
            engine.send(Drain(EPOCH))
        else:
            engine.process.send_signal(signal.SIGTERM if by == "sigterm" else signal.SIGINT)
            # A signal may arrive between the engine's poll and its first answer, not its second.
            for number in (1, 2):
                engine.send(Ping(EPOCH, number))
                engine.expect(Pong)
        engine.submit(4, "too late", 40)
        assert engine.wait() == 0
        for id_ in (1, 2, 3):
            answer = engine.answers[id_]
            assert (answer.reason, len(answer.tokens)) == ("length", 40)
        assert engine.answers[4].reason == "abort"


def test_an_idle_engine_drains_at_once(command: Sequence[str], model: str) -> None:
    with engine_process(command, model=model) as engine:
        engine.ready()
        engine.process.terminate()
        assert engine.wait() == 0
        assert engine.stderr() == ""


def test_second_signal_leaves_now(command: Sequence[str], model: str) -> None:
    with engine_process(command, model=model) as engine:
        engine.ready()
        engine.submit(1, "long", ENDLESS)
        engine.expect(StepOutput)
        engine.process.terminate()
        engine.send(Ping(EPOCH, 1))
        engine.expect(Pong)
        engine.process.terminate()
        assert engine.wait() == 128 + signal.SIGTERM
        assert not engine.answers[1].finishes


@pytest.mark.parametrize("busy", [False, True])
def test_a1_gone_with_the_router(command: Sequence[str], model: str, busy: bool) -> None:
    with engine_process(command, model=model) as engine:
        engine.ready()
        if busy:
            engine.submit(1, "long", ENDLESS)
            engine.expect(StepOutput)
        engine.close_pipe()
        engine.process.wait(GONE_S)


@pytest.mark.parametrize("kind", ["slow_step", "hang", "frozen", "stop"])
def test_gone_with_the_router_within_a_long_step(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    fault = {"kind": kind, "seconds": 60, "at_token": 1}
    path.write_text(json.dumps({"rules": [{"faults": [fault]}]}))
    with engine_process([*FAKE, "--script", str(path)]) as engine:
        engine.ready()
        engine.submit(1, "xyz")
        engine.expect(StepOutput)  # and the second token never comes
        engine.close_pipe()
        engine.process.wait(GONE_S)


def test_gone_with_the_router_while_loading(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text('{"load_s": 60}')
    with engine_process([*FAKE, "--script", str(path)]) as engine:
        engine.expect(Busy)
        engine.close_pipe()
        engine.process.wait(GONE_S)


def test_a1_an_engine_outlives_the_thread_that_started_it(model: str) -> None:
    """What ends engines is the router's end, not that of a thread (as PR_SET_PDEATHSIG would)."""
    with ThreadPoolExecutor(1) as pool:
        context = engine_process(FAKE, model=model)
        engine = pool.submit(context.__enter__).result()
    try:  # the thread is gone
        engine.ready()
        engine.submit(1, "still here", 4)
        assert engine.finish([1])[1].reason == "length"
        assert engine.process.poll() is None
    finally:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.3])  # before its first line, in its load
def test_a1_gone_with_a_killed_router(model: str, tmp_path: Path, delay_s: float) -> None:
    """No test's trick: the parent is a process of its own and gets SIGKILL."""
    code = (
        "import subprocess, sys, time\n"
        "from engine.config import EngineConfig, encode_config\n"
        f"config = EngineConfig(endpoint='ipc://{tmp_path}/none', replica=0, epoch=1,"
        f" model={model!r})\n"
        "child = subprocess.Popen([sys.executable, '-m', 'engine.main'],"
        " stdin=subprocess.PIPE, bufsize=0, start_new_session=True)\n"
        "child.stdin.write(encode_config(config))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = start([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        time.sleep(delay_s)
        parent.kill()
        deadline_s = time.monotonic() + START_S  # its interpreter may not be up yet
        while _lives(pid):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def _lives(pid: int) -> bool:
    """A zombie that nobody reaps has gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("command", [FAKE, REAL], ids=["fake", "real"])
@pytest.mark.parametrize("line", [b"", b"\n", b"{not json}\n", b'{"endpoint": "ipc:///x"}\n'])
def test_bad_orders(command: Sequence[str], line: bytes) -> None:
    with start(command) as process:
        _out, error = process.communicate(line)
        assert process.returncode == 64
        assert len(error.splitlines()) == 1
        assert b"no engine configuration" in error


def test_an_unusable_endpoint_is_a_bad_order() -> None:
    line = b'{"endpoint":"smoke://signals","replica":0,"epoch":1,"model":"m"}\n'
    with start(REAL) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(line)
        error = process.stderr.read()  # the pipe stays open: its end would kill
        assert process.wait() == 64
        assert b"smoke://signals" in error


def test_unusable_model(tmp_path: Path) -> None:
    with engine_process(REAL, model=str(tmp_path / "nothing")) as engine:
        fatal = engine.expect(Fatal)
        assert fatal.code == 78
        assert "nothing" in fatal.reason
        assert engine.wait() == 78
        assert engine.stderr().splitlines() == [f"engine: {fatal.reason}"]


def test_not_enough_memory(model: str) -> None:
    with engine_process(REAL, model=model, kv_bytes=1000) as engine:
        assert engine.expect(Fatal).code == 75
        assert engine.wait() == 75


def test_a_continued_sequence_goes_on_where_it_stopped(command: Sequence[str], model: str) -> None:
    """What makes an engine's death survivable: the same tokens as if nothing had happened."""
    prompt = encode_text("Once upon a time")
    with engine_process(command, model=model) as engine:
        engine.ready()
        sampling = Sampling(temperature=0.8, seed=5)
        engine.submit(1, "Once upon a time", 20, sampling=sampling)
        whole = engine.finish([1])[1].tokens
        known = pack_tokens([*prompt, *whole[:7]])
        engine.send(Submit(EPOCH, 2, known, sampling, 13, num_prompt=len(prompt)))
        assert engine.finish([2])[2].tokens == whole[7:]


def test_logprobs(command: Sequence[str], model: str) -> None:
    with engine_process(command, model=model) as engine:
        engine.ready()
        sampling = Sampling(temperature=0.0, logprobs=2, prompt_logprobs=0)
        engine.submit(1, "abcdef", 5, sampling=sampling)
        answer = engine.finish([1])[1]
    assert [part.start for part in answer.logprobs] == list(range(6, 11))
    for token, part in zip(answer.tokens, answer.logprobs, strict=True):
        (chosen,) = unpack_floats(part.chosen)
        ids, values = unpack_tokens(part.top_ids), unpack_floats(part.top)
        assert ids[0] == token  # greedy
        assert chosen == values[0] > values[1]
    prompt = [value for part in answer.prompt_logprobs for value in unpack_floats(part.chosen)]
    assert len(prompt) == 5
    assert max(prompt) < 0


def test_embeddings_beside_answers(command: Sequence[str], model: str) -> None:
    with engine_process(command, model=model) as engine:
        size = engine.ready().limits.embedding_size
        assert size > 0
        engine.submit(1, "first", 6)
        engine.submit(2, "a text", 0, pooling=Pooling())
        engine.submit(3, "a text", 0, pooling=Pooling(dimensions=3))
        engine.submit(4, "", 0, pooling=Pooling())
        answers = engine.finish([1, 2, 3, 4])
    assert [answers[n].reason for n in (1, 2, 3, 4)] == ["length", "stop", "stop", "error"]
    (whole,), (cut,) = (list(map(unpack_floats, answers[n].embeddings)) for n in (2, 3))
    assert (len(whole), len(cut)) == (size, 3)
    for vector in (whole, cut):
        assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-5)
    assert answers[1].embeddings == answers[4].embeddings == []


def test_an_encoder_makes_embeddings_only(tmp_path: Path) -> None:
    config = {
        "architectures": ["BertModel"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with engine_process(REAL, model=str(tmp_path), load_format="dummy") as engine:
        limits = engine.ready().limits
        assert (limits.embedding_size, limits.generates, limits.max_len) == (32, False, 64)
        for number in range(1, 40):
            engine.submit(number, "a" * number, 0, pooling=Pooling("cls"))
        engine.submit(40, "a chat", 6)
        engine.send(Drain(EPOCH))
        answers = engine.finish(range(1, 41))
        assert engine.wait() == 0
    assert {answers[number].reason for number in range(1, 40)} == {"stop"}
    assert (answers[40].reason, answers[40].tokens) == ("error", [])
    assert "embeddings only" in answers[40].finishes[0].detail
