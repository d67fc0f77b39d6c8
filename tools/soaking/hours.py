"""R27: hours of mixed load on a real model, with an engine killed every two minutes.

Owns the rhythm of kills and samples. Everything that could grow is sampled: memory, descriptors,
tasks, leaked blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from bench.report import percentile
from tools.soaking.figures import (
    Measure,
    MemorySample,
    RowResult,
    at_most,
    exactly,
    longest_pause,
    memory_growth,
    memory_slope,
    noted,
    thirds,
)
from tools.soaking.load import Load, Log, learn
from tools.soaking.requests import KINDS, Mix, make_requests
from tools.soaking.router import Router, Sample, running
from tools.soaking.row import Orders

KILL_EVERY_S: Final = 120.0
SAMPLE_EVERY_S: Final = 5.0
STAYING, LEAVING = 8, 2
REQUESTS: Final = 36
SHORTEST, LONGEST = 4, 32
SLOPE_MB: Final = 1.0  # of memory, for 10,000 requests
FLAT: Final = 1.1  # p99 of the last third over that of the first
FEW_DESCRIPTORS: Final = 4  # more or less at the end than at the beginning: connections kept open


class Vitals(NamedTuple):
    """What could grow, at one moment without load."""

    descriptors: int
    tasks: int

    @staticmethod
    async def of(router: Router) -> Vitals:
        """Once nothing runs and the clients' connections are closed."""
        await router.until_idle()
        await asyncio.sleep(1.0)
        return Vitals(router.descriptors(), await router.tasks())


class Watch:
    """Samples of one run."""

    def __init__(self, router: Router, log: Log, say: Callable[[str], None]) -> None:
        self.memory: list[MemorySample] = []
        self.leaked = 0.0  # of engines that live and of those that were killed
        self.kills_s: list[float] = []
        self._router = router
        self._log = log
        self._say = say

    async def sample_on(self, minutes: float) -> None:
        """Until cancelled; tells once a minute how far it is."""
        began_s = told_s = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            self._log.check_now()
            self.memory.append(MemorySample(self._log.finished, self._router.resident_bytes()))
            with contextlib.suppress(OSError):
                self.leaked = max(self.leaked, leaked_blocks(await self._router.sample()))
            if time.monotonic() - told_s >= 60:
                told_s = time.monotonic()
                self._say(
                    f"R27: {(told_s - began_s) / 60:.0f} of {minutes:g} min, {self._log.finished:,}"
                    f" requests, {len(self._log.findings)} faults, {len(self.kills_s)} kills,"
                    f" {self.memory[-1].resident_bytes / 1e6:.1f} MB"
                )

    async def kill_on(self) -> None:
        """One engine after the other, until cancelled."""
        victim = 0
        while True:
            await asyncio.sleep(KILL_EVERY_S)
            await self._router.until_serving(2)
            self.kills_s.append(await self._router.kill(victim))
            victim = 1 - victim


def leaked_blocks(sample: Sample) -> float:
    """Of all engines that live."""
    return sample.total("router_kv_blocks_leaked")


async def r27(orders: Orders) -> RowResult:
    """See the module. `orders.n` is not used: the length is `orders.minutes`."""
    rng, began_s = orders.rng("R27"), time.monotonic()
    words = ("--models", orders.model, "--gpus", orders.gpus, "--kv-memory", "500M")
    with running(*words) as router:
        await router.until_serving(2)
        name = orders.model if "/" not in orders.model else orders.model.rstrip("/").split("/")[-1]
        requests = list(make_requests(Mix(name, SHORTEST, LONGEST, KINDS), REQUESTS, rng))
        log = Log(await learn(router.url, requests))
        load = Load(router.url, requests, log, orders.seed)
        # The first clients bring what is made once: it is no growth.
        async with load.running(STAYING, LEAVING):
            await asyncio.sleep(min(20.0, orders.minutes * 6))
        before = await Vitals.of(router)
        watch = Watch(router, log, orders.say)
        load = Load(router.url, requests, log, orders.seed + 1)
        async with load.running(STAYING, LEAVING):
            beside = [
                asyncio.create_task(watch.sample_on(orders.minutes)),
                asyncio.create_task(watch.kill_on()),
            ]
            done, _ = await asyncio.wait(
                beside, timeout=orders.minutes * 60, return_when="FIRST_EXCEPTION"
            )
            for task in beside:
                task.cancel()
            for task in done:
                task.result()
        log.check_now(running=False)
        after = await Vitals.of(router)
        watch.leaked = max(watch.leaked, leaked_blocks(await router.sample()))
        moved = (await router.sample()).total("router_requests_migrated_total")
    return RowResult(
        row="R27",
        title=f"{orders.minutes:g} minutes of {name}, an engine killed every 2",
        n=len(watch.kills_s),
        n_asked=int(orders.minutes * 60 // KILL_EVERY_S),
        duration_s=time.monotonic() - began_s,
        measures=(
            *_of_requests(log, moved),
            *_of_growth(watch, before, after),
            *_of_time(log, watch),
        ),
        findings=tuple(log.findings),
    )


def _of_requests(log: Log, moved: float) -> tuple[Measure, ...]:
    return (
        exactly("failed or wrong answers", len(log.findings)),
        noted("requests", log.num_sent),
        noted("of these clients left", log.num_left),
        noted("streams continued on another engine", moved),
    )


def _of_growth(watch: Watch, before: Vitals, after: Vitals) -> tuple[Measure, ...]:
    return (
        at_most("router's memory, for 10,000 requests", memory_slope(watch.memory), SLOPE_MB, "MB"),
        noted("router's memory, last sample less first", memory_growth(watch.memory), "MB"),
        at_most("descriptors, more", after.descriptors - before.descriptors, FEW_DESCRIPTORS),
        at_most("tasks, more", after.tasks - before.tasks, 0),
        exactly("leaked blocks", watch.leaked),
    )


def _of_time(log: Log, watch: Watch) -> tuple[Measure, ...]:
    answers = thirds((answer.end_s, answer.took_s) for answer in log.answers)
    gaps = thirds((gap.end_s, gap.took_s) for gap in log.gaps)
    longest_s = longest_pause(log.gaps, watch.kills_s)
    p50_s = percentile([answer.took_s for answer in log.answers], 50)
    return (
        noted("answers, median", p50_s, "s"),
        noted("answers, p99 of the first third", answers[0], "s"),
        at_most("answers, p99 of the last third over that", _ratio(*answers), FLAT, "×"),
        noted("gaps, p99 of the first third", gaps[0], "s"),
        noted("gaps, p99 of the last third over that", _ratio(*gaps), "×"),
        noted("longest gap at a kill", longest_s, "s"),
    )


def _ratio(first: float, last: float) -> float:
    return last / first if first else 0.0
