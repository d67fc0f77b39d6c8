"""Where templates and tokenizing run: long texts in a small thread pool, short ones at once.

Owns its threads and the bound on waiting jobs. Must not know what the jobs do.

Why short ones at once, measured on two cores with the demo model (render and encode, median):

    characters           30      1,000     3,000     10,000
    on the event loop    65 µs   230 µs    540 µs    1.7 ms
    thread, idle loop    100 µs  265 µs    590 µs    4.9 ms
    thread, busy loop    0.9 ms  1.7 ms    3.0 ms    7.6 ms   (and 5 ms and more one time in ten)

A thread waits for the GIL of a busy loop; below INLINE_CHARS that wait is longer than the work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from router.errors import BadRequest, Overloaded

P = ParamSpec("P")
T = TypeVar("T")

INLINE_CHARS: Final = 2000
INLINE_LIMIT_S: Final = 0.02  # a job that holds the loop longer sends the next ones to threads
JOBS_AFTER_SLOW: Final = 256  # so many


class TakesLong(Exception):
    """Raised by a job that holds the event loop and would for long: it wants a thread."""


class TextPool:
    """Runs functions that prepare or measure text, at most `threads` at a time.

    Used from one event loop. A job counts until its thread is done with it, also when nobody waits
    for it any more: the bound holds for real work.
    """

    def __init__(
        self,
        *,
        threads: int = 2,
        max_waiting: int = 256,
        limit_s: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._max_jobs = threads + max_waiting
        self._limit_s = limit_s
        self._clock = clock
        self._jobs = 0
        self._jobs_until_inline = 0

    @property
    def jobs(self) -> int:
        """Jobs waiting or running in threads."""
        return self._jobs

    async def run_sized(
        self, num_chars: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `run`, for a job over `num_chars` characters; a small one runs at once, on the loop.

        One that raises `TakesLong` there is begun again in a thread. Should a job be slow all the
        same, the next ones are not given that chance.
        """
        if num_chars > INLINE_CHARS or self._jobs_until_inline:
            self._jobs_until_inline = max(0, self._jobs_until_inline - 1)
            return await self.run(function, *args, **kwargs)
        start = self._clock()
        try:
            return function(*args, **kwargs)
        except TakesLong:
            pass
        finally:
            if self._clock() - start > INLINE_LIMIT_S:
                self._jobs_until_inline = JOBS_AFTER_SLOW
        return await self.run(function, *args, **kwargs)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, from a thread.

        Raises `Overloaded` if too many jobs wait, `BadRequest` if the job is not done within the
        time limit, and whatever the function raises. If the waiting task is cancelled, a job that
        has not begun never does.
        """
        if self._jobs >= self._max_jobs:
            raise Overloaded("Too many texts are waiting to be tokenized.")
        loop = asyncio.get_running_loop()
        self._jobs += 1
        job = self._executor.submit(function, *args, **kwargs)
        job.add_done_callback(lambda _: _tell(loop, self._finished))
        limit = asyncio.timeout(self._limit_s)
        try:
            async with limit:
                return await asyncio.wrap_future(job, loop=loop)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the function's own
            raise BadRequest(
                f"Preparing the text took longer than {self._limit_s:g} s: it is too long."
            ) from error

    def close(self) -> None:
        """Waiting jobs are dropped, running ones are not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _finished(self) -> None:
        self._jobs -= 1


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
