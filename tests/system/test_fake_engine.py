"""tools/fake_engine.py plays its script: what its --help promises, one by one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.protocol import (
    BadFrame,
    Busy,
    Drain,
    Fatal,
    Finish,
    Ping,
    Pong,
    Pooling,
    Ready,
    Sampling,
    StepOutput,
    Submit,
    pack_tokens,
    unpack_floats,
)
from tests.engine_process import EPOCH, FAKE, ROOT, EngineProcess, engine_process, start
from tests.grammars import byte_vocabulary
from tools.fake_batch import fake_embedding
from tools.fake_script import load_script
from tools.tiny_model import EOS_ID, VOCAB_SIZE, encode_text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "script.json"


@contextmanager
def play(path: Path, script: dict[str, Any], **fields: Any) -> Iterator[EngineProcess]:
    path.write_text(json.dumps(script))
    with engine_process([*FAKE, "--script", str(path)], **fields) as engine:
        yield engine


def rules(*rules: dict[str, Any], **script: Any) -> dict[str, Any]:
    return {"rules": list(rules), **script}


def one_fault(kind: str, **fields: Any) -> dict[str, Any]:
    return rules({"match": "bad", "reply": "0123456789", "faults": [{"kind": kind, **fields}]})


def test_rules(path: Path) -> None:
    script = rules(
        {"match": "exactly this", "reply": "exact"},
        {"match": {"contains": "capital", "regex": "Fr.nce"}, "reply": "Paris"},
        {"match": {"regex": r"^count to \d+$"}, "tokens": encode_text("1 2 3")},
        {"match": {"contains": "bytes"}, "hex": "f09f9880"},
        {"match": {"contains": "only elsewhere"}, "reply": "no", "replica": 1},
        {"match": {"contains": "only later"}, "reply": "no", "epoch": 2},
    )
    expected = {
        "exactly this": "exact",
        "exactly this?": "exactly this?",  # no rule: an echo
        "the capital of France": "Paris",
        "the capital of Spain": "the capital of Spain",
        "count to 20": "1 2 3",
        "bytes": "\N{GRINNING FACE}",
        "only elsewhere": "only elsewhere",
        "only later": "only later",
    }
    with play(path, script) as engine:
        engine.ready()
        for id_, prompt in enumerate(expected):
            engine.submit(id_, prompt, 100)
        answers = engine.finish(range(len(expected)))
    assert [answer.text for answer in answers.values()] == list(expected.values())
    assert {answer.reason for answer in answers.values()} == {"stop"}


def test_a_chat_is_matched_with_its_special_tokens(path: Path) -> None:
    script = rules({"match": {"exact": "<|im_start|>user\nHi<|im_end|>\n"}, "reply": "Hello"})
    prompt = [4, *encode_text("user\nHi"), 5, *encode_text("\n")]
    with play(path, script) as engine:
        engine.ready()
        engine.send(Submit(EPOCH, 1, pack_tokens(prompt), Sampling(), 9, (EOS_ID, 5)))
        answer = engine.finish([1])[1]
    assert answer.tokens == [*encode_text("Hello"), EOS_ID]  # as a model would end
    assert answer.reason == "stop"


def test_ends(path: Path) -> None:
    script = rules(
        {"match": "error", "reply": "ab", "finish": "error", "detail": "why"},
        {"match": "empty", "reply": ""},
        {"match": "long", "reply": "abc", "repeat": True, "cached": 3},
    )
    with play(path, script) as engine:
        engine.ready()
        engine.submit(1, "error")
        engine.submit(2, "empty")
        engine.submit(3, "long", 7)
        engine.submit(4, "long", 7, stop_ids=tuple(encode_text("c")))
        minimum = Sampling(min_new=4)
        engine.submit(5, "long", 7, stop_ids=tuple(encode_text("c")), sampling=minimum)
        engine.submit(6, "long", 0)
        answers = engine.finish(range(1, 7))
    told = [(answer.text, answer.reason) for answer in answers.values()]
    assert told == [
        ("ab", "error"), ("", "stop"), ("abcabca", "length"),
        ("abc", "stop"), ("abcabc", "stop"), ("", "length"),
    ]  # fmt: skip
    assert answers[1].finishes == [Finish(1, "error", "why")]
    assert answers[3].started[0].cached == 3


def test_choices_differ_by_seed(path: Path) -> None:
    with play(path, rules({"reply": ["zero", "one", "two"]})) as engine:
        engine.ready()
        for seed in range(4):
            engine.submit(seed, "x", sampling=Sampling(seed=seed))
        texts = [answer.text for answer in engine.finish(range(4)).values()]
    assert texts == ["zero", "one", "two", "zero"]


def test_max_len(path: Path) -> None:
    with play(path, {"max_len": 8}) as engine:
        assert engine.ready().limits.max_len == 8
        engine.submit(1, "12345", 100)
        engine.submit(2, "123456789", 100)
        answers = engine.finish([1, 2])
    assert (answers[1].text, answers[1].reason) == ("123", "length")
    assert answers[2].reason == "error"


def test_pace_and_batch(path: Path) -> None:
    """One message for all that are due; those beyond the batch wait and are counted."""
    script = rules({"reply": "abcdef"}, max_batch=2, step_ms=20)
    with play(path, script) as engine:
        engine.ready()
        for id_ in range(4):
            engine.submit(id_, "x", 6)
        engine.finish(range(4))
        steps = [message for message in engine.messages if isinstance(message, StepOutput)]
        assert max(step.stats.running for step in steps) == 2
        assert max(step.stats.waiting for step in steps) == 2
        assert max(len(step.ids) for step in steps) == 2
        assert (steps[-1].stats.running, steps[-1].stats.waiting) == (0, 0)
        assert steps[-1].stats.generated_tokens == 24


def test_delays(path: Path) -> None:
    script = rules({"match": "slow", "reply": "ab", "delays_s": [0.1, 0.2]})
    with play(path, script) as engine:
        engine.ready()
        began_s = time.monotonic()
        engine.submit(1, "slow")
        engine.submit(2, "quick")
        engine.finish([2])
        assert not engine.answers[1].finishes
        engine.finish([1])
        assert time.monotonic() - began_s >= 0.3  # never earlier than told


def test_a_continuation_meets_the_fault_at_its_place(path: Path) -> None:
    """`at_token` counts what another engine generated, so the same place is not hit again."""
    prompt, known = encode_text("bad"), encode_text("01234")
    with play(path, one_fault("crash", at_token=3)) as engine:
        engine.ready()
        tokens = pack_tokens([*prompt, *known])
        engine.send(Submit(EPOCH, 1, tokens, Sampling(), 20, num_prompt=len(prompt)))
        assert engine.finish([1])[1].text == "56789"


@pytest.mark.parametrize(
    ("how", "code"),
    [("kill", -9), ("segv", -signal.SIGSEGV), ("abort", -signal.SIGABRT), ("exit", 7)],
)
def test_crash(path: Path, how: str, code: int) -> None:
    with play(path, one_fault("crash", how=how, code=7, at_token=3)) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        assert engine.wait() == code
        assert engine.answers[1].text == "012"  # everything before has left
        assert not engine.answers[1].finishes


def test_crash_once(path: Path, tmp_path: Path) -> None:
    script = one_fault("crash", once_file=str(tmp_path / "mark"))
    with play(path, script) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        assert engine.wait() == -9
    with play(path, script, epoch=EPOCH) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        assert engine.finish([1])[1].text == "0123456789"


@pytest.mark.parametrize(
    ("when", "heard"), [("start", []), ("load", [Busy]), ("ready", [Busy, Ready])]
)
def test_start_faults(path: Path, when: str, heard: list[type]) -> None:
    fault = {"kind": "crash", "how": "exit", "code": 3, "when": when}
    other = {"kind": "crash", "when": "start", "epoch": EPOCH + 1}
    with play(path, {"start_faults": [other, fault]}) as engine:
        assert engine.wait() == 3
        assert [type(message) for message in engine.messages] == heard


def test_never_ready(path: Path) -> None:
    with play(path, {"start_faults": [{"kind": "never_ready"}], "version": 9}) as engine:
        engine.expect(Busy)
        engine.send(Ping(EPOCH, 1))
        engine.expect(Pong)
        assert not any(isinstance(message, Ready) for message in engine.messages)
        engine.process.terminate()
        assert engine.wait() == 0


def test_another_version_and_a_silent_load(path: Path) -> None:
    with play(path, {"version": 9, "silent_load": True, "load_s": 0.1}) as engine:
        assert engine.ready().version == 9
        assert len(engine.messages) == 1


def test_fatal(path: Path) -> None:
    with play(path, one_fault("fatal", code=75, reason="no room")) as engine:
        engine.ready()
        engine.submit(1, "bad")
        assert engine.wait() == 75
        assert engine.messages[-1] == Fatal(EPOCH, "no room", 75)


def test_frozen_answers_pings_only(path: Path) -> None:
    with play(path, one_fault("frozen", seconds=0.3, at_token=2)) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        while len(engine.answers[1].tokens if 1 in engine.answers else ()) < 2:
            engine.expect(StepOutput)
        engine.submit(2, "other")
        engine.send(Ping(EPOCH, 1))
        assert isinstance(engine.receive(), Pong)
        assert engine.receive(0.05) is None
        assert engine.finish([1])[1].text == "0123456789"
        assert engine.finish([2])[2].text == "other"


def test_hang_heeds_nothing(path: Path) -> None:
    with play(path, one_fault("hang", at_token=1)) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        while engine.receive(0.3):
            pass  # now it hangs
        engine.send(Ping(EPOCH, 1))
        engine.process.terminate()
        engine.process.terminate()
        assert engine.receive(0.3) is None
        assert engine.process.poll() is None


def test_stop_and_continue(path: Path) -> None:
    with play(path, one_fault("stop", at_token=1)) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        engine.expect(StepOutput)
        assert engine.receive(0.3) is None
        engine.process.send_signal(signal.SIGCONT)
        assert engine.finish([1])[1].text == "0123456789"


def test_slow_step_that_announces_itself(path: Path) -> None:
    with play(path, one_fault("slow_step", seconds=0.2, announce=True)) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        assert engine.expect(Busy) == Busy(EPOCH, "step", 0.2)
        assert engine.finish([1])[1].text == "0123456789"


def test_bad_id(path: Path) -> None:
    with play(path, one_fault("bad_id", token=-5, at_token=1)) as engine:
        engine.ready()
        engine.submit(1, "bad", 3)
        zero, _one, two = encode_text("012")
        assert engine.finish([1])[1].tokens == [zero, -5, two]


@pytest.mark.parametrize("kind", ["garbage", "truncated"])
def test_unreadable_frames(path: Path, kind: str) -> None:
    with play(path, one_fault(kind)) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        with pytest.raises(BadFrame):
            engine.finish([1])
        assert engine.finish([1])[1].text == "0123456789"


def test_stale_epoch(path: Path) -> None:
    with play(path, one_fault("stale")) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        output = engine.expect(StepOutput)
        assert output.epoch == EPOCH - 1
        assert [end.id for end in output.finished] == [1]


def test_unknown_id(path: Path) -> None:
    with play(path, one_fault("unknown_id")) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        engine.finish([1])
        assert [id_ for id_ in engine.answers if id_ != 1] == [(1 << 53) - 1]


def test_repeat_step(path: Path) -> None:
    with play(path, one_fault("repeat_step", at_token=2)) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        assert engine.finish([1])[1].text == "01123456789"


@pytest.mark.parametrize(("kind", "count"), [("duplicate_finish", 2), ("no_finish", 0)])
def test_number_of_ends(path: Path, kind: str, count: int) -> None:
    with play(path, one_fault(kind)) as engine:
        engine.ready()
        engine.submit(1, "bad", 20)
        engine.submit(2, "a good one, which is longer", 40)
        engine.finish([2])
        assert engine.answers[1].text == "0123456789"
        assert engine.answers[1].finishes == [Finish(1, "stop")] * count
        engine.send(Drain(EPOCH))
        assert engine.wait() == 0


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("{", "truncated"),
        ('{"rule": []}', "rule"),
        ('{"rules": [{"match": {"regex": "("}}]}', "unterminated"),
        ('{"rules": [{"faults": [{"kind": "laziness"}]}]}', "laziness"),
        ('{"rules": [{"reply": []}]}', "empty"),
        ('{"rules": [{"hex": "0g"}]}', "hex"),
    ],
)
def test_bad_scripts(path: Path, script: str, told: str) -> None:
    path.write_text(script)
    with start([*FAKE, "--script", str(path)]) as process:
        _out, error = process.communicate()
        assert process.returncode == 64
        assert told in error.decode()


def test_help_and_its_example(tmp_path: Path) -> None:
    """The example of --help is a script that loads."""
    done = subprocess.run([*FAKE, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    example = done.stdout.partition("EXAMPLE\n")[2].partition("\noptions:")[0]
    assert len(load_script(example.encode()).rules) == 4


def test_runs_from_anywhere(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "tools" / "fake_engine.py", "--script", "missing.json"]
    done = subprocess.run(words, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 64
    assert b"missing.json" in done.stderr


def test_needs_no_torch() -> None:
    code = "import sys, tools.fake_engine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_embeddings(path: Path) -> None:
    script = rules(
        {"match": "broken", "finish": "error", "detail": "no vector"},
        {"match": "poison", "faults": [{"kind": "crash", "how": "exit", "code": 7}]},
        embedding_size=5,
        generates=False,
    )
    with play(path, script) as engine:
        limits = engine.ready().limits
        assert (limits.embedding_size, limits.generates) == (5, False)
        for id_, (text, pooling) in enumerate(
            [("ab", Pooling()), ("ab", Pooling("cls", 2, False)), ("broken", Pooling())]
        ):
            engine.submit(id_, text, 0, pooling=pooling)
        engine.submit(3, "no chat", 4)
        answers = engine.finish(range(4))
        tokens = encode_text("ab")
        assert answers[0].embeddings == [fake_embedding(tokens, Pooling(), 5)]
        first = float(tokens[0])
        assert unpack_floats(answers[1].embeddings[0]) == [1 + first % 7, 1 + first * 2 % 7]
        assert [answers[n].reason for n in range(4)] == ["stop", "stop", "error", "error"]
        assert answers[2].embeddings == answers[3].embeddings == []
        engine.submit(4, "poison", 0, pooling=Pooling())
        assert engine.wait() == 7


def test_grammars_are_noted_and_change_nothing(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "grammars"
    with play(path, rules({"match": "bound", "reply": "abc"}, grammar_log=str(log))) as engine:
        engine.ready()
        engine.send(byte_vocabulary(EPOCH))
        engine.submit(1, "bound", grammar="start: /[0-9]+/")
        engine.submit(2, "bound")
        answers = engine.finish([1, 2])
        assert answers[1].text == answers[2].text == "abc"
    where = {"replica": 0, "epoch": EPOCH}
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        where | {"ids": VOCAB_SIZE, "eos": [EOS_ID]},
        where | {"id": 1, "grammar": "start: /[0-9]+/"},
    ]
