"""The engines as the router sees them: one state machine per replica, and the work they hold.

Owns the replica states and epochs, and every message to and from an engine. Must not know
processes (the supervisor starts and kills them), text or HTTP. Time is a parameter, and sockets
are behind `EngineLink`, so all of it is tested without either.

     start        Ready         drain
    -----> starting --> serving --> draining
              |            |           |
              +--- lose ---+-----------+--> dead --start--> starting
              `--- no progress --> hung --'  `-> parked (until started by hand)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Final, Literal, Protocol

from engine import protocol
from engine.protocol import Finish, FinishReason, Limits, Sampling
from router import logs
from router.errors import EXIT_CONFIG, Overloaded
from router.frame_account import FrameAccount
from router.metrics import Metrics, ReplicaSample
from router.replica import GONE, Replica, sample, unavailable, view
from router.streams import (
    SLOW_CLIENT,
    Casualty,
    Remains,
    ReplicaState,
    ReplicaView,
    Stream,
    StreamTable,
    WakeUp,
    deliver,
)
from router.versions import name_of

BAD_FRAME_LOG_S: Final = 60.0

SendResult = Literal["sent", "full", "gone"]


class EngineLink(Protocol):
    """A way to reach engines. `send` never waits: "full" means try later, "gone" nobody there."""

    def send(self, identity: bytes, frame: bytes) -> SendResult: ...


class Orders(Protocol):
    """What a `Submit` says beside the tokens; it stays the same when a stream is continued."""

    @property
    def sampling(self) -> Sampling: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def salt(self) -> bytes: ...
    @property
    def priority(self) -> int: ...
    @property
    def grammar(self) -> str: ...


VocabularyOf = Callable[[str, int, int], protocol.Vocabulary]  # of model, number of ids, epoch


class Fleet:
    """All replicas. `subscribe` tells of each change of state.

    Who hears that a replica is "hung" or "dead" while its process still runs must kill it.
    """

    def __init__(
        self,
        models: Iterable[str],
        table: StreamTable,
        link: EngineLink,
        metrics: Metrics,
        clock: Callable[[], float],
        vocabulary_of: VocabularyOf | None = None,
    ) -> None:
        """Replica i serves models[i]; `clock` is monotonic; no `vocabulary_of`: no grammars."""
        self._replicas: dict[int, Replica] = {}
        self._indices = count()
        self._table = table
        self._link = link
        self._metrics = metrics
        self._clock = clock
        self._vocabulary_of = vocabulary_of
        self._of_identity: dict[bytes, Replica] = {}
        self._listeners: list[Callable[[Replica], None]] = []
        self._bad_frames = _BadFrames(metrics)
        for model in models:
            self.add(model)

    # -- what others may know

    def subscribe(self, listener: Callable[[Replica], None]) -> None:
        """`listener(replica)` is called after each change of a state."""
        self._listeners.append(listener)

    @property
    def replicas(self) -> list[Replica]:
        """All there are, in the order of their indices."""
        return list(self._replicas.values())

    def replica(self, index: int) -> Replica:
        """Raises KeyError for one that is gone."""
        return self._replicas[index]

    def of_model(self, model: str) -> list[Replica]:
        """The replicas of one model."""
        return [replica for replica in self._replicas.values() if replica.model == model]

    def views(self, model: str) -> list[ReplicaView]:
        """The model's replicas now, as values to choose from."""
        return [view(replica, self._table) for replica in self.of_model(model)]

    def serving_count(self, model: str) -> int:
        """How many replicas of it may be given work."""
        return sum(replica.state == "serving" for replica in self.of_model(model))

    def samples(self) -> list[ReplicaSample]:
        """Numbers for a scrape."""
        now = self._clock()
        return [sample(replica, self._table, now) for replica in self._replicas.values()]

    def unavailable(self, model: str) -> Overloaded:
        """The answer while no replica is ready: which model, in which state, since when."""
        return unavailable(name_of(model), self.of_model(model), self._clock())

    # -- the life of a replica

    def add(self, model: str) -> int:
        """One more replica, without a process; returns its index, which no other ever has."""
        index = next(self._indices)
        self._replicas[index] = Replica(index, model)
        return index

    def remove(self, index: int) -> None:
        """Forget a replica whose process is gone."""
        self.hand_over(index, "it was removed")
        self._of_identity.pop(self._replicas[index].identity, None)
        self._change(self._replicas.pop(index), "dead", "removed")

    def rest(self, index: int, reason: str) -> None:
        """It has no process from now on, on purpose; what it still works on goes elsewhere."""
        self.hand_over(index, reason)
        self._of_identity.pop(self._replicas[index].identity, None)
        self._change(self._replicas[index], "asleep", reason)

    def rouse(self, index: int) -> None:
        """A process for it is on its way."""
        self._replicas[index].begin(self._replicas[index].epoch, b"", self._clock())
        self._change(self._replicas[index], "starting", "")

    def hand_over(self, index: int, reason: str) -> None:
        """No new work for it; its streams are taken away and end as lost, without a death.

        This epoch takes no work any more: what it still says of the streams is ignored, and none
        of them can come back to it while it still works on them under the same id.
        """
        replica = self._replicas[index]
        if replica.state in ("starting", "serving"):
            self._change(replica, "draining", reason)
        taken = self._table.take_away(index, f"handed over: {reason}", "handed_over")
        if taken and replica.state == "draining":
            self._post(replica, protocol.Abort(replica.epoch, tuple(s.id for s in taken)))

    def start(self, index: int, epoch: int, identity: bytes) -> None:
        """A process was started for it. What an earlier epoch says is stale from now on."""
        replica = self._replicas[index]
        self._of_identity.pop(replica.identity, None)
        self._of_identity[identity] = replica
        replica.begin(epoch, identity, self._clock())
        self._change(replica, "starting", "")

    def lose(
        self, index: int, reason: str, *, hung: bool = False, outside: bool = False
    ) -> list[Stream]:
        """Its process is gone or condemned (`outside`: by no work of its): its streams are lost."""
        replica = self._replicas[index]
        self._of_identity.pop(replica.identity, None)
        replica.outbox.clear()
        if replica.state not in GONE or (replica.state == "hung" and not hung):
            self._change(replica, "hung" if hung else "dead", reason)
        lost = self._table.take_away(index, f"engine lost: {reason}", "engine_died")
        for stream in lost:
            stream.suspicion = stream.suspicion.after_death(len(stream.tokens), outside=outside)
            replica.casualties.append(Casualty(stream.request_id, stream.silent))
        return lost

    def park(self, index: int, reason: str) -> None:
        """It is not started again by itself."""
        self._change(self._replicas[index], "parked", reason)

    def remains(self, index: int) -> Remains:
        """What its engine, which is gone, has left."""
        r = self._replicas[index]
        return Remains(r.fatal, r.stats, r.heard_s, tuple(r.casualties))

    def drain(self) -> None:
        """All engines finish what they have; no replica takes new work."""
        for replica in list(self._replicas.values()):
            if replica.state == "serving":
                self._change(replica, "draining", "shutdown")
                self._post(replica, protocol.Drain(replica.epoch))

    def _change(self, replica: Replica, state: ReplicaState, reason: str) -> None:
        replica.state = state
        replica.since_s = self._clock()
        replica.reason = reason
        for listener in self._listeners:
            listener(replica)

    # -- work

    def open(self, prompt: list[int], max_new: int, event: WakeUp | None = None) -> Stream:
        """A stream that no engine works on yet; to be closed by its opener."""
        return self._table.open(prompt, max_new, event)

    def submit(self, stream: Stream, replica: int, placement: Orders) -> bool:
        """Give it, with its tokens so far, to a replica. False if that one is just gone."""
        chosen = self._replicas[replica]
        if chosen.state != "serving" or chosen.outbox:
            return False
        now = self._clock()
        if not self._table.of_replica(replica):
            chosen.heard_s = now  # an idle engine owes progress from here on
            chosen.patience_s = 0.0
        if placement.grammar and not self._tell_vocabulary(chosen):
            return False
        if not self._post(chosen, _order(chosen.epoch, stream, placement)):
            return False
        self._table.assign(stream, replica)
        chosen.submitted += 1
        if stream.submitted_s is None:
            stream.submitted_s = now
        return True

    def _tell_vocabulary(self, replica: Replica) -> bool:
        """Once in each epoch, before its first grammar. False if the replica is just gone."""
        limits, of = replica.limits, self._vocabulary_of
        if replica.knows_vocabulary or limits is None or of is None:
            return True
        replica.knows_vocabulary = True
        return self._post(replica, of(replica.model, limits.vocab_size, replica.epoch))

    def close(self, stream: Stream) -> None:
        """Forget the stream, and abort it if an engine still works on it. May be called twice."""
        self._abort(stream)
        self._table.close(stream)

    def cut(self, stream: Stream, detail: str, reason: FinishReason = "error") -> None:
        """End the stream now, wherever it is: by the engine's fault, or by our own "abort"."""
        self._abort(stream)
        stream.end(Finish(stream.id, reason, detail))

    def _abort(self, stream: Stream) -> None:
        index = stream.replica
        if index is None:
            return
        self._table.release(stream)
        replica = self._replicas[index]
        if replica.state in ("serving", "draining"):
            self._post(replica, protocol.Abort(replica.epoch, (stream.id,)))

    def _post(self, replica: Replica, message: protocol.ToEngine) -> bool:
        replica.outbox.append(protocol.encode(message))
        replica.frames.sent()
        return self._flush(replica)

    def _flush(self, replica: Replica) -> bool:
        """Send what waits, in order, as far as the socket takes it; False if nobody is there."""
        while replica.outbox:
            result = self._link.send(replica.identity, replica.outbox[0])
            if result == "full":
                break
            if result == "gone":
                self.lose(replica.index, "its socket is gone")
                return False
            replica.outbox.popleft()
        return True

    # -- progress

    def tick(self, hang_timeout_s: float) -> None:
        """To be called a few times a second: pings idle engines, loses those that hang.

        Work in flight: no frame for `hang_timeout_s` (plus what the engine announced) is a hang.
        Idle: a ping unanswered for as long is one. Starting: only the announced time counts.
        """
        now = self._clock()
        for replica in list(self._replicas.values()):
            if replica.state not in ("starting", "serving", "draining"):
                continue
            if replica.outbox and self._flush(replica) and not replica.outbox:
                self._table.wake_unplaced()  # it takes work again
            works = bool(self._table.of_replica(replica.index))
            if replica.wants_ping(works, now, hang_timeout_s):
                self._post(replica, replica.ping(now))
                replica.frames.asked()
            since_s = replica.owes_since_s(works)
            if since_s is not None and now - since_s > hang_timeout_s + replica.patience_s:
                self.lose(replica.index, f"no progress for {now - since_s:.1f} s", hung=True)

    # -- receiving

    def receive(self, identity: bytes, frame: bytes) -> None:
        """One frame from a peer. Nothing that a peer can send raises."""
        replica = self._of_identity.get(identity)
        if replica is None:
            self._metrics.stale_frames.inc()
            return
        try:
            message = _read(replica, frame, self._metrics)
            if message.epoch != replica.epoch:
                self._metrics.stale_frames.inc()
                return
            replica.heard_s = self._clock()
            replica.ping_s = None
            match message:
                case protocol.StepOutput():
                    self._on_step(replica, message)
                case protocol.Ready(version=version, limits=limits):
                    self._on_ready(replica, version, limits)
                case _:
                    replica.hear(message)
        except protocol.BadFrame as error:
            self._bad_frames.add(replica.index, str(error), self._clock())

    def _on_ready(self, replica: Replica, version: int, limits: Limits) -> None:
        if version != protocol.PROTOCOL_VERSION:
            reason = f"the engine speaks wire version {version}, not {protocol.PROTOCOL_VERSION}"
            replica.fatal = (reason, EXIT_CONFIG)
            self.lose(replica.index, reason)
        elif replica.state == "starting" and replica.fatal is None:
            replica.limits = limits
            replica.frames = FrameAccount()
            replica.patience_s = 0.0
            self._change(replica, "serving", "")

    def _on_step(self, replica: Replica, message: protocol.StepOutput) -> None:
        replica.patience_s = 0.0
        replica.stats = message.stats
        streams = self._table.of_replica(replica.index)
        vocab_size = replica.limits.vocab_size if replica.limits else 0
        for stream, reason in deliver(message, streams, vocab_size, replica.heard_s):
            self._metrics.bad_frames.inc(reason != SLOW_CLIENT)
            self.cut(stream, reason)
        for finish in message.finished:
            ended = streams.get(finish.id)
            if ended is None:
                continue  # ended or given up: what still comes is ignored
            self._table.release(ended)
            # An abort that we did not ask for: the engine drains, others may go on.
            ended.end(finish, loss="given_back" if finish.reason == "abort" else None)
        self._table.check_trial(replica.index)


class _BadFrames:
    """Counts them all, logs them once a minute."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._logged_s = float("-inf")
        self._unlogged = 0

    def add(self, replica: int, reason: str, now: float) -> None:
        """One more, by a replica."""
        self._metrics.bad_frames.inc()
        self._unlogged += 1
        if now - self._logged_s >= BAD_FRAME_LOG_S:
            logs.warning("bad_frame", replica=replica, reason=reason, frames=self._unlogged)
            self._logged_s = now
            self._unlogged = 0


def _read(replica: Replica, frame: bytes, metrics: Metrics) -> protocol.ToRouter:
    """The frame's message. Raises BadFrame. What should have come before it and did not is lost."""
    stats, answers = None, False
    try:
        message = protocol.decode_to_router(frame)
        if isinstance(message, protocol.StepOutput | protocol.Pong):
            answers = isinstance(message, protocol.Pong) and message.n == replica.ping_n
            stats = message.stats if message.epoch == replica.epoch else None
        return message
    finally:
        if lost := replica.frames.received(stats, answers=answers):
            metrics.dropped.inc(lost)
            logs.error("ipc_messages_dropped", replica=replica.index, messages=lost)


def _order(epoch: int, stream: Stream, placement: Orders) -> protocol.Submit:
    """The stream with its tokens so far, for an engine to go on with."""
    return protocol.Submit(
        epoch=epoch,
        id=stream.id,
        tokens=protocol.pack_tokens([*stream.prompt, *stream.tokens]),
        sampling=placement.sampling,
        max_new=stream.max_new - len(stream.tokens),
        stop_ids=placement.stop_ids,
        salt=placement.salt,
        priority=placement.priority,
        num_prompt=len(stream.prompt),
        pooling=stream.pooling,
        grammar=placement.grammar,
    )
