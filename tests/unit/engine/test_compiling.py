"""Grammars on their way to the scheduler: the thread, the loop around it, and what cannot run."""

from __future__ import annotations

import time

import pytest

from engine.compiling import Compiled, Compiling
from engine.inbox import Item
from engine.loop import EngineLoop
from engine.protocol import Abort, Drain, Finish, StepOutput, Submit, unpack_tokens
from engine.scheduler import Scheduler
from tests.fakes import FakeRunner, make_limits, make_pool, make_submit
from tests.grammars import DIGITS, byte_vocabulary
from tools.tiny_model import EOS_ID, VOCAB_SIZE, decode_tokens, encode_text

LIMITS = make_limits(vocab_size=VOCAB_SIZE, num_blocks=64)


def submit_of(number: int, grammar: str = DIGITS, max_new: int = 8) -> Submit:
    return make_submit(number, encode_text("abc"), max_new, stop_ids=(EOS_ID,), grammar=grammar)


def wait_for(compiling: Compiling, count: int) -> list[Compiled]:
    ready: list[Compiled] = []
    while len(ready) < count:
        ready += compiling.take()
        time.sleep(0.001)
    return ready


class Engine:
    """A loop with the true scheduler and a fake device."""

    def __init__(self, overlap: int = 0) -> None:
        self.compiling = Compiling(VOCAB_SIZE)
        scheduler = Scheduler(make_pool(LIMITS), LIMITS, step_tokens=16, epoch=1)
        self.loop = EngineLoop(
            scheduler, FakeRunner(LIMITS), epoch=1, overlap=overlap, compiling=self.compiling
        )
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finish] = {}

    def step(self, *inbox: Item) -> None:
        for message in self.loop.step(inbox):
            assert isinstance(message, StepOutput)
            for number, token in zip(message.ids, unpack_tokens(message.tokens), strict=True):
                self.tokens.setdefault(number, []).append(token)
            for end in message.finished:
                assert end.id not in self.ends, "a second end"
                self.ends[end.id] = end

    def finish(self) -> None:
        while self.loop.busy:
            self.step()
            time.sleep(self.loop.wait_s)


@pytest.mark.parametrize("overlap", [0, 1])
def test_streams_run_on_while_a_grammar_is_compiled(overlap: int) -> None:
    engine = Engine(overlap)
    engine.step(byte_vocabulary(), submit_of(1, "", 40), submit_of(2))
    assert engine.loop.wait_s == 0
    engine.finish()
    assert len(engine.tokens[1]) > 0
    assert decode_tokens(engine.tokens[2]).isdigit()
    assert engine.ends[2] == Finish(2, "stop")


def test_nothing_to_do_but_to_wait_is_no_busy_loop() -> None:
    engine = Engine()
    engine.step(byte_vocabulary(), submit_of(1))
    assert engine.loop.busy
    assert engine.loop.wait_s > 0
    engine.finish()
    assert engine.ends[1].reason == "stop"


def test_before_the_vocabulary() -> None:
    engine = Engine()
    engine.step(submit_of(1))
    engine.finish()
    assert engine.ends[1] == Finish(1, "error", "a grammar came before the model's vocabulary")
    engine.step(byte_vocabulary(), submit_of(2))
    engine.finish()
    assert engine.ends[2].reason == "stop"


def test_a_vocabulary_that_does_not_fit() -> None:
    compiling = Compiling(VOCAB_SIZE + 1)
    compiling.learn(byte_vocabulary())
    assert compiling.begin(submit_of(1))
    [compiled] = wait_for(compiling, 1)
    assert compiled.matcher is None
    assert "do not belong together" in compiled.problem


def test_a_grammar_that_does_not_compile_ends_only_its_own_sequence() -> None:
    engine = Engine()
    engine.step(byte_vocabulary(), submit_of(1, "nonsense {"), submit_of(2), submit_of(3, "{"))
    engine.finish()
    assert {number: end.reason for number, end in engine.ends.items()} == {
        1: "error",
        2: "stop",
        3: "error",
    }
    assert "nonsense" not in engine.ends[1].detail


def test_aborted_on_the_way() -> None:
    engine = Engine()
    engine.step(byte_vocabulary(), submit_of(1), Abort(1, (1,)), submit_of(2))
    assert engine.ends[1] == Finish(1, "abort")
    engine.step(submit_of(1))  # the id is free again
    del engine.ends[1]
    engine.finish()
    assert (engine.ends[1].reason, engine.ends[2].reason) == ("stop", "stop")


def test_an_id_twice() -> None:
    engine = Engine()
    engine.step(byte_vocabulary(), submit_of(1))
    assert not engine.compiling.begin(submit_of(1))
    engine.finish()
    assert engine.ends[1].reason == "stop"


def test_a_drain_waits_for_what_is_compiled() -> None:
    engine = Engine()
    engine.step(byte_vocabulary(), submit_of(1), Drain(1))
    engine.step(submit_of(2))
    engine.finish()
    engine.step()
    assert engine.ends[1].reason == "stop"
    assert engine.ends[2].reason == "abort"
    assert engine.loop.exit_code == 0


def test_a_bad_token_list() -> None:
    compiling = Compiling(VOCAB_SIZE)
    compiling.learn(byte_vocabulary())
    compiling.begin(Submit(1, 1, b"abc", submit_of(1).sampling, 4, grammar=DIGITS))
    [compiled] = wait_for(compiling, 1)
    assert compiled.matcher is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_costs_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling = Compiling(VOCAB_SIZE)
    compiling.learn(byte_vocabulary())

    def broken(_submit: Submit) -> Compiled:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(compiling, "_compile", broken)
        compiling.begin(submit_of(1))
        [compiled] = wait_for(compiling, 1)
    assert compiled.problem == "the grammar cannot be compiled"
    while compiling._thread is not None and compiling._thread.is_alive():
        time.sleep(0.001)
    compiling.begin(submit_of(2))
    [compiled] = wait_for(compiling, 1)
    assert compiled.matcher is not None
