"""Permits: none is lost, none is held twice, nobody waits while one is free."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission import MAX_RETRY_AFTER_S, Admission, Ask, Gate, QueueBounds, ServiceRate
from router.errors import Overloaded, RateLimited, RequestTimeout


def gate(permits: int, max_queue: int = 10) -> Gate:
    return Gate("m", QueueBounds(max_queue), lambda: permits, time.monotonic)


async def hold(one: Gate, until: asyncio.Event) -> None:
    async with one.permit(None):
        await until.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_waiters_are_served_in_order() -> None:
    one, order = gate(1), list[int]()

    async def work(name: int) -> None:
        async with one.permit(None):
            order.append(name)
            await asyncio.sleep(0)

    await asyncio.gather(*(work(i) for i in range(5)))
    assert order == [0, 1, 2, 3, 4]
    assert one.view() == ("m", 0, 0, 1)


async def test_a_full_queue_refuses_with_retry_after() -> None:
    one = gate(1, max_queue=0)
    async with one.permit(None):
        with pytest.raises(Overloaded) as caught:
            async with one.permit(None):
                pass
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    async with one.permit(None):
        pass


async def test_deadline_in_the_queue() -> None:
    one = gate(0)
    with pytest.raises(RequestTimeout):
        async with one.permit(time.monotonic() + 0.01):
            pass
    assert one.view().waiting == 0


async def test_a_cancelled_waiter_leaves_at_once() -> None:
    one = gate(1)
    async with one.permit(None):
        tasks = [asyncio.create_task(hold(one, asyncio.Event())) for _ in range(3)]
        await settle()
        assert one.view().waiting == 3
        tasks[1].cancel()
        await settle()
        assert one.view().waiting == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert one.view() == ("m", 0, 0, 1)


async def test_a_waiter_cancelled_in_the_moment_of_its_grant_passes_it_on() -> None:
    one = gate(1)
    holder = one.permit(None)
    await holder.__aenter__()
    end = asyncio.Event()
    first = asyncio.create_task(hold(one, end))
    second = asyncio.create_task(hold(one, end))
    await settle()
    await holder.__aexit__(None, None, None)  # grants to `first`, which has not run yet
    first.cancel()
    await settle()
    assert first.cancelled()
    assert one.view() == ("m", 0, 1, 1)  # `second` has it
    end.set()
    await second
    assert one.view() == ("m", 0, 0, 1)


async def test_more_permits_wake_more_waiters() -> None:
    size = 0
    one = Gate("m", QueueBounds(10), lambda: size, time.monotonic)
    end = asyncio.Event()
    tasks = [asyncio.create_task(hold(one, end)) for _ in range(3)]
    await settle()
    assert one.view().waiting == 3
    size = 2
    one.refresh()
    await settle()
    assert (one.view().waiting, one.view().used) == (1, 2)
    end.set()
    await asyncio.gather(*tasks)
    assert one.view() == ("m", 0, 0, 2)


async def test_close_refuses_newcomers_and_evict_those_who_wait() -> None:
    admission = Admission([gate(1)])
    async with admission.permit("m"):
        waiter = asyncio.create_task(admission.permit("m").__aenter__())
        await settle()
        admission.close("stopping")
        with pytest.raises(Overloaded, match="stopping"):
            async with admission.permit("m"):
                pass
        assert admission.active == 2
        admission.evict("stopping")
        with pytest.raises(Overloaded, match="stopping"):
            await waiter
        assert admission.active == 1
    assert admission.active == 0


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 8))
@settings(max_examples=50)
def test_no_permit_is_ever_lost(seed: int, permits: int, max_queue: int) -> None:
    rng = random.Random(seed)

    async def scenario() -> None:
        one, held = gate(permits, max_queue), set[int]()

        async def client(name: int) -> None:
            with contextlib.suppress(Overloaded, RequestTimeout):
                limit = time.monotonic() if rng.random() < 0.1 else None
                async with one.permit(limit):
                    held.add(name)
                    assert len(held) <= permits
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                    held.discard(name)

        tasks: list[asyncio.Task[None]] = []
        for name in range(30):
            tasks.append(asyncio.create_task(client(name)))
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            if rng.random() < 0.4:
                victim = rng.randrange(len(tasks))
                tasks[victim].cancel()
                held.discard(victim)
            view = one.view()
            assert view.used <= permits
            assert view.waiting == 0 or view.used == permits
        await asyncio.gather(*tasks, return_exceptions=True)
        assert one.view() == ("m", 0, 0, permits)

    asyncio.run(scenario())


def test_retry_after_follows_the_measured_rate() -> None:
    rate = ServiceRate()
    for second in range(11):
        rate.served(float(second * 2), 100)  # 100 tokens every two seconds
    assert rate.tokens_per_s(20.0) == pytest.approx(50)
    assert rate.retry_after_s(20.0, waiting=1000, tokens=100) == 12  # half the queue, and one slot
    assert rate.retry_after_s(20.0, waiting=1000, tokens=100) == 14  # the next slot is the next's
    for _ in range(100):
        assert 1 <= rate.retry_after_s(20.0, waiting=1000, tokens=100) <= MAX_RETRY_AFTER_S
    assert ServiceRate().retry_after_s(0.0, waiting=0, tokens=1) >= 1


async def test_a_queue_is_bounded_by_tokens_too() -> None:
    one = Gate("m", QueueBounds(10, 100), lambda: 1, time.monotonic)
    end = asyncio.Event()
    tasks = [asyncio.create_task(hold(one, end))]
    await settle()

    async def ask(tokens: int) -> None:
        async with one.permit(None, Ask(tokens)):
            pass

    tasks.append(asyncio.create_task(ask(500)))  # alone it may be of any size
    await settle()
    with pytest.raises(Overloaded):
        await ask(1)
    end.set()
    await asyncio.gather(*tasks)
    await ask(1)


async def test_a_full_queue_drops_from_the_key_that_fills_it() -> None:
    one = gate(1, max_queue=4)
    end = asyncio.Event()
    holder = asyncio.create_task(hold(one, end))
    await settle()
    served: list[bytes] = []

    async def ask(tenant: bytes) -> None:
        async with one.permit(None, Ask(10, tenant)):
            served.append(tenant)

    heavy = [asyncio.create_task(ask(b"heavy")) for _ in range(4)]
    await settle()
    with pytest.raises(Overloaded):  # nobody else waits: the server is full, not the key
        await ask(b"heavy")
    light = asyncio.create_task(ask(b"light"))
    await settle()
    with pytest.raises(RateLimited) as caught:
        await heavy[3]
    assert caught.value.status == 429
    assert caught.value.retry_after_s is not None
    with pytest.raises(RateLimited):
        await ask(b"heavy")
    end.set()
    await asyncio.gather(holder, light, *heavy[:3])
    assert sorted(served) == [b"heavy"] * 3 + [b"light"]
    assert one.view() == ("m", 0, 0, 1)


async def test_a28_one_keys_crowd_does_not_hold_up_another() -> None:
    one = gate(1, max_queue=200)
    end = asyncio.Event()
    holder = asyncio.create_task(hold(one, end))
    await settle()
    order: list[bytes] = []

    async def ask(tenant: bytes) -> None:
        async with one.permit(None, Ask(2000, tenant)) as permit:
            order.append(tenant)
            permit.settle(2000)

    tasks = [asyncio.create_task(ask(b"heavy")) for _ in range(100)]
    await settle()
    tasks += [asyncio.create_task(ask(b"light")) for _ in range(5)]
    await settle()
    end.set()
    await asyncio.gather(holder, *tasks)
    assert max(i for i, tenant in enumerate(order) if tenant == b"light") < 16


def test_r19_quiet_times_say_nothing_of_the_speed() -> None:
    """Ten requests in an hour, and then a crowd: it is not told to come back in a minute."""
    rate = ServiceRate()
    for second in range(0, 3600, 360):
        rate.served(float(second), 100, waited_for=False)
    assert rate.retry_after_s(3600.0, 5000, 100) == 1  # nothing is known yet
    for i in range(20):
        rate.served(3600.0 + i / 10, 100)  # 1,000 tokens/s
    assert rate.tokens_per_s(3602.0) == pytest.approx(1000, rel=0.1)
    rate.served(3602.0, 100, waited_for=False)
    assert rate.tokens_per_s(9000.0) == pytest.approx(1000, rel=0.1)


async def test_r19_a_wait_that_took_too_long_is_told_when_to_return() -> None:
    one = gate(1)
    end = asyncio.Event()
    holder = asyncio.create_task(hold(one, end))
    await settle()
    with pytest.raises(RequestTimeout) as caught:
        async with one.permit(0.0):
            pass
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    end.set()
    await holder


def test_r19_no_more_are_told_to_return_in_one_second_than_there_is_room_for() -> None:
    """Retry-After is in whole seconds, so they come in bunches."""
    bounds = QueueBounds(8, 1000)
    for tokens, room in ((10, 8), (500, 2)):
        rate = ServiceRate()
        for i in range(20):
            rate.served(i / 1000, 1000)  # very fast
        step_s = bounds.least_step_s(tokens)
        told = [rate.retry_after_s(0.02, 80, tokens, step_s) for _ in range(40)]
        assert max(told.count(second) for second in set(told)) <= room
