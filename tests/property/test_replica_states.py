"""The life of replicas under any order of events: no stuck state, one end for each stream.

What the router may rely on: whatever engines say, and whenever they die, hang, fill their sockets
or drain, every submitted stream ends exactly once, dead engines hold no work, nobody who is not
ready is given any, and what one epoch says never reaches another's streams.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine import protocol
from engine.protocol import (
    Abort,
    Busy,
    Finish,
    Limits,
    Ready,
    Sampling,
    StepOutput,
    Submit,
    ToEngine,
    Vocabulary,
    decode_to_engine,
    encode,
    pack_tokens,
)
from router.fleet import Fleet
from router.metrics import Metrics
from router.replica import GONE, Replica
from router.streams import Stream, StreamTable

REPLICAS = 3
HANG_S = 10.0
ALLOWED = {
    ("dead", "starting"),
    ("parked", "starting"),
    ("starting", "serving"),
    ("serving", "draining"),
    ("starting", "dead"),
    ("serving", "dead"),
    ("draining", "dead"),
    ("starting", "hung"),
    ("serving", "hung"),
    ("draining", "hung"),
    ("hung", "dead"),
    ("dead", "parked"),
}


class Placement:
    sampling = Sampling()
    stop_ids = ()
    salt = b""
    priority = 0

    def __init__(self, grammar: str) -> None:
        self.grammar = grammar


def vocabulary(model: str, vocab_size: int, epoch: int) -> Vocabulary:
    return Vocabulary(epoch, pack_tokens([0] * vocab_size), b"", (), ())


class Engine:
    """What a well-behaved engine of one epoch knows: the sequences it must end."""

    def __init__(self, index: int, epoch: int) -> None:
        self.index, self.epoch = index, epoch
        self.running: set[int] = set()
        self.alive = True
        self.frozen = False
        self.knows_vocabulary = False

    @property
    def identity(self) -> bytes:
        return b"%d-%d" % (self.index, self.epoch)


class ReplicaLives(RuleBasedStateMachine):
    streams = Bundle("streams")

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.full = False
        self.table = StreamTable()
        self.engines: dict[int, Engine] = {}
        self.history: list[Engine] = []
        self.fleet = Fleet(
            ["m"] * REPLICAS, self.table, self, Metrics(), lambda: self.now, vocabulary
        )
        self.states = {r.index: r.state for r in self.fleet.replicas}
        self.fleet.subscribe(self.on_change)

    # -- the link

    def send(self, identity: bytes, frame: bytes) -> str:
        engine = next((e for e in self.engines.values() if e.identity == identity), None)
        if engine is None or not engine.alive:
            return "gone"
        if self.full:
            return "full"
        self.hear(engine, decode_to_engine(frame))
        return "sent"

    def hear(self, engine: Engine, message: ToEngine) -> None:
        assert message.epoch == engine.epoch
        match message:
            case Submit():
                assert message.id not in engine.running
                assert engine.knows_vocabulary or not message.grammar
                engine.running.add(message.id)
            case Vocabulary():
                assert not engine.knows_vocabulary, "told twice"
                engine.knows_vocabulary = True
            case Abort():
                engine.running.difference_update(message.ids)
            case _:
                pass

    def on_change(self, replica: Replica) -> None:
        step = (self.states[replica.index], replica.state)
        assert step in ALLOWED, step
        self.states[replica.index] = replica.state
        if replica.state in ("hung", "dead") and replica.index in self.engines:
            self.engines[replica.index].alive = False  # the supervisor kills it

    # -- the supervisor

    @rule(index=st.integers(0, REPLICAS - 1))
    def start(self, index: int) -> None:
        if self.states[index] in ("dead", "parked"):
            engine = Engine(index, self.fleet.replicas[index].epoch + 1)
            self.engines[index] = engine
            self.history.append(engine)
            self.fleet.start(index, engine.epoch, engine.identity)

    @rule(index=st.integers(0, REPLICAS - 1))
    def die(self, index: int) -> None:
        if index in self.engines:
            self.engines.pop(index).alive = False
            self.fleet.lose(index, "signal")
            assert not self.table.of_replica(index)

    @rule(index=st.integers(0, REPLICAS - 1))
    def park(self, index: int) -> None:
        if self.states[index] == "dead" and index not in self.engines:
            self.fleet.park(index, "crash loop")

    # -- engines

    @rule(index=st.integers(0, REPLICAS - 1))
    def become_ready(self, index: int) -> None:
        engine = self.engines.get(index)
        if engine and engine.alive:
            limits = Limits(100, 50, 32, 10, 4)
            frame = encode(Ready(engine.epoch, protocol.PROTOCOL_VERSION, limits))
            self.fleet.receive(engine.identity, frame)

    @rule(
        index=st.integers(0, REPLICAS - 1),
        token=st.sampled_from([1, 2, 49, 50, -1]),
        reason=st.sampled_from(["", "stop", "length", "error", "abort"]),
        stranger=st.booleans(),
    )
    def step(self, index: int, token: int, reason: str, stranger: bool) -> None:
        engine = self.engines.get(index)
        if not engine or not engine.alive or engine.frozen:
            return
        ids = sorted(engine.running)[:2] + ([10**9] if stranger else [])
        finished = tuple(Finish(i, reason) for i in ids if reason)  # type: ignore[arg-type]
        message = StepOutput(
            engine.epoch, 1, tuple(ids), (), pack_tokens([token] * len(ids)), finished
        )
        if reason:
            engine.running.difference_update(ids)
        self.fleet.receive(engine.identity, encode(message))

    @rule(which=st.integers(0, 50), token=st.integers(0, 49))
    def speak_from_the_grave(self, which: int, token: int) -> None:
        dead = [engine for engine in self.history if not engine.alive]
        if dead:
            engine = dead[which % len(dead)]
            before = {s.id: list(s.tokens) for s in self.table}
            ids = tuple(s.id for s in self.table)
            frame = encode(StepOutput(engine.epoch, 1, ids, (), pack_tokens([token] * len(ids))))
            self.fleet.receive(engine.identity, frame)
            assert {s.id: s.tokens for s in self.table} == before

    @rule(index=st.integers(0, REPLICAS - 1), frame=st.binary(max_size=40))
    def garbage(self, index: int, frame: bytes) -> None:
        engine = self.engines.get(index)
        self.fleet.receive(engine.identity if engine else b"?", frame)

    @rule(index=st.integers(0, REPLICAS - 1))
    def freeze(self, index: int) -> None:
        if index in self.engines:
            self.engines[index].frozen = True

    @rule(index=st.integers(0, REPLICAS - 1), expected_s=st.floats(0, 100))
    def busy(self, index: int, expected_s: float) -> None:
        engine = self.engines.get(index)
        if engine and engine.alive and not engine.frozen:
            self.fleet.receive(engine.identity, encode(Busy(engine.epoch, "step", expected_s)))

    # -- requests

    @rule(target=streams, max_new=st.integers(1, 5))
    def open(self, max_new: int) -> Stream:
        return self.fleet.open([1, 2, 3], max_new)

    @rule(stream=streams, index=st.integers(0, REPLICAS - 1), grammar=st.sampled_from(["", "g"]))
    def submit(self, stream: Stream, index: int, grammar: str) -> None:
        fresh = stream.submitted_s is None or stream.lost
        is_open = any(s is stream for s in self.table)
        if fresh and is_open and stream.replica is None and len(stream.tokens) < stream.max_new:
            was_ready = self.states[index] == "serving"
            given = self.fleet.submit(stream, index, Placement(grammar))
            assert not given or was_ready
            if given and stream.lost:
                stream.reopen()

    @rule(stream=streams)
    def close(self, stream: Stream) -> None:
        self.fleet.close(stream)

    # -- time and sockets

    @rule(seconds=st.floats(0, 30))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.fleet.tick(HANG_S)

    @rule(full=st.booleans())
    def back_pressure(self, full: bool) -> None:
        self.full = full

    @precondition(lambda self: hasattr(self, "fleet"))
    @rule()
    def drain(self) -> None:
        self.fleet.drain()

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "fleet"):
            return
        for replica in self.fleet.replicas:
            held = self.table.of_replica(replica.index)
            if replica.state in (*GONE, "starting"):
                assert not held
            for stream in held.values():
                assert stream.replica == replica.index
                assert not stream.done
                engine = self.engines[replica.index]
                assert stream.id in engine.running or replica.outbox
        for stream in self.table:
            assert len(stream.tokens) <= stream.max_new
            assert all(0 <= token < 50 for token in stream.tokens)
            if stream.submitted_s is not None and stream.replica is None:
                assert stream.done

    def teardown(self) -> None:
        """From anywhere, time alone or death ends every stream."""
        if not hasattr(self, "fleet"):
            return
        for index in list(self.engines):
            self.die(index)
        for stream in self.table:
            assert stream.done or stream.submitted_s is None
        for replica in self.fleet.replicas:
            assert replica.state in ("dead", "parked")


TestReplicaLives = ReplicaLives.TestCase
