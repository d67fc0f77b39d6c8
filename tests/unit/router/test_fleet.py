"""The fleet over a scripted link: who may be given work, what an engine's silence and noise do."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Literal, NamedTuple

import pytest

from engine import protocol
from engine.protocol import (
    Abort,
    Busy,
    Drain,
    Fatal,
    Finish,
    Limits,
    Ping,
    Pong,
    Ready,
    Sampling,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
    ToRouter,
    Vocabulary,
    decode_to_engine,
    encode,
    pack_tokens,
    unpack_tokens,
)
from router.fleet import Fleet
from router.metrics import Metrics
from router.streams import Stream, StreamTable

LIMITS = Limits(max_len=100, vocab_size=50, block_size=32, num_blocks=10, max_batch=4)
HANG_S = 10.0


class Placement(NamedTuple):
    sampling: Sampling = Sampling(seed=1)
    stop_ids: tuple[int, ...] = (2,)
    salt: bytes = b"s"
    priority: int = 0
    grammar: str = ""


class ScriptedLink:
    """Remembers what was sent; answers as told."""

    def __init__(self) -> None:
        self.answer: Literal["sent", "full", "gone"] = "sent"
        self.sent: deque[tuple[bytes, ToEngine]] = deque()

    def send(self, identity: bytes, frame: bytes) -> Literal["sent", "full", "gone"]:
        if self.answer == "sent":
            self.sent.append((identity, decode_to_engine(frame)))
        return self.answer

    def last(self) -> ToEngine:
        return self.sent[-1][1]


def vocabulary(model: str, vocab_size: int, epoch: int) -> Vocabulary:
    return Vocabulary(epoch, pack_tokens([1] * vocab_size), model.encode() * vocab_size, (), (0,))


class World:
    """Two replicas of one model, and a clock that stands still."""

    def __init__(self) -> None:
        self.now = 100.0
        self.table = StreamTable()
        self.link = ScriptedLink()
        self.metrics = Metrics()
        self.fleet = Fleet(
            ["m", "m"], self.table, self.link, self.metrics, lambda: self.now, vocabulary
        )
        self.changes: list[tuple[int, str]] = []
        self.fleet.subscribe(lambda r: self.changes.append((r.index, r.state)))

    def start(self, index: int = 0, epoch: int = 1) -> None:
        self.fleet.start(index, epoch, b"e%d-%d" % (index, epoch))

    def ready(self, index: int = 0, epoch: int = 1) -> None:
        self.start(index, epoch)
        self.say(Ready(epoch, protocol.PROTOCOL_VERSION, LIMITS), index)

    def say(self, message: ToRouter, index: int = 0) -> None:
        self.fleet.receive(b"e%d-%d" % (index, message.epoch), encode(message))

    def submit(self, index: int = 0, prompt: tuple[int, ...] = (1, 2), max_new: int = 5) -> Stream:
        stream = self.fleet.open(list(prompt), max_new)
        assert self.fleet.submit(stream, index, Placement())
        return stream

    def state(self, index: int = 0) -> str:
        return self.fleet.replicas[index].state


def tokens(epoch: int, stream: Stream, *ids: int, end: Finish | None = None) -> StepOutput:
    finished = (end,) if end else ()
    return StepOutput(epoch, 1, (stream.id,), (len(ids),), pack_tokens(ids), finished)


async def test_start_ready_work_end() -> None:
    w = World()
    w.ready()
    assert w.changes == [(0, "starting"), (0, "serving")]
    assert (w.fleet.serving_count("m"), w.fleet.views("m")[0].limits) == (1, LIMITS)
    stream = w.submit()
    message = w.link.last()
    assert isinstance(message, Submit)
    assert (message.epoch, message.id, message.max_new, message.num_prompt) == (1, stream.id, 5, 2)
    assert (unpack_tokens(message.tokens), message.stop_ids, message.salt) == ([1, 2], (2,), b"s")
    w.say(tokens(1, stream, 7, 8))
    w.say(tokens(1, stream, 9, end=Finish(stream.id, "stop")))
    delta = stream.take()
    assert (delta.tokens, delta.finish) == ([7, 8, 9], Finish(stream.id, "stop"))
    assert w.fleet.views("m")[0].inflight_requests == 0
    w.fleet.close(stream)
    assert not isinstance(w.link.last(), Abort)  # it had ended: nothing to abort


async def test_work_only_for_ready_replicas() -> None:
    w = World()
    stream = w.fleet.open([1], 5)
    assert not w.fleet.submit(stream, 0, Placement())
    w.start()
    assert not w.fleet.submit(stream, 0, Placement())
    assert not w.link.sent
    assert not stream.done


async def test_a_closed_stream_is_aborted_and_later_output_ignored() -> None:
    w = World()
    w.ready()
    stream = w.submit()
    w.fleet.close(stream)
    w.fleet.close(stream)
    aborts = [m for _, m in w.link.sent if isinstance(m, Abort)]
    assert aborts == [Abort(1, (stream.id,))]
    w.say(tokens(1, stream, 7, end=Finish(stream.id, "abort")))
    assert (stream.tokens, len(w.table)) == ([], 0)


async def test_loss_and_continuation_on_the_other_replica() -> None:
    w = World()
    w.ready(0)
    w.ready(1)
    stream = w.submit(0)
    w.say(tokens(1, stream, 7, 8))
    assert w.fleet.lose(0, "signal") == [stream]
    delta = stream.take()
    assert (delta.lost, delta.tokens, stream.is_suspect, w.state()) == (True, [7, 8], True, "dead")
    assert w.fleet.submit(stream, 1, Placement())
    stream.reopen()
    message = w.link.last()
    assert isinstance(message, Submit)
    assert unpack_tokens(message.tokens) == [1, 2, 7, 8]
    assert (message.num_prompt, message.max_new) == (2, 3)
    w.say(tokens(1, stream, 6), index=0)  # the dead one: late
    w.say(tokens(1, stream, 9, end=Finish(stream.id, "length")), index=1)
    assert stream.tokens == [7, 8, 9]


async def test_a_stale_epoch_changes_nothing() -> None:
    w = World()
    w.ready(0, epoch=1)
    w.fleet.lose(0, "crash")
    w.ready(0, epoch=2)
    stream = w.submit()
    w.say(tokens(1, stream, 9))
    w.fleet.receive(b"e0-2", encode(tokens(1, stream, 9)))  # right name, old epoch
    assert stream.tokens == []
    assert b"router_ipc_stale_frames_total 2.0" in w.metrics.render()


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xff\xfe", b"x" * 1000, encode(Drain(1)), encode(StepOutput(1, 1, (1,), (), b"123"))],
)
async def test_garbage_is_counted_and_skipped(frame: bytes) -> None:
    w = World()
    w.ready()
    stream = w.submit()
    w.fleet.receive(b"e0-1", frame)
    w.fleet.receive(b"nobody", frame)
    assert w.state() == "serving"
    assert b"router_ipc_bad_frames_total 1.0" in w.metrics.render()
    w.say(tokens(1, stream, 3))
    assert stream.tokens == [3]


async def test_a_bad_id_costs_its_stream_only() -> None:
    w = World()
    w.ready()
    bad, good = w.submit(), w.submit()
    w.say(StepOutput(1, 1, (bad.id, good.id), (), pack_tokens([LIMITS.vocab_size, 3])))
    assert bad.finish is not None
    assert (bad.finish.reason, bad.lost) == ("error", False)
    assert w.link.last() == Abort(1, (bad.id,))
    assert (good.tokens, good.done, w.state()) == ([3], False, "serving")


async def test_an_abort_not_asked_for_gives_the_stream_back() -> None:
    w = World()
    w.ready()
    stream = w.submit()
    w.say(tokens(1, stream, end=Finish(stream.id, "abort")))
    assert (stream.lost, stream.is_suspect) == (True, False)


async def test_a_second_end_is_ignored() -> None:
    w = World()
    w.ready()
    stream = w.submit()
    w.say(tokens(1, stream, 1, end=Finish(stream.id, "stop")))
    w.say(tokens(1, stream, 2, end=Finish(stream.id, "length")))
    assert (stream.tokens, stream.finish) == ([1], Finish(stream.id, "stop"))


async def test_no_progress_with_work_is_a_hang() -> None:
    w = World()
    w.ready()
    w.now += 1000  # idle silence is no debt
    stream = w.submit()
    w.now += HANG_S
    w.fleet.tick(HANG_S)
    assert w.state() == "serving"
    w.now += 0.1
    w.fleet.tick(HANG_S)
    assert (w.state(), stream.lost, stream.is_suspect) == ("hung", True, True)
    assert "no progress" in w.fleet.replicas[0].reason


async def test_steps_are_progress_and_busy_buys_time() -> None:
    w = World()
    w.ready()
    stream = w.submit()
    for _ in range(3):
        w.now += HANG_S * 0.9
        w.say(StepOutput(1, 1, (), (), b""))
        w.fleet.tick(HANG_S)
    w.say(Busy(1, "step", 30.0))
    w.now += HANG_S + 29
    w.fleet.tick(HANG_S)
    assert w.state() == "serving"
    w.say(tokens(1, stream, 1))
    w.now += HANG_S + 0.1
    w.fleet.tick(HANG_S)
    assert w.state() == "hung"  # what was announced is over


async def test_idle_engines_are_pinged_and_must_answer() -> None:
    w = World()
    w.ready()
    w.now += 5
    w.fleet.tick(HANG_S)
    ping = w.link.last()
    assert ping == Ping(1, 1)
    w.fleet.tick(HANG_S)
    assert len(w.link.sent) == 1  # one at a time
    w.say(Pong(1, 1, Stats(blocks_total=5)))
    w.now += HANG_S
    w.fleet.tick(HANG_S)
    assert w.state() == "serving"
    assert w.link.last() == Ping(1, 2)
    w.now += HANG_S + 0.1
    w.fleet.tick(HANG_S)
    assert w.state() == "hung"


async def test_a_long_load_is_no_hang() -> None:
    w = World()
    w.start()
    w.now += 300  # not a word: importing
    w.fleet.tick(HANG_S)
    w.say(Busy(1, "load", 200.0))
    w.now += 1500
    w.fleet.tick(HANG_S)
    assert w.state() == "starting"
    w.now += 1000
    w.fleet.tick(HANG_S)
    assert w.state() == "hung"


async def test_another_wire_version_is_refused() -> None:
    w = World()
    w.start()
    w.say(Ready(1, protocol.PROTOCOL_VERSION + 1, LIMITS))
    assert w.state() == "dead"
    words = w.fleet.remains(0).words
    assert words is not None
    assert words[1] == 78


async def test_last_words() -> None:
    w = World()
    w.start()
    w.say(Fatal(1, "not enough memory", 75))
    assert w.fleet.remains(0).words == ("not enough memory", 75)
    w.fleet.lose(0, "exit code 75")
    w.start(epoch=2)
    assert w.fleet.remains(0).words is None


async def test_back_pressure_keeps_order_and_loses_nothing() -> None:
    w = World()
    w.ready()
    first = w.submit()
    w.link.answer = "full"
    second = w.submit()
    w.fleet.close(first)
    assert [type(m).__name__ for _, m in w.link.sent] == ["Submit"]
    w.link.answer = "sent"
    w.fleet.tick(HANG_S)
    assert [type(m).__name__ for _, m in w.link.sent] == ["Submit", "Submit", "Abort"]
    assert not second.done


async def test_r21_an_engine_that_does_not_read_gets_no_more_work_until_it_does() -> None:
    """What waits for its socket stays as it is, whatever clients come and go meanwhile."""
    w = World()
    w.ready(0)
    w.ready(1)
    w.link.answer = "full"
    w.submit(0)
    assert [view.ready for view in w.fleet.views("m")] == [False, True]
    waiting = w.fleet.open([1], 5)
    assert not w.fleet.submit(waiting, 0, Placement())
    woken = asyncio.ensure_future(waiting.wait())
    w.fleet.tick(HANG_S)
    await asyncio.sleep(0)
    assert not woken.done()
    w.link.answer = "sent"
    w.fleet.tick(HANG_S)
    await asyncio.wait_for(woken, 10)
    assert w.fleet.submit(waiting, 0, Placement())
    assert len(w.link.sent) == 2


async def test_lost_frames_are_counted() -> None:
    w = World()
    w.ready()
    stream = w.submit()
    w.say(StepOutput(1, 1, (stream.id,), (), pack_tokens([1]), stats=Stats(frames_sent=0)))
    w.say(StepOutput(1, 3, (stream.id,), (), pack_tokens([1]), stats=Stats(frames_sent=1)))
    assert dropped(w) == 0
    w.say(StepOutput(1, 3, (stream.id,), (), pack_tokens([1]), stats=Stats(frames_sent=4)))
    assert dropped(w) == 2
    w.say(StepOutput(1, 4, (), (), b"", (Finish(stream.id, "stop"),), stats=Stats(frames_sent=5)))
    w.now += 5
    w.fleet.tick(HANG_S)
    ping = w.link.last()
    assert isinstance(ping, Ping)
    w.say(Pong(1, ping.n, Stats(frames_sent=6, frames_received=1)))  # of a submit and the ping
    assert dropped(w) == 3
    w.ready(epoch=2)
    w.say(Pong(2, 0, Stats(frames_sent=0)))
    assert dropped(w) == 3


def dropped(w: World) -> float:
    text = w.metrics.render().decode()
    (line,) = [x for x in text.splitlines() if x.startswith("router_ipc_messages_dropped_total ")]
    return float(line.rpartition(" ")[2])


async def test_a_vanished_peer_is_lost() -> None:
    w = World()
    w.ready()
    running = w.submit()
    w.link.answer = "gone"
    stream = w.fleet.open([1], 5)
    assert not w.fleet.submit(stream, 0, Placement())
    assert (w.state(), running.lost, stream.done) == ("dead", True, False)


async def test_drain() -> None:
    w = World()
    w.ready(0)
    stream = w.submit()
    w.fleet.drain()
    assert (w.state(0), w.state(1), w.link.last()) == ("draining", "dead", Drain(1))
    w.say(tokens(1, stream, 3, end=Finish(stream.id, "length")))
    assert stream.done


async def test_cut_ends_with_an_error() -> None:
    w = World()
    w.ready()
    stream = w.submit()
    w.fleet.cut(stream, "stopping")
    assert stream.finish == Finish(stream.id, "error", "stopping")
    assert w.link.last() == Abort(1, (stream.id,))
    other = w.submit()
    w.fleet.cut(other, "The server is stopping.", "abort")
    assert other.finish == Finish(other.id, "abort", "The server is stopping.")


async def test_unavailable_says_why() -> None:
    w = World()
    w.start()
    w.now += 7
    assert "'m' is starting since 7 s" in w.fleet.unavailable("m").message or w.state(1)
    w.fleet.park(0, "x")
    w.fleet.park(1, "x")
    error = w.fleet.unavailable("m")
    assert "parked" in error.message
    assert error.retry_after_s == 30


async def test_samples() -> None:
    w = World()
    w.ready()
    w.submit()
    w.now += 2
    sample = w.fleet.samples()[0]
    assert (sample.running, sample.progress_age_s, sample.block_size) == (1, 2.0, 32)


async def test_the_vocabulary_goes_before_the_first_grammar_of_an_epoch() -> None:
    w = World()
    w.ready(0)
    w.ready(1)
    bound = Placement(grammar="start: /a/")
    first, second, third = (w.fleet.open([1], 5) for _ in range(3))
    plain = w.submit(0)
    w.link.sent.clear()
    assert w.fleet.submit(first, 0, bound)
    assert w.fleet.submit(second, 0, bound)
    assert w.fleet.submit(third, 1, bound)
    kinds = [(identity, type(message)) for identity, message in w.link.sent]
    assert kinds == [
        (b"e0-1", Vocabulary),
        (b"e0-1", Submit),
        (b"e0-1", Submit),
        (b"e1-1", Vocabulary),
        (b"e1-1", Submit),
    ]
    told, order = w.link.sent[0][1], w.link.sent[1][1]
    assert told == vocabulary("m", 50, 1)
    assert isinstance(order, Submit)
    assert order.grammar == "start: /a/"
    # The next epoch of the replica is told anew, and the stream goes on under its grammar.
    w.say(tokens(1, first, 7))
    w.fleet.lose(0, "test")
    w.ready(0, epoch=2)
    w.link.sent.clear()
    first.reopen()
    assert w.fleet.submit(first, 0, bound)
    told, order = (message for _, message in w.link.sent)
    assert told == vocabulary("m", 50, 2)
    assert isinstance(order, Submit)
    assert (order.epoch, order.grammar, unpack_tokens(order.tokens)) == (2, "start: /a/", [1, 7])
    assert plain.lost


async def test_an_engine_that_goes_while_it_is_told_the_vocabulary() -> None:
    w = World()
    w.ready()
    stream = w.fleet.open([1], 5)
    w.link.answer = "gone"
    assert not w.fleet.submit(stream, 0, Placement(grammar="start: /a/"))
    assert w.state() == "dead"
    assert stream.submitted_s is None


async def test_a_hand_over_takes_the_streams_away_without_a_death() -> None:
    w = World()
    w.ready(0)
    w.ready(1)
    first, second = w.submit(0), w.submit(0)
    w.say(tokens(1, first, 7))
    w.fleet.hand_over(0, "a restart was asked for")
    message = w.link.last()
    assert isinstance(message, Abort)
    assert message.ids == (first.id, second.id)
    assert (w.state(0), w.fleet.serving_count("m")) == ("draining", 1)
    for stream in (first, second):
        assert (stream.loss, stream.suspicion.weight, stream.replica) == ("handed_over", 0, None)
    w.say(tokens(1, first, 8))  # on its way when the abort was sent
    w.say(Ready(1, protocol.PROTOCOL_VERSION, LIMITS))
    assert (first.tokens, w.state(0)) == ([7], "draining")
    assert not w.fleet.submit(first, 0, Placement())  # never again to this epoch
    assert w.fleet.submit(first, 1, Placement())
    first.reopen()
    w.say(tokens(1, first, 9))  # still the old engine
    w.say(tokens(1, first, 8, end=Finish(first.id, "length")), 1)
    assert (first.tokens, first.finish) == ([7, 8], Finish(first.id, "length"))


async def test_what_an_engine_left_is_known_until_the_next_one_starts() -> None:
    w = World()
    w.ready()
    old, new = w.submit(), w.submit()
    old.request_id, new.request_id = "old", "new"
    w.say(tokens(1, old, 7))
    w.now += HANG_S + 1
    w.fleet.tick(HANG_S)
    w.fleet.lose(0, "killed")  # the process is gone only now
    assert w.fleet.remains(0).casualties == (("old", False), ("new", True))
    w.start(0, 2)
    assert w.fleet.remains(0).casualties == ()


async def test_replicas_come_and_go() -> None:
    w = World()
    assert w.fleet.add("other") == 2
    w.fleet.remove(1)
    assert [(r.index, r.model) for r in w.fleet.replicas] == [(0, "m"), (2, "other")]
    assert w.fleet.add("m") == 3  # an index is never used again
    with pytest.raises(KeyError):
        w.fleet.replica(1)
