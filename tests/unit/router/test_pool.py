from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator

import pytest

from router.errors import BadRequest, Overloaded
from router.text.pool import INLINE_CHARS, JOBS_AFTER_SLOW, TakesLong, TextPool


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Jobs wait for it; opened at the end, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


async def until_idle(pool: TextPool) -> None:
    while pool.jobs:  # noqa: ASYNC110 - a test looks from outside
        await asyncio.sleep(0.001)


async def test_results_and_errors_come_back() -> None:
    pool = TextPool()
    assert await pool.run(lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 / 0)
    await until_idle(pool)
    pool.close()


async def test_the_loop_stays_free(gate: threading.Event) -> None:
    pool = TextPool(threads=1)
    job = asyncio.create_task(pool.run(gate.wait))
    await asyncio.sleep(0.01)
    assert not job.done()
    gate.set()
    assert await job
    pool.close()


async def test_too_many_waiting_jobs_are_refused(gate: threading.Event) -> None:
    pool = TextPool(threads=1, max_waiting=1)
    jobs = [asyncio.create_task(pool.run(gate.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await pool.run(gate.wait)
    assert caught.value.retry_after_s is not None
    gate.set()
    assert all(await asyncio.gather(*jobs))
    await until_idle(pool)
    assert await pool.run(lambda: "again") == "again"
    pool.close()


async def test_a_job_beyond_the_time_limit(gate: threading.Event) -> None:
    pool = TextPool(threads=1, max_waiting=0, limit_s=0.01)
    with pytest.raises(BadRequest, match="took longer"):
        await pool.run(gate.wait)
    # its thread is still busy, so the place is not free yet
    with pytest.raises(Overloaded):
        await pool.run(gate.wait)
    gate.set()
    await until_idle(pool)
    pool.close()


async def test_a_time_out_of_the_job_itself_is_its_own() -> None:
    pool = TextPool()

    def work() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await pool.run(work)
    pool.close()


async def test_a_cancelled_waiting_job_never_runs(gate: threading.Event) -> None:
    pool = TextPool(threads=1)
    ran: list[int] = []
    first = asyncio.create_task(pool.run(gate.wait))
    second = asyncio.create_task(pool.run(ran.append, 1))
    await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.set()
    await first
    await until_idle(pool)
    assert not ran
    pool.close()


async def test_small_jobs_run_at_once() -> None:
    pool = TextPool(clock=itertools.count().__next__)  # every job takes a second
    here = threading.get_ident()
    assert await pool.run_sized(INLINE_CHARS + 1, threading.get_ident) != here
    assert await pool.run_sized(INLINE_CHARS, threading.get_ident) == here
    # it was slow, so the next ones are not trusted
    for _ in range(JOBS_AFTER_SLOW):
        assert await pool.run_sized(1, threading.get_ident) != here
    assert await pool.run_sized(1, threading.get_ident) == here
    pool.close()


async def test_quick_small_jobs_stay_on_the_loop() -> None:
    pool = TextPool(clock=lambda: 0.0)
    here = threading.get_ident()
    assert [await pool.run_sized(1, threading.get_ident) for _ in range(3)] == [here] * 3
    with pytest.raises(ZeroDivisionError):
        await pool.run_sized(1, lambda: 1 / 0)
    pool.close()


async def test_a_short_job_that_takes_long_goes_to_a_thread() -> None:
    pool = TextPool()
    threads: list[str] = []

    def job() -> int:
        threads.append(threading.current_thread().name)
        if len(threads) == 1:
            raise TakesLong
        return 5

    assert await pool.run_sized(1, job) == 5
    assert threads[0] == threading.main_thread().name
    assert threads[1].startswith("text")
    pool.close()
