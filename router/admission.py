"""Who may work now: permits per model, and one bounded queue before them, fair between keys.

Owns the permits and the waiters. A model has (ready replicas x max-concurrency) permits, and a part
of that number for embeddings if it also generates; the number is asked for and never kept. Must
not know engines, text or HTTP. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

from router.errors import Overloaded, RateLimited, RequestError, RequestTimeout
from router.fairness import Line, Ticket
from router.versions import name_of

RATE_WINDOW: Final = 64  # permits given back that the service rate is measured over
MAX_RETRY_AFTER_S: Final = 60
MAX_QUEUE_TOKENS: Final = 4_000_000
EMBEDDING_SHARE: Final = 4  # one of so many: a request of many texts fills an engine by itself


class GateView(NamedTuple):
    """One model's numbers of this moment."""

    model: str
    waiting: int
    used: int
    permits: int


class QueueBounds(NamedTuple):
    """How many requests may wait for one model, and how many tokens they may have together."""

    requests: int
    tokens: int = MAX_QUEUE_TOKENS

    def is_full(self, requests: int, tokens: int, more: int) -> bool:
        """Whether a request of `more` tokens has no room. One alone always fits by its tokens."""
        return requests >= self.requests or (requests > 0 and tokens + more > self.tokens)

    def least_step_s(self, tokens: int) -> float:
        """How far apart returning requests of `tokens` must be for a second's to fit together."""
        return 1.0 / max(1.0, min(self.requests, self.tokens / max(1, tokens)))


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request is expected to cost, whose it is, its place among others of its key, and
    whether it is for embeddings."""

    tokens: int = 1
    tenant: bytes = b""
    priority: int = 0
    embeds: bool = False


ANYONE: Final = Ask()

Refusal = Callable[[str], RequestError]


class ServiceRate:
    """How fast tokens are served while requests wait, and when a refused client should return."""

    def __init__(self) -> None:
        self._served: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)
        self._known: float | None = None  # tokens/s when requests waited the last time
        self._promised_s = 0.0

    def served(self, now: float, tokens: int, *, waited_for: bool = True) -> None:
        """A permit came back after so many tokens. If nobody waits for it, nobody can tell how soon
        it could have come: quiet times say nothing of the speed."""
        if waited_for:
            self._served.append((now, max(1, tokens)))
        else:
            self._known = self.tokens_per_s(now)
            self._served.clear()

    def tokens_per_s(self, now: float) -> float | None:
        """Over the last permits that came back; None as long as nothing is known."""
        if len(self._served) < 2:
            return self._known
        span_s = max(now - self._served[0][0], 1e-3)
        return sum(tokens for _, tokens in list(self._served)[1:]) / span_s

    def retry_after_s(self, now: float, waiting: int, tokens: int, least_step_s: float = 0) -> int:
        """Whole seconds, at least 1, until a slot for `tokens` that no one else was promised.

        `waiting` tokens are in the queue. Each refusal takes the next free slot, so that a crowd
        comes back spread over time; slots are `least_step_s` apart, as all those of one second
        come back at once, and must find room.
        """
        rate = self.tokens_per_s(now)
        step_s = 1.0 if rate is None else max(tokens / rate, least_step_s)
        ahead_s = 0.0 if rate is None else waiting / rate / 2
        latest_s = now + MAX_RETRY_AFTER_S
        # half the queue must be gone, else a client comes back to a queue that is full again
        self._promised_s = min(max(self._promised_s, now + ahead_s) + step_s, latest_s)
        return max(1, math.ceil(self._promised_s - now))


class Permit:
    """The right to work. Who holds it says what the work cost; else the estimate stands."""

    def __init__(self, tokens: int) -> None:
        self.tokens = max(1, tokens)

    def settle(self, tokens: int) -> None:
        """So many tokens it was."""
        self.tokens = max(1, tokens)


class Gate:
    """The permits of one model, known by its key.

    Invariants: a permit is held by exactly one `permit` block; nobody waits while a permit is free.
    """

    def __init__(
        self,
        model: str,
        bounds: QueueBounds,
        permits: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self.model = model
        self.bounds = bounds  # may be exchanged; they hold for newcomers
        self._permits = permits
        self._clock = clock
        self._left_s = clock()  # when the last one left, served or not
        self._used = 0
        self._line = Line()
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        self._rate = ServiceRate()
        self._closed: Callable[[], RequestError] | None = None

    def view(self) -> GateView:
        """Numbers for metrics and the drain."""
        return GateView(name_of(self.model), len(self._waiters), self._used, self._permits())

    @property
    def idle_since_s(self) -> float | None:
        """When the last one left; None while anyone waits or holds a permit."""
        return None if self._used or self._waiters else self._left_s

    @property
    def is_free(self) -> bool:
        """A newcomer gets a permit at once."""
        return not self._line.size and self._used < self._permits()

    @asynccontextmanager
    async def permit(
        self, deadline_s: float | None = None, ask: Ask = ANYONE
    ) -> AsyncGenerator[Permit]:
        """Hold one permit. `deadline_s` (of the clock) bounds the wait for it.

        Raises Overloaded when the queue is full or closed, RateLimited when it is full of this
        key's requests, RequestTimeout at the deadline. A caller that is cancelled leaves the queue
        at once.
        """
        ticket = Ticket(ask.tenant, max(1, ask.tokens), ask.priority)
        await self._acquire(ticket, deadline_s)
        permit = Permit(ask.tokens)
        try:
            yield permit
        finally:
            waited_for = self._line.size > 0
            self._rate.served(self._clock(), permit.tokens, waited_for=waited_for)
            self._line.settle(ticket, permit.tokens)
            self._give_back()

    def refresh(self) -> None:
        """The number of permits may have grown."""
        while self._line.size and self._used < self._permits():
            waiter = self._waiters.pop(self._line.pop())
            if not waiter.done():
                self._used += 1
                waiter.set_result(None)

    def close(self, reason: str, kind: Refusal = Overloaded) -> None:
        """Refuse newcomers from now on; who waits or holds a permit goes on."""
        self._closed = lambda: kind(reason)

    @property
    def is_open(self) -> bool:
        """Newcomers are welcome."""
        return self._closed is None

    def open(self) -> None:
        """Newcomers are welcome again."""
        self._closed = None

    def evict(self, reason: str, kind: Refusal = Overloaded) -> None:
        """Refuse those who wait."""
        for ticket in list(self._waiters):
            self._refuse(ticket, kind(reason))

    def _refuse(self, ticket: Ticket, error: RequestError) -> None:
        self._line.remove(ticket)
        waiter = self._waiters.pop(ticket)
        if not waiter.done():
            waiter.set_exception(error)

    def _give_back(self) -> None:
        self._used -= 1
        self._left_s = self._clock()
        self.refresh()

    async def _acquire(self, ticket: Ticket, deadline_s: float | None) -> None:
        if self._closed is not None:
            raise self._closed()
        if self.is_free:
            self._used += 1
            return
        self._make_room(ticket)
        waiter = self._waiters[ticket] = asyncio.get_running_loop().create_future()
        self._line.push(ticket)
        admitted = False
        try:
            async with asyncio.timeout(_left_s(deadline_s, self._clock())):
                await waiter
            admitted = True
        except TimeoutError as error:
            raise RequestTimeout(
                f"No engine of model '{name_of(self.model)}' became free within the request's time "
                "limit.",
                retry_after_s=self._retry_after_s(ticket),
            ) from error
        finally:
            if not admitted:
                self._leave(ticket, waiter)

    def _make_room(self, ticket: Ticket) -> None:
        """A full queue drops from the key that fills it most. Raises Overloaded, RateLimited."""
        line, bounds = self._line, self.bounds
        while bounds.is_full(line.size, line.tokens, ticket.tokens):
            last = line.last_of_heaviest()
            own = line.tokens_of(ticket.tenant) + ticket.tokens
            if last is None or last.tenant == ticket.tenant or line.tokens_of(last.tenant) <= own:
                raise self._refusal(ticket)
            self._refuse(last, self._slow_down(last))

    def _refusal(self, ticket: Ticket) -> RequestError:
        """The answer for a full queue, with an honest Retry-After."""
        if self._line.tokens_of(ticket.tenant) < self._line.tokens:
            return self._slow_down(ticket)  # others wait too, and this key has its share
        retry_after_s = self._retry_after_s(ticket)
        return Overloaded(
            f"The queue for model '{name_of(self.model)}' is full; try again in {retry_after_s} s.",
            retry_after_s=retry_after_s,
        )

    def _slow_down(self, ticket: Ticket) -> RateLimited:
        retry_after_s = self._retry_after_s(ticket)
        return RateLimited(
            f"The queue for model '{name_of(self.model)}' is full and this key has its share of "
            f"it; try again in {retry_after_s} s.",
            retry_after_s=retry_after_s,
        )

    def _retry_after_s(self, ticket: Ticket) -> int:
        step_s = self.bounds.least_step_s(ticket.tokens)
        return self._rate.retry_after_s(self._clock(), self._line.tokens, ticket.tokens, step_s)

    def _leave(self, ticket: Ticket, waiter: asyncio.Future[None]) -> None:
        self._left_s = self._clock()
        if self._waiters.pop(ticket, None) is not None:
            self._line.remove(ticket)
        elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self._line.settle(ticket, 0)
            self._give_back()  # granted in the moment its owner gave up


def _left_s(deadline_s: float | None, now: float) -> float | None:
    return None if deadline_s is None else max(0.0, deadline_s - now)


class Admission:
    """One gate per model, and one more for the embeddings of a model that also generates.

    Texts to be embedded are background work of an engine: chats neither wait for their permits
    nor lose any to them. Models are known by their keys; `add` and `remove` change them.
    """

    def __init__(self, gates: Iterable[Gate], embedding_gates: Iterable[Gate] = ()) -> None:
        self._gates = {gate.model: gate for gate in gates}
        self._embedding_gates = {gate.model: gate for gate in embedding_gates}
        self._came_later: set[str] = set()
        self._closed = ""  # why newcomers of all models are refused

    def add(self, gate: Gate, embedding_gate: Gate | None = None) -> None:
        """One more model, while the server runs."""
        self._gates[gate.model] = gate
        self._came_later.add(gate.model)
        if embedding_gate is not None:
            self._embedding_gates[gate.model] = embedding_gate
        if self._closed:
            self.close(self._closed, gate.model)

    def remove(self, model: str) -> None:
        """Nobody may be there any more: those who wait are refused before, see `evict`."""
        self._gates.pop(model, None)
        self._embedding_gates.pop(model, None)
        self._came_later.discard(model)

    def __contains__(self, model: str) -> bool:
        return model in self._gates

    def came_later(self, model: str) -> bool:
        """It was added while the server ran: whoever asks for it may wait for its first load."""
        return model in self._came_later

    def permit(
        self,
        model: str,
        deadline_s: float | None = None,
        ask: Ask = ANYONE,
    ) -> contextlib.AbstractAsyncContextManager[Permit]:
        """See `Gate.permit`. Raises KeyError for a model that is not served."""
        return self._gate(model, ask).permit(deadline_s, ask)

    def is_free(self, model: str, ask: Ask = ANYONE) -> bool:
        """See `Gate.is_free`. False for a model that is gone."""
        return model in self._gates and self._gate(model, ask).is_free

    def refresh(self, model: str) -> None:
        """A replica of `model` became ready."""
        for gate in self._of(model):
            gate.refresh()

    def bound(self, bounds: QueueBounds) -> None:
        """From now on these hold for all queues."""
        for gate in self._of(None):
            gate.bounds = bounds
            gate.refresh()

    def close(self, reason: str, model: str | None = None, kind: Refusal = Overloaded) -> None:
        """Refuse newcomers from now on, of one model or of any."""
        if model is None:
            self._closed = reason
        for gate in self._of(model):
            gate.close(reason, kind)

    def is_open(self, model: str) -> bool:
        """Newcomers of it are welcome."""
        return any(gate.is_open for gate in self._of(model))

    def open(self, model: str) -> None:
        """Newcomers of this model are welcome again, unless the server stops."""
        for gate in self._of(model):
            if not self._closed:
                gate.open()

    def evict(self, reason: str, model: str | None = None, kind: Refusal = Overloaded) -> None:
        """Refuse those who wait, for one model or for any."""
        for gate in self._of(model):
            gate.evict(reason, kind)

    def views(self) -> list[GateView]:
        """Numbers of all models by their names, those of all their gates added up."""
        views: dict[str, list[GateView]] = {}
        for gate in self._of(None):
            views.setdefault(name_of(gate.model), []).append(gate.view())
        return list(map(_total, views.values()))

    def waiting(self, model: str) -> int:
        """How many wait for a permit."""
        return sum(gate.view().waiting for gate in self._of(model))

    def idle_since_s(self, model: str) -> float | None:
        """When the last request of it ended, as far as it was admitted; None while there is one."""
        times = [gate.idle_since_s for gate in self._of(model)]
        known = [time for time in times if time is not None]
        return max(known) if known and len(known) == len(times) else None

    @property
    def active(self) -> int:
        """Requests that hold a permit or wait for one."""
        return sum(view.used + view.waiting for view in self.views())

    def _gate(self, model: str, ask: Ask) -> Gate:
        gate = self._gates[model]
        return self._embedding_gates.get(model, gate) if ask.embeds else gate

    def _of(self, model: str | None) -> list[Gate]:
        """The gates of one model, or of all."""
        gates = (*self._gates.values(), *self._embedding_gates.values())
        return [gate for gate in gates if model in (None, gate.model)]


def _total(views: list[GateView]) -> GateView:
    _, waiting, used, permits = zip(*views, strict=True)
    return GateView(views[0].model, sum(waiting), sum(used), sum(permits))
