"""Who may work now: permits per model, one bounded first-in-first-out queue before them.

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
from typing import Final, NamedTuple

from router.errors import Overloaded, RequestTimeout

RATE_WINDOW: Final = 64  # releases the service rate is measured over
MAX_RETRY_AFTER_S: Final = 60
EMBEDDING_SHARE: Final = 4  # one of so many: a request of many texts fills an engine by itself


class GateView(NamedTuple):
    """One model's numbers of this moment."""

    model: str
    waiting: int
    used: int
    permits: int


class ServiceRate:
    """How fast permits come back, and when the next refused client should return."""

    def __init__(self) -> None:
        self._released_s: deque[float] = deque(maxlen=RATE_WINDOW)
        self._promised_s = 0.0

    def released(self, now: float) -> None:
        """A permit came back."""
        self._released_s.append(now)

    def per_second(self, now: float) -> float:
        """Permits per second over the last releases; 1 as long as nothing is known."""
        if len(self._released_s) < 2:
            return 1.0
        span_s = max(now - self._released_s[0], 1e-3)
        return (len(self._released_s) - 1) / span_s

    def retry_after_s(self, now: float, waiting: int) -> int:
        """Whole seconds, at least 1, until a slot that no one else was promised.

        Each refusal takes the next free slot, so that a crowd comes back spread over time.
        """
        step_s = 1 / self.per_second(now)
        latest_s = now + MAX_RETRY_AFTER_S
        # half the queue must be gone, else a client comes back to a queue that is full again
        self._promised_s = min(max(self._promised_s, now + waiting * step_s / 2) + step_s, latest_s)
        return max(1, math.ceil(self._promised_s - now))


class Gate:
    """The permits of one model.

    Invariants: a permit is held by exactly one `permit` block; nobody waits while a permit is free.
    """

    def __init__(
        self, model: str, max_queue: int, permits: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self.model = model
        self._max_queue = max_queue
        self._permits = permits
        self._clock = clock
        self._used = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._rate = ServiceRate()
        self._closed: str | None = None

    def view(self) -> GateView:
        """Numbers for metrics and the drain."""
        return GateView(self.model, len(self._waiters), self._used, self._permits())

    @asynccontextmanager
    async def permit(self, deadline_s: float | None) -> AsyncGenerator[None]:
        """Hold one permit. `deadline_s` (of the clock) bounds the wait for it.

        Raises Overloaded when the queue is full or closed, RequestTimeout at the deadline. A caller
        that is cancelled leaves the queue at once.
        """
        await self._acquire(deadline_s)
        try:
            yield
        finally:
            self._rate.released(self._clock())
            self._give_back()

    def refresh(self) -> None:
        """The number of permits may have grown."""
        while self._waiters and self._used < self._permits():
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._used += 1
                waiter.set_result(None)

    def close(self, reason: str) -> None:
        """Refuse newcomers from now on; who waits or holds a permit goes on."""
        self._closed = reason

    def evict(self, reason: str) -> None:
        """Refuse those who wait."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(Overloaded(reason))

    def refusal(self) -> Overloaded:
        """The answer for a full queue, with an honest Retry-After."""
        retry_after_s = self._rate.retry_after_s(self._clock(), len(self._waiters))
        return Overloaded(
            f"The queue for model '{self.model}' is full; try again in {retry_after_s} s.",
            retry_after_s=retry_after_s,
        )

    def _give_back(self) -> None:
        self._used -= 1
        self.refresh()

    async def _acquire(self, deadline_s: float | None) -> None:
        if self._closed is not None:
            raise Overloaded(self._closed)
        if not self._waiters and self._used < self._permits():
            self._used += 1
            return
        if len(self._waiters) >= self._max_queue:
            raise self.refusal()
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        admitted = False
        try:
            async with asyncio.timeout(_left_s(deadline_s, self._clock())):
                await waiter
            admitted = True
        except TimeoutError as error:
            raise RequestTimeout(
                f"No engine of model '{self.model}' became free within the request's time limit."
            ) from error
        finally:
            if not admitted:
                self._leave(waiter)

    def _leave(self, waiter: asyncio.Future[None]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self._give_back()  # granted in the moment its owner gave up


def _left_s(deadline_s: float | None, now: float) -> float | None:
    return None if deadline_s is None else max(0.0, deadline_s - now)


class Admission:
    """One gate per model, and one more for the embeddings of a model that also generates.

    Texts to be embedded are background work of an engine: chats neither wait for their permits
    nor lose any to them.
    """

    def __init__(self, gates: list[Gate], embedding_gates: Iterable[Gate] = ()) -> None:
        self._gates = {gate.model: gate for gate in gates}
        self._embedding_gates = {gate.model: gate for gate in embedding_gates}

    def permit(
        self, model: str, deadline_s: float | None = None, *, embeds: bool = False
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """See `Gate.permit`. Raises KeyError for a model that is not served."""
        gate = self._gates[model]
        return (self._embedding_gates.get(model, gate) if embeds else gate).permit(deadline_s)

    def refresh(self, model: str) -> None:
        """A replica of `model` became ready."""
        for gate in self._of(model):
            gate.refresh()

    def close(self, reason: str) -> None:
        """Refuse newcomers from now on."""
        for gate in self._of(None):
            gate.close(reason)

    def evict(self, reason: str, model: str | None = None) -> None:
        """Refuse those who wait, for one model or for any."""
        for gate in self._of(model):
            gate.evict(reason)

    def views(self) -> list[GateView]:
        """Numbers of all models, those of both gates added up."""
        return [_total([gate.view() for gate in self._of(model)]) for model in self._gates]

    @property
    def active(self) -> int:
        """Requests that hold a permit or wait for one."""
        return sum(view.used + view.waiting for view in self.views())

    def _of(self, model: str | None) -> list[Gate]:
        """The gates of one model, or of all."""
        gates = (*self._gates.values(), *self._embedding_gates.values())
        return [gate for gate in gates if model in (None, gate.model)]


def _total(views: list[GateView]) -> GateView:
    _, waiting, used, permits = zip(*views, strict=True)
    return GateView(views[0].model, sum(waiting), sum(used), sum(permits))
