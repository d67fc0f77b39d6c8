"""R1, R2, R5: engines are killed under load, and no client may notice.

A replica that crashes five times without a minute of service is parked, by design. So the kills are
spread over several lives of a router, a few for each replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from tests.history import Answer, Request
from tools.soaking.figures import Measure, RowResult, at_most, exactly, longest_pause, noted
from tools.soaking.load import Load, Log, learn
from tools.soaking.requests import KINDS, Mix, make_requests
from tools.soaking.router import Router, paced, running
from tools.soaking.row import Orders

KILLS_OF_A_REPLICA: Final = 3  # in one life of the router
STREAMING, PLAIN = 8, 2
REQUESTS, FEW_REQUESTS = 48, 8  # of a full run, of a short one
PAUSE_S: Final = 1.0  # asked of a moved stream, beside the prefill of its context
# Long enough that a kill finds most clients within an answer of the tiny model.
SHORTEST, LONGEST = 60, 600
# On a card an answer would else depend on who is in its batch.
EXACT: Final = ("--dtype", "float32")
WHOLE: Final = ("plain", "echo")  # kinds that are not streamed
BASIC: Final = ("greedy", "seeded", "greedy", "seeded", "plain")


class Killing:
    """One row's run: the requests with their undisturbed answers, and what was counted."""

    def __init__(self, orders: Orders, row: str, kinds: tuple[str, ...]) -> None:
        self.orders = orders
        self.rng = orders.rng(row)
        mix = Mix(orders.tiny.name, SHORTEST, LONGEST, kinds)
        count = min(REQUESTS, max(FEW_REQUESTS, len(kinds), orders.n))
        self.requests = make_requests(mix, count, self.rng)
        self.expected: dict[Request, Answer] = {}
        self.log = Log(self.expected)
        self.kills_s: list[float] = []
        self.began_s = time.monotonic()
        self.moved = 0.0
        self.leaked = 0.0
        self.recoveries_s: list[float] = []
        self.progress = paced(orders.n, lambda text: orders.say(f"{row}: {text} kills"))

    def words(self) -> tuple[str, ...]:
        """The command line of its routers."""
        orders = self.orders
        return ("--models", str(orders.tiny), "--gpus", orders.gpus, "--threads", "1", *EXACT)

    @property
    def done(self) -> int:
        """Kills so far."""
        return len(self.kills_s)

    async def learn(self, router: Router) -> None:
        """The undisturbed answers, in the row's first life."""
        if not self.expected:
            self.expected.update(await learn(router.url, list(self.requests)))

    def load(self, router: Router, requests: list[Request]) -> Load:
        """Clients for this router."""
        return Load(router.url, requests, self.log, self.rng.randrange(2**31))

    async def settle(self, router: Router) -> None:
        """After the load: nothing runs, nothing was lost."""
        try:
            await router.until_idle()
        except TimeoutError:
            self.log.findings.append("requests or blocks are held though nobody asks")
        sample = await router.sample()
        self.moved += sample.total("router_requests_migrated_total")
        self.leaked += sample.total("router_kv_blocks_leaked")

    def result(self, row: str, title: str, *more: Measure) -> RowResult:
        """Its line of the table."""
        log = self.log
        log.check_now(running=False)
        return RowResult(
            row=row,
            title=title,
            n=self.done,
            n_asked=self.orders.n_asked,
            duration_s=time.monotonic() - self.began_s,
            measures=(
                exactly("failed or wrong answers", len(log.findings)),
                noted("requests", log.num_sent),
                noted("answers, each compared with the undisturbed one", log.num_ended),
                noted("streams continued on another engine", self.moved),
                exactly("leaked blocks", self.leaked),
                noted("longest gap at a kill", longest_pause(log.gaps, self.kills_s), "s"),
                *more,
            ),
            findings=tuple(log.findings),
        )


async def r1(orders: Orders, row: str = "R1", kinds: tuple[str, ...] = BASIC) -> RowResult:
    """SIGKILL of one of two replicas at random moments, under streaming and plain clients."""
    run = Killing(orders, row, kinds)
    while run.done < orders.n:
        with running(*run.words()) as router:
            await router.until_serving(2)
            await run.learn(router)
            await _one_life(run, router)
    within = [gap for gap in _pauses(run) if gap <= PAUSE_S]
    share = 100 * len(within) / max(1, len(run.kills_s))
    title = "one of two engines killed" + (", every kind of request" if row == "R2" else "")
    return run.result(row, title, noted("kills with all gaps within 1 s", share, "%"))


async def r2(orders: Orders) -> RowResult:
    """The same with grammars, tools, n = 2, logprobs, stop strings and echo."""
    return await r1(orders, "R2", KINDS)


async def _one_life(run: Killing, router: Router) -> None:
    """A few kills of each replica, each when both serve."""
    victims = [replica for replica in (0, 1) for _ in range(KILLS_OF_A_REPLICA)]
    run.rng.shuffle(victims)
    victims = victims[: run.orders.n - run.done]
    whole = [one for one, kind in run.requests.items() if kind in WHOLE]
    streamed = [one for one in run.requests if one not in whole]
    async with (
        run.load(router, streamed).running(STREAMING),
        run.load(router, whole).running(PLAIN),
    ):
        for victim in victims:
            await router.until_serving(2)
            await asyncio.sleep(run.rng.uniform(0.1, 1.5))
            run.kills_s.append(await router.kill(victim))
            run.progress(run.done)
        await asyncio.sleep(run.rng.uniform(0.5, 1.0))
    await run.settle(router)


def _pauses(run: Killing) -> list[float]:
    """The longest gap at each kill."""
    return [longest_pause(run.log.gaps, [at_s]) for at_s in run.kills_s]


async def r5(orders: Orders) -> RowResult:
    """Both engines are killed at once, while clients go on: the router recovers by itself."""
    run = Killing(orders, "R5", BASIC)
    while run.done < orders.n:
        with running(*run.words()) as router:
            await router.until_serving(2)
            await run.learn(router)
            async with run.load(router, list(run.requests)).running(STREAMING + PLAIN):
                for _ in range(min(KILLS_OF_A_REPLICA, orders.n - run.done)):
                    await router.until_serving(2)
                    await asyncio.sleep(run.rng.uniform(0.1, 1.5))
                    await _kill_both(run, router)
            await run.settle(router)
    slowest_s = max((answer.took_s for answer in run.log.answers), default=0.0)
    return run.result(
        "R5",
        "both engines killed at once",
        noted("longest until one serves again", max(run.recoveries_s, default=0.0), "s"),
        at_most("longest answer", slowest_s, 60, "s"),
    )


async def _kill_both(run: Killing, router: Router) -> None:
    run.kills_s.append(min(await asyncio.gather(*map(router.kill, (0, 1)))))
    run.progress(run.done)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            while await router.serving():  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.01)
    try:
        run.recoveries_s.append(await router.until_serving(1))
    except TimeoutError:
        run.log.findings.append("the router did not recover")
