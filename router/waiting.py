"""How long a request may wait for what: time limits, permits, and the alarm that wakes it.

Owns the alarm of one request. Must not know text, engines' messages or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from router.admission import Admission, Ask, Permit
from router.errors import ModelUnloaded, Overloaded, RateLimited, RequestTimeout
from router.fleet import Fleet
from router.metrics import Metrics
from router.streams import ReplicaView, WakeUp
from router.text.served import ServedModel

T = TypeVar("T")


class Deadlines(NamedTuple):
    """Until when a request may wait for a permit, for its first token, and for its end."""

    permit_s: float | None
    first_token_s: float | None
    end_s: float | None


@dataclass(frozen=True, slots=True)
class FlowSettings:
    """Time limits of a whole request, of its wait for a permit, and of that for its first token; 0
    means none. `ping_s` is how often a silent wait is told of.

    A replica with `max_concurrency` sequences is passed over while another one has room.
    """

    request_timeout_s: float = 0.0
    queue_timeout_s: float = 0.0
    first_token_timeout_s: float = 0.0
    ping_s: float = 10.0
    max_concurrency: int = 64

    def deadlines(self, started_s: float) -> Deadlines:
        """Those of a request that came at `started_s`, of the monotonic clock."""
        end_s = started_s + self.request_timeout_s if self.request_timeout_s else None

        def earlier(limit_s: float) -> float | None:
            if not limit_s:
                return end_s
            return started_s + limit_s if end_s is None else min(started_s + limit_s, end_s)

        return Deadlines(earlier(self.queue_timeout_s), earlier(self.first_token_timeout_s), end_s)


@asynccontextmanager
async def hold_permit(
    fleet: Fleet,
    admission: Admission,
    metrics: Metrics,
    model: ServedModel,
    deadline_s: float | None,
    ask: Ask,
) -> AsyncGenerator[Permit]:
    """A permit. A wait that takes the whole time limit is overload, not the client's fault.

    Who waits for a model whose engines are asleep is what wakes them.
    """
    if model.key not in admission:
        raise Overloaded(f"Model '{model.name}' was just exchanged or removed, try again.")
    if _is_hopeless(fleet.views(model.key), came_later=admission.came_later(model.key)):
        raise fleet.unavailable(model.key)
    async with AsyncExitStack() as stack:
        try:
            wait = admission.permit(model.key, deadline_s, ask)
            permit = await stack.enter_async_context(wait)
        except (RateLimited, ModelUnloaded):
            metrics.refused.labels(model.name).inc()
            raise
        except (RequestTimeout, Overloaded) as error:
            metrics.refused.labels(model.name).inc()
            raise Overloaded(error.message, retry_after_s=error.retry_after_s or 1) from error
        yield permit


def _is_hopeless(views: list[ReplicaView], *, came_later: bool) -> bool:
    """Given up, or loading as the server starts: no queue for what may take minutes."""
    if all(view.state == "parked" for view in views):
        return True
    return not came_later and not any(view.limits or view.state == "asleep" for view in views)


class Entry(Generic[T]):
    """An async context that is entered beside its owner, who can tell of the wait meanwhile.

    `at_once` is for one that is expected not to wait: it spares a task.
    """

    def __init__(self, context: AbstractAsyncContextManager[T], *, at_once: bool) -> None:
        self._context = context
        self._at_once = at_once
        self._stack = AsyncExitStack()
        self._entering: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Entry[T]:
        entering = self._stack.enter_async_context(self._context)
        if self._at_once:
            self._entering.set_result(await entering)
        else:
            self._entering = asyncio.ensure_future(entering)
        return self

    async def __aexit__(self, *failure: Any) -> bool | None:
        self._entering.cancel()
        await asyncio.gather(self._entering, return_exceptions=True)
        return await self._stack.__aexit__(*failure)

    async def waits(self, seconds: float) -> bool:
        """Still not entered after so many seconds?"""
        if not self._entering.done():
            await asyncio.wait((self._entering,), timeout=seconds)
        return not self._entering.done()

    def value(self) -> T:
        """What the context gave. Raises what it raised."""
        return self._entering.result()


class Alarm:
    """What a request waits for: news of its streams, its time limit, or the next ping.

    One event for all of it, set by one timer; so a token costs one wake-up and no timer.
    """

    def __init__(self, clock: Callable[[], float], deadline_s: float | None) -> None:
        self.event = WakeUp()
        self.deadline_s = deadline_s
        self._clock = clock
        self._ping_s = 0.0
        self._rung = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def expired(self) -> bool:
        """The time limit has passed."""
        return self.deadline_s is not None and self._clock() >= self.deadline_s

    def start(self, ping_s: float) -> None:
        """From now on `wait` returns at least every `ping_s`, and at the time limit."""
        self._ping_s = ping_s
        self._arm()

    def stop(self) -> None:
        """No more timers."""
        if self._timer is not None:
            self._timer.cancel()

    def wait(self) -> Awaitable[None]:
        """Returns when something may have changed."""
        return self.event.wait()

    def rang(self) -> bool:
        """True once for each ring of the timer."""
        rang, self._rung = self._rung, False
        return rang

    def _arm(self) -> None:
        delay_s = self._ping_s
        if self.deadline_s is not None and not self.expired:
            delay_s = min(delay_s, self.deadline_s - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._rung = True
        self.event.set()
        self._arm()
