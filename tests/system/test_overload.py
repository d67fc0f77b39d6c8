"""R18 to R21: more work than an engine can do. Figures are printed; see tests/overload.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aborts import Books, is_idle, probing, share, tell
from tests.overload import accepted_at_first_return, ask, crowd, honest, open_loop
from tests.serving import Server, serve, wait_for
from tools.tiny_model import write_tiny_model

pytestmark = pytest.mark.slow

NEVER_S = 30.0  # nobody may be kept waiting so long, on whatever machine
OVERLOAD_S = 2.0  # R18; 60 in tools/soak
HONEST_CLIENTS = 40  # R19
FAIR_S = 4.0  # R20
WORK = {"prompt": "work", "max_tokens": 10, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Server]:
    """Four requests at once, each 0.2 s: 20 a second; eight may wait."""
    rules = [{"match": "*", "reply": "0123456789", "repeat": True, "tokens_per_s": 50}]
    limits = ("--max-concurrency", "4", "--max-queue", "8")
    with serve("--models", f"tiny={folder}", *limits, script={"rules": rules}) as server:
        yield server


async def test_r19_who_waits_as_told_is_served(small: Server) -> None:
    await open_loop(small.url, WORK, 24, 2)  # so that the speed is known
    histories = await honest(small.url, WORK, HONEST_CLIENTS)
    part = accepted_at_first_return(histories)
    tell(f"R19: {part:.0%} of those refused were served at their first return")
    assert sum(len(history) > 1 for history in histories) > HONEST_CLIENTS / 3
    assert part >= 0.7  # 90 % where the pace of the engine is steady
    await asyncio.to_thread(wait_for, lambda: is_idle(small), NEVER_S, small)


async def test_r18_four_times_too_much_and_then_little(small: Server) -> None:
    async with probing(small.url) as probe:
        outcomes = await open_loop(small.url, WORK, 80, OVERLOAD_S)
        light = [await ask(small.url, WORK) for _ in range(5)]
    accepted = [each.took_s for each in outcomes if each.status == 200]
    refused = [each for each in outcomes if each.status != 200]
    assert len(accepted) > 8
    assert len(refused) > 8
    assert {each.status for each in refused} == {503}
    assert all(each.retry_after_s is not None and each.retry_after_s >= 1 for each in refused)
    assert max(accepted) < NEVER_S
    assert [each.status for each in light] == [200] * 5
    assert max(each.took_s for each in light) < NEVER_S
    assert probe.failures == []
    refused_s = [each.took_s for each in refused]
    assert share(refused_s, 0.5) < 2.0  # 20 ms on a quiet machine
    tell(
        f"R18: accepted {len(accepted)}, p99 {share(accepted, 0.99):.2f} s; refused "
        f"{len(refused)}, median {share(refused_s, 0.5) * 1e3:.0f} ms, p99 "
        f"{share(refused_s, 0.99) * 1e3:.0f} ms; then light load at most "
        f"{max(each.took_s for each in light):.2f} s; live: {probe.told()}"
    )


async def test_r20_keys_share_by_tokens(folder: Path, tmp_path: Path) -> None:
    """A heavy key with long requests and a light one with short ones, both always waiting."""
    keys = tmp_path / "keys"
    keys.write_text("heavy\nlight\n")
    rules = [{"match": "*", "reply": "0123456789", "repeat": True, "tokens_per_s": 500}]
    limits = ("--max-concurrency", "2", "--api-key-file", str(keys))
    heavy = {"prompt": "x" * 100, "max_tokens": 200, "ignore_eos": True}
    light = {"prompt": "y" * 10, "max_tokens": 20, "ignore_eos": True}
    as_heavy, as_light = (f"Authorization: Bearer {key}" for key in ("heavy", "light"))
    with serve("--models", f"tiny={folder}", *limits, script={"rules": rules}) as server:
        async with crowd(server.url, heavy, 12, as_heavy) as many:
            await asyncio.sleep(1)
            begin_s = time.monotonic()
            async with crowd(server.url, light, 12, as_light) as few:
                await asyncio.sleep(FAIR_S)
                end_s = time.monotonic()
            once = [await ask(server.url, light, as_light) for _ in range(3)]
    work_s = 300 / 500  # of a heavy request
    tokens = [
        many.tokens_between(begin_s, end_s) * 300 / 200,
        few.tokens_between(begin_s, end_s) * 30 / 20,
    ]
    part = tokens[1] / sum(tokens)
    waits_s = [each.took_s for each in once]
    tell(f"R20: light key's share {part:.0%}; alone beside 12 it took {max(waits_s):.2f} s")
    assert 0.3 < part < 0.7  # within 10 % of one half over a longer time
    assert {each.status for each in [*many.outcomes, *few.outcomes, *once]} == {200}
    assert max(waits_s) < NEVER_S * work_s


async def test_r21_an_engine_that_stops_reading(folder: Path) -> None:
    """Clients come and go meanwhile; then all that stay are answered, and nothing was lost."""
    stop = {"kind": "hang", "seconds": 3.0}
    rules = [
        {"match": {"contains": "hang"}, "reply": "x", "faults": [stop]},
        {"match": "*", "reply": "0123456789", "repeat": True, "tokens_per_s": 0},
    ]
    limits = ("--max-concurrency", "8", "--max-queue", "16")
    with serve("--models", f"tiny={folder}", *limits, script={"rules": rules}) as server:
        before = await asyncio.to_thread(Books.of, server)
        async with probing(server.url) as probe:
            hanging = asyncio.create_task(ask(server.url, {"prompt": "hang", "max_tokens": 5}))
            await asyncio.sleep(0.3)
            outcomes = await open_loop(server.url, WORK, 40, 2)
            assert (await hanging).status == 200
        statuses = {each.status for each in outcomes}
        assert statuses <= {200, 503}
        assert sum(each.status == 200 for each in outcomes) >= 10
        assert probe.failures == []
        assert server.metric("router_ipc_messages_dropped_total") == 0
        assert server.metric("router_engine_restarts_total") == 0
        assert (await ask(server.url, WORK)).status == 200
        assert await asyncio.to_thread(Books.of, server) == before
