"""R30: replicas and requests in any order of events; no stuck state, each request answered once.

The real fleet, the real choice of a replica and the real judgement of crashes; engines that are
honest as long as they live, a supervisor and requests that do what `supervisor` and `flow` do. A
token says its own place in its answer, so that a lost, repeated or foreign one shows. After any
history time alone ends every request: with all of its tokens, or with one refusal where the
operator or a crash loop left nobody to serve it.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine import protocol
from engine.protocol import Finish, Limits, Ready, Sampling, StepOutput, encode, pack_tokens
from router.crash import judge
from router.dispatch import choose
from router.fleet import Fleet, SendResult
from router.metrics import Metrics
from router.replica import FIRST_FRAME_LIMIT_S, GONE, Replica
from router.streams import Stream, StreamTable

MODELS = ("a", "a", "b")
PROMPT = [1, 2, 3]
HANG_S = 10.0
VOCABULARY = 1000
WHICH = st.integers(0, 7)


class Orders:
    sampling = Sampling()
    stop_ids = ()
    salt = b""
    priority = 0
    grammar = ""


def token_of(stream_id: int, position: int) -> int:
    return (stream_id * 17 + position) % VOCABULARY


class Engine:
    """One process. It knows of each sequence how far it is, and of nothing else."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.running: dict[int, tuple[int, int]] = {}  # id -> tokens made, tokens to be made
        self.frozen = False


class Kept:
    """What the supervisor knows of a replica."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.epoch = 0
        self.streak = 0
        self.wants_start = True


class Request:
    """What a client sees."""

    def __init__(self, model: str, stream: Stream) -> None:
        self.model = model
        self.stream = stream
        self.tokens: list[int] = []
        self.answers: list[str] = []


class Lives(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.full = False
        self.table = StreamTable()
        self.kept: dict[int, Kept] = {}
        self.requests: list[Request] = []
        self.dead: list[tuple[bytes, Engine]] = []
        self.fleet = Fleet([], self.table, self, Metrics(), lambda: self.now)
        self.fleet.subscribe(self.on_change)
        for model in MODELS:
            self.add(model)
        self.all_are_well()

    # -- the link and the engines

    def send(self, identity: bytes, frame: bytes) -> SendResult:
        engine = self.engine_of(identity)
        if engine is None:
            return "gone"
        if self.full:
            return "full"
        match message := protocol.decode_to_engine(frame):
            case protocol.Submit():
                assert message.id not in engine.running, "the same work twice"
                made = len(protocol.unpack_tokens(message.tokens)) - message.num_prompt
                engine.running[message.id] = (made, made + message.max_new)
            case protocol.Abort():
                for id_ in message.ids:
                    engine.running.pop(id_, None)
            case _:
                pass
        return "sent"

    def engine_of(self, identity: bytes) -> Engine | None:
        for index, kept in self.kept.items():
            if kept.engine and identity == self.name(index, kept.engine):
                return kept.engine
        return None

    def name(self, index: int, engine: Engine) -> bytes:
        return b"%d-%d" % (index, engine.epoch)

    def work(self, index: int, engine: Engine, *, ends: bool) -> None:
        """One step: a token of each sequence, and the ends that are due."""
        ids = sorted(engine.running)
        tokens = [token_of(id_, engine.running[id_][0]) for id_ in ids]
        finished: list[Finish] = []
        for id_ in ids:
            made, wanted = engine.running[id_]
            engine.running[id_] = (made + 1, wanted)
            if made + 1 == wanted:
                finished.append(Finish(id_, "length"))
            elif ends:  # an engine that gives its work back
                finished.append(Finish(id_, "abort"))
        for finish in finished:
            del engine.running[finish.id]
        message = StepOutput(engine.epoch, 1, tuple(ids), (), pack_tokens(tokens), tuple(finished))
        self.fleet.receive(self.name(index, engine), encode(message))

    def live(self, which: int) -> tuple[int, Kept, Engine] | None:
        living = [(i, kept, kept.engine) for i, kept in self.kept.items() if kept.engine]
        return living[which % len(living)] if living else None

    @rule(which=WHICH)
    def become_ready(self, which: int) -> None:
        if (found := self.live(which)) and not found[2].frozen:
            index, _, engine = found
            limits = Limits(100, VOCABULARY, 32, 10, 4)
            frame = encode(Ready(engine.epoch, protocol.PROTOCOL_VERSION, limits))
            was = self.fleet.replica(index).state
            self.fleet.receive(self.name(index, engine), frame)
            is_new = was == "starting"
            assert self.fleet.replica(index).state == ("serving" if is_new else was)
            self.look()

    @rule(which=WHICH, ends=st.sampled_from((False, False, True)))
    def step(self, which: int, ends: bool) -> None:
        if (found := self.live(which)) and not found[2].frozen:
            self.work(found[0], found[2], ends=ends)
            self.look()

    @rule()
    def all_step(self) -> None:
        for which in range(len(self.kept)):
            self.step(which, ends=False)

    @rule()
    def all_are_well(self) -> None:
        """Whoever may be started is, and becomes ready."""
        for which in range(len(self.kept)):
            self.start(which)
            self.become_ready(which)

    def speak_from_the_grave(self, which: int) -> None:
        if self.dead:
            identity, engine = self.dead[which % len(self.dead)]
            before = {s.id: list(s.tokens) for s in self.table}
            ids = tuple(before)
            frame = encode(StepOutput(engine.epoch, 1, ids, (), pack_tokens([5] * len(ids))))
            self.fleet.receive(identity, frame)
            assert {s.id: s.tokens for s in self.table} == before

    def freeze(self, which: int) -> None:
        if found := self.live(which):
            found[2].frozen = True

    # -- the supervisor

    def on_change(self, replica: Replica) -> None:
        kept = self.kept.get(replica.index)
        if kept and kept.engine and replica.state in ("hung", "dead"):
            self.bury(replica.index, kept)

    def bury(self, index: int, kept: Kept) -> None:
        assert kept.engine is not None
        self.dead.append((self.name(index, kept.engine), kept.engine))
        kept.engine = None

    def crashed(self, index: int) -> None:
        """What the supervisor does after `lose`."""
        kept = self.kept[index]
        kept.streak += 1
        verdict = judge(kept.streak, first_load=False, on_fatal="wait", jitter=0.0)
        kept.wants_start = verdict.action == "restart"
        if not kept.wants_start:
            self.fleet.park(index, "crash loop")

    def die(self, which: int) -> None:
        if found := self.live(which):
            index, kept, _ = found
            self.bury(index, kept)
            self.fleet.lose(index, "signal")
            self.crashed(index)
            self.look()

    @rule(which=WHICH)
    def start(self, which: int) -> None:
        waiting = [i for i, kept in self.kept.items() if kept.wants_start and not kept.engine]
        if waiting:
            index = waiting[which % len(waiting)]
            if self.fleet.replica(index).state == "hung":  # its process is gone only now
                self.fleet.lose(index, "killed")
                self.crashed(index)
                return
            kept = self.kept[index]
            kept.epoch += 1
            kept.engine = Engine(kept.epoch)
            self.fleet.start(index, kept.epoch, self.name(index, kept.engine))
            self.look()

    # -- the operator

    def chosen(self, which: int) -> int | None:
        indices = list(self.kept)
        return indices[which % len(indices)] if indices else None

    @rule(model=st.sampled_from(("a", "b")))
    def add(self, model: str) -> None:
        if len(self.kept) < 5:
            index = self.fleet.add(model)
            assert index not in self.kept
            self.kept[index] = Kept()

    def end(self, index: int, reason: str) -> None:
        """Hand over, then the process ends, as was asked."""
        self.fleet.hand_over(index, reason)
        assert not self.table.of_replica(index)
        kept = self.kept[index]
        if kept.engine:
            self.bury(index, kept)
        self.fleet.lose(index, reason)

    def hand_over_alone(self, which: int) -> None:
        """The process is still there, and says what it likes."""
        if (index := self.chosen(which)) is not None:
            before = self.fleet.replica(index).state
            self.fleet.hand_over(index, "an operator")
            after = self.fleet.replica(index).state
            assert after == ("draining" if before not in GONE else before)
            self.look()

    def restart(self, which: int) -> None:
        if (index := self.chosen(which)) is not None:
            parked = self.fleet.replica(index).state in ("parked", "asleep")
            self.end(index, "restarted by the operator")
            if parked:
                self.fleet.rouse(index)
            self.kept[index].wants_start, self.kept[index].streak = True, 0
            self.look()

    def park(self, which: int) -> None:
        if (index := self.chosen(which)) is not None:
            self.end(index, "drained by the operator")
            self.fleet.park(index, "drained by the operator")
            self.kept[index].wants_start = False
            self.look()

    def sleep(self, which: int) -> None:
        if (index := self.chosen(which)) is not None:
            self.end(index, "idle")
            self.fleet.rest(index, "idle")
            self.kept[index].wants_start = False
            self.look()

    def remove(self, which: int) -> None:
        if (index := self.chosen(which)) is not None:
            self.end(index, "removed")
            del self.kept[index]
            self.fleet.remove(index)
            self.look()

    @rule(
        which=WHICH,
        what=st.sampled_from(("hand_over_alone", "restart", "restart", "park", "sleep", "remove")),
    )
    def operate(self, which: int, what: str) -> None:
        getattr(self, what)(which)

    @rule(which=WHICH, what=st.sampled_from(("freeze", "die", "speak_from_the_grave")))
    def fail(self, which: int, what: str) -> None:
        getattr(self, what)(which)

    # -- requests

    @rule(model=st.sampled_from(("a", "b")), max_new=st.integers(1, 6), count=st.integers(1, 3))
    def ask(self, model: str, max_new: int, count: int) -> None:
        for _ in range(count):
            self.requests.append(Request(model, self.fleet.open(PROMPT, max_new)))
        self.look()

    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        if waiting := [r for r in self.requests if not r.answers]:
            self.answer(waiting[which % len(waiting)], "left")

    def answer(self, request: Request, text: str) -> None:
        self.fleet.close(request.stream)
        request.answers.append(text)

    def look(self) -> None:
        """Every request looks at its stream, as `flow` does after each change."""
        for request in self.requests:
            if request.answers:
                continue
            delta = request.stream.take()
            request.tokens += delta.tokens
            if delta.finish and not delta.lost:
                assert delta.finish.reason == "length", delta.finish
                self.answer(request, "whole")
            elif delta.lost or request.stream.submitted_s is None:
                self.place(request)

    def place(self, request: Request) -> None:
        views = self.fleet.views(request.model)
        index = choose(views, {}, 4)
        if index is None:
            if all(view.state in ("parked", "asleep") for view in views):
                self.answer(request, "refused")
        elif self.fleet.submit(request.stream, index, Orders()) and request.stream.lost:
            request.stream.reopen()

    # -- time and sockets

    @rule(seconds=st.sampled_from((0.1, 3.0, HANG_S + 1, 1000.0)))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.fleet.tick(HANG_S)
        self.look()

    @rule(full=st.booleans())
    def back_pressure(self, full: bool) -> None:
        self.full = full

    @invariant()
    def books_agree(self) -> None:
        for replica in self.fleet.replicas:
            held = self.table.of_replica(replica.index)
            if replica.state != "serving":
                assert not held, "only what serves works"
            assert all(not stream.done for stream in held.values())
            engine = self.kept[replica.index].engine
            if engine and not replica.outbox:
                assert engine.running.keys() == held.keys(), "nobody waits for what it does"
        for request in self.requests:
            assert len(request.answers) <= 1
            wanted = [token_of(request.stream.id, at) for at in range(len(request.tokens))]
            assert request.tokens == wanted
            assert "whole" not in request.answers or len(wanted) == request.stream.max_new

    def teardown(self) -> None:
        """Nothing more happens to engines: time alone must answer everybody."""
        if not hasattr(self, "fleet"):
            return
        self.full = False
        self.now += FIRST_FRAME_LIMIT_S  # who never said a word while it loaded is given up
        for _ in range(60):
            self.now += 1.0
            self.fleet.tick(HANG_S)
            for index, kept in self.kept.items():
                if self.fleet.replica(index).state == "draining":  # as `end` would have
                    self.end(index, "its process ended")
                kept.wants_start = kept.wants_start or self.fleet.replica(index).state == "hung"
            for which in range(len(self.kept)):
                self.start(which)
                self.become_ready(which)
                if (found := self.live(which)) and not found[2].frozen:
                    self.work(found[0], found[2], ends=False)
            self.look()
        assert [len(request.answers) for request in self.requests] == [1] * len(self.requests)
        assert len(self.table) == 0
        for replica in self.fleet.replicas:
            assert replica.state in ("serving", "parked", "asleep"), replica.state


TestLives = Lives.TestCase
RUNS = max(100, settings.default.max_examples if settings.default else 0)
TestLives.settings = settings(max_examples=RUNS, stateful_step_count=60)
