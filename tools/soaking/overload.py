"""R10 and R19: clients that leave at any moment, and clients that come back when they are told."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import httpx

from tests.history import Request, request
from tools.soaking.figures import Measure, RowResult, at_least, at_most, exactly, noted
from tools.soaking.hours import Vitals
from tools.soaking.load import Load, Log, http_client
from tools.soaking.requests import KINDS, Mix, make_requests
from tools.soaking.router import Router, paced, running
from tools.soaking.row import Orders

# Half of the clients find no place at once: what they leave is the queue.
LEAVING, PLACES = 16, 8
REQUESTS: Final = 60
SHORTEST, LONGEST = 20, 400
FEW_DESCRIPTORS: Final = 4  # connections that the operator's own scrapes keep open
IDLE_S: Final = 2.0  # asked: running = waiting = 0 within

# A crowd comes at once; a third of it finds neither a place nor room in the queue. The next one
# comes when all have their answers. (Under a load that never ends no time to wait is right: who
# was answered takes the place of who was told to return.)
CROWD: Final = 3 * PLACES
HONEST_PERCENT: Final = 90.0
ANSWER_TOKENS: Final = 40
TOKENS_PER_S: Final = 40.0


async def r10(orders: Orders) -> RowResult:
    """Requests aborted in the queue, in prefill, in decode and at their end."""
    rng, began_s = orders.rng("R10"), time.monotonic()
    words = ("--models", str(orders.tiny), "--max-concurrency", str(PLACES), "--threads", "1")
    progress = paced(orders.n, lambda text: orders.say(f"R10: {text} aborted"))
    mix = Mix(orders.tiny.name, SHORTEST, LONGEST, KINDS)
    requests = list(make_requests(mix, REQUESTS, rng))
    with running(*words) as router:
        await router.until_serving(1)
        log = Log({})
        await _abort(router, requests, log, min(200, orders.n), orders.seed)  # what is made once
        before, log = await Vitals.of(router), Log({})
        await _abort(router, requests, log, orders.n, orders.seed + 1, progress)
        idle_s = await router.until_idle()
        after, sample = await Vitals.of(router), await router.sample()
    return RowResult(
        row="R10",
        title="requests aborted at any moment",
        n=log.num_aborted,
        n_asked=orders.n_asked,
        duration_s=time.monotonic() - began_s,
        measures=(
            exactly("leaked blocks", sample.total("router_kv_blocks_leaked")),
            exactly("held blocks when idle", sample.total("router_kv_blocks_held")),
            at_most("tasks, more", after.tasks - before.tasks, 0),
            at_most("descriptors, more", after.descriptors - before.descriptors, FEW_DESCRIPTORS),
            at_most("nothing runs or waits after", idle_s, IDLE_S, "s"),
            noted("requests, with those that ended before their client left", log.num_left),
        ),
        findings=tuple(log.findings),
    )


async def _abort(
    router: Router,
    requests: list[Request],
    log: Log,
    count: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Until so many clients have left."""
    async with Load(router.url, requests, log, seed).running(0, LEAVING):
        while log.num_aborted < count:
            await asyncio.sleep(0.2)
            progress(log.num_aborted)


class Visit(NamedTuple):
    """One client's way to its answer: how often it was refused, and how quickly the first time."""

    refusals: int
    refused_s: float


async def r19(orders: Orders) -> RowResult:
    """Clients that find the server full, wait as long as they are told, and come back."""
    began_s, rng = time.monotonic(), orders.rng("R19")
    script = {"tokens_per_s": TOKENS_PER_S, "rules": [{"match": "*", "reply": "x", "repeat": True}]}
    limits = ("--max-concurrency", str(PLACES), "--max-queue", str(PLACES))
    words = ("--models", str(orders.tiny), *limits)
    progress = paced(orders.n, lambda text: orders.say(f"R19: {text} refused"))
    visits: list[Visit] = []
    with running(*words, script=script) as router:
        await router.until_serving(1)
        async with http_client(router.url) as http:
            while sum(visit.refusals > 0 for visit in visits) < orders.n:
                crowd = [_visit(http, orders.tiny.name, rng) for _ in range(CROWD)]
                visits += await asyncio.gather(*crowd)
                progress(sum(visit.refusals > 0 for visit in visits))
    told = [visit for visit in visits if visit.refusals]
    once = sum(visit.refusals == 1 for visit in told)
    return RowResult(
        row="R19",
        title="clients return when Retry-After says",
        n=len(told),
        n_asked=orders.n_asked,
        duration_s=time.monotonic() - began_s,
        measures=_honesty(visits, told, once),
    )


def _honesty(visits: list[Visit], told: list[Visit], once: int) -> tuple[Measure, ...]:
    share = 100 * once / max(1, len(told))
    slowest_ms = 1e3 * max((visit.refused_s for visit in told), default=0.0)
    return (
        at_least("accepted at the first return", share, HONEST_PERCENT, "%"),
        noted("requests", len(visits)),
        noted("most refusals of one", max((visit.refusals for visit in visits), default=0)),
        noted("slowest refusal", slowest_ms, "ms"),
    )


async def _visit(http: httpx.AsyncClient, model: str, chance: random.Random) -> Visit:
    """Asks until it is answered; each time it waits as told, and a little longer, as people do."""
    wanted = request(model=model, prompt="hello", max_tokens=ANSWER_TOKENS)
    refusals, refused_s = 0, 0.0
    headers = {"Content-Type": "application/json"}
    while True:
        began_s = time.monotonic()
        answer = await http.post(wanted.route, content=wanted.body, headers=headers)
        if answer.status_code == 200:
            return Visit(refusals, refused_s)
        if answer.status_code not in (429, 503) or "retry-after" not in answer.headers:
            raise ValueError(f"{answer.status_code} without Retry-After: {answer.text[:200]}")
        refusals += 1
        refused_s = refused_s or time.monotonic() - began_s
        await asyncio.sleep(float(answer.headers["retry-after"]) * (1 + 0.1 * chance.random()))
