"""Engines die or are replaced under load, and every client's history is that of an undisturbed run.

Rows R1, R3 to R6, R8 and R17 of the acceptance table with few kills; reports A6, A7, A10, A11. The
fake engine plays the model. N is read from the constants here; tools/soak has the long rows.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.history import Answer, History, Request, ask, request, undisturbed
from tests.router_process import RouterProcess, Start, tiny_model, until

pytestmark = pytest.mark.slow

KILLS = 4  # of R1: each takes its back-off, and five of one replica in a minute park it
BOTH_KILLED = 3  # times, R5
NORMAL = 50  # requests beside the query of death, R8
LIMIT_S = 60.0  # against hangs

TEXT = "The quick brown fox jumps over the lazy dog. " * 4
OTHER = "Pack my box with five dozen liquor jugs, é😊! " * 4


def script(*rules: dict[str, Any], **fields: Any) -> dict[str, Any]:
    usual = [{"match": {"contains": "other"}, "reply": OTHER}, {"match": "*", "reply": TEXT}]
    return {"rules": [*rules, *usual], "tokens_per_s": 200, **fields}


def asking(prompt: str, *, stream: bool = True, **fields: Any) -> Request:
    return request(prompt=prompt, model="tiny", max_tokens=500, stream=stream, **fields)


class Gaps:
    """The longest pause between two lines of a stream. A client that measures instead of checks."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def read(self, http: httpx.AsyncClient, asked: Request) -> None:
        async with http.stream("POST", asked.route, content=asked.body) as response:
            last_s = None
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    now = time.monotonic()
                    self.longest_s = max(self.longest_s, now - (last_s or now))
                    last_s = now


class Load:
    """Clients that never stop asking, over one router, and what they got."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.history = History()
        self.expected: dict[Request, Answer] = {}
        self.gaps = Gaps()
        self._stopping = asyncio.Event()

    async def learn(self, requests: Sequence[Request]) -> None:
        """The undisturbed answers."""
        for asked in requests:
            if asked not in self.expected:
                self.expected[asked] = await undisturbed(self.http, asked)

    async def client(self, name: str, requests: Sequence[Request]) -> None:
        at = 0
        while not self._stopping.is_set():
            await ask(self.history, name, self.http, requests[at % len(requests)])
            at += 1

    async def observer(self, asked: Request) -> None:
        while not self._stopping.is_set():
            await self.gaps.read(self.http, asked)

    @asynccontextmanager
    async def running(self, streaming: int = 8, plain: int = 2) -> AsyncIterator[None]:
        """Leaving the block, each client ends its request, and all must be as it should."""
        streamed = [asking("one"), asking("the other", logprobs=1)]
        whole = [asking("one", stream=False), asking("the other", stream=False)]
        await self.learn([*streamed, *whole])
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            for number in range(streaming):
                group.create_task(self.client(f"stream {number}", streamed))
            for number in range(plain):
                group.create_task(self.client(f"plain {number}", whole))
            for _ in range(2):  # about one on each replica
                group.create_task(self.observer(streamed[0]))
            yield
            self._stopping.set()
        assert self.history.check(self.expected.__getitem__) == []


@asynccontextmanager
async def client_of(router: RouterProcess) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Content-Type": "application/json"}
    limits = httpx.Limits(max_connections=None)
    url = await asyncio.to_thread(lambda: router.url)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=LIMIT_S, limits=limits, trust_env=False
    ) as http:
        yield http


async def metric(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in found)


async def until_running(http: httpx.AsyncClient, count: int) -> None:
    """Until so many requests are on engines."""
    async with asyncio.timeout(LIMIT_S):
        while await metric(http, "router_requests_running") < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_ready(router: RouterProcess, count: int) -> None:
    """Until engines became ready so many times in all."""
    await until(lambda: len(router.events("engine_ready")) >= count, LIMIT_S)


async def test_r1_r3_kills_under_load_cost_nobody_anything(start: Start) -> None:
    router = start(script=script(), gpus="cpu,cpu")
    async with client_of(router) as http:
        load = Load(http)
        async with load.running():
            for kill in range(KILLS):
                await until_ready(router, 2 + kill)
                await asyncio.sleep(0.2 + 0.05 * kill)
                os.kill(router.engine_pid(kill % 2), signal.SIGKILL)
            await until_ready(router, 2 + KILLS)
        assert await metric(http, "router_requests_migrated_total") > 0
        assert await metric(http, "router_requests_quarantined_total") == 0
    assert len(router.events("engine_died")) == KILLS
    sys.stdout.write(f"R3: {KILLS} kills, longest pause {load.gaps.longest_s:.3f} s\n")
    assert load.gaps.longest_s < 30, "asked for: 1 s and the prefill"


async def test_a6_r4_the_only_replica_is_killed(start: Start) -> None:
    """Streams go on after the restart, newcomers queue, and the probes tell the truth."""
    router = start(script=script(load_s=0.5))
    async with client_of(router) as http:
        history, asked, late = History(), asking("one"), asking("the other")
        expected = {asked: await undisturbed(http, asked), late: await undisturbed(http, late)}
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(ask(history, f"early {number}", http, asked))
            await until_running(http, 4)
            os.kill(router.engine_pid(0), signal.SIGKILL)
            await until(lambda: bool(router.events("engine_died")), LIMIT_S)
            assert (await http.get("/health/ready")).status_code == 503
            assert (await http.get("/health/live")).status_code == 200
            for number in range(4):
                group.create_task(ask(history, f"late {number}", http, late))
        assert history.check(expected.__getitem__) == []
        assert (await http.get("/health/ready")).status_code == 200
    assert len(router.events("engine_died")) == 1


async def test_r5_a11_both_are_killed_at_once(start: Start) -> None:
    router = start(script=script(), gpus="cpu,cpu")
    async with client_of(router) as http:
        load = Load(http)
        async with load.running():
            for kill in range(BOTH_KILLED):
                await until_ready(router, 2 * (kill + 1))
                await asyncio.sleep(0.3)
                for replica in (0, 1):
                    os.kill(router.engine_pid(replica), signal.SIGKILL)
            await until_ready(router, 2 * (BOTH_KILLED + 1))
        assert await metric(http, "router_requests_quarantined_total") == 0
    assert len(router.events("engine_died")) == 2 * BOTH_KILLED


async def test_r6_a7_a_frozen_engine(start: Start) -> None:
    """Stopped and going on within the time limit: nothing. Stopped for good: its streams move."""
    router = start("--hang-timeout", "4", script=script(), gpus="cpu,cpu")
    async with client_of(router) as http:
        load = Load(http)
        async with load.running(streaming=6, plain=2):
            await asyncio.sleep(0.3)
            os.kill(router.engine_pid(0), signal.SIGSTOP)
            await asyncio.sleep(0.5)
            os.kill(router.engine_pid(0), signal.SIGCONT)
            await asyncio.sleep(0.5)
            assert router.events("engine_died") == []
            os.kill(router.engine_pid(0), signal.SIGSTOP)
            await until(lambda: bool(router.events("engine_died")), LIMIT_S)
            await until_ready(router, 3)
        (report,) = router.events("engine_died")
        assert (report["replica"], report["cause"]) == (0, "hang")
        assert report["in_flight"] > 0
        assert report["silent_s"] >= 4
        assert await metric(http, "router_requests_quarantined_total") == 0


async def replica(http: httpx.AsyncClient, index: int) -> dict[str, Any]:
    """Its row of the operator's table."""
    rows: list[dict[str, Any]] = (await http.get("/admin/replicas")).json()["data"]
    return next(row for row in rows if row["id"] == index)


async def until_state(http: httpx.AsyncClient, index: int, state: str, epoch: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        while (row := await replica(http, index))["epoch"] < epoch or row["state"] != state:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_r17_a_rolling_restart_under_load(start: Start, record_property: Any) -> None:
    """Both replicas, one after the other, as an operator's script does it."""
    router = start(script=script(load_s=0.3), gpus="cpu,cpu")
    async with client_of(router) as http:
        load = Load(http)
        async with load.running():
            for index in (0, 1):
                await asyncio.sleep(0.3)
                old = await replica(http, index)
                began_s = time.monotonic()
                answer = await http.post(f"/admin/replicas/{index}/restart")
                row = answer.json()
                assert (answer.status_code, row["state"], row["running"]) == (200, "draining", 0)
                record_property(f"hand_over_{index}_s", time.monotonic() - began_s)
                await until_state(http, index, "serving", old["epoch"] + 1)
                new = await replica(http, index)
                assert new["pid"] != old["pid"]
                assert (new["restarts"], new["crashes_in_a_row"], new["crashes"]) == (1, 0, [])
        moved = await metric(http, 'router_requests_migrated_total{reason="handed_over"}')
        assert moved == await metric(http, "router_requests_migrated_total") > 0
    assert router.events("engine_died") == []
    assert [event["action"] for event in router.events("operator")] == ["restart"] * 2
    record_property("longest_pause_s", load.gaps.longest_s)
    assert load.gaps.longest_s < 30


async def test_r17_all_are_restarted_at_once(start: Start) -> None:
    """What no replica can take meanwhile waits, streams in their middle too."""
    router = start(script=script(), gpus="cpu,cpu")
    async with client_of(router) as http:
        load = Load(http)
        async with load.running(streaming=4, plain=1):
            await asyncio.sleep(0.3)
            for index in (0, 1):
                assert (await http.post(f"/admin/replicas/{index}/restart")).is_success
            for index in (0, 1):
                await until_state(http, index, "serving", 2)
    assert router.events("engine_died") == []


async def test_r17_a_drained_replica_stays_away_until_it_is_restarted(start: Start) -> None:
    router = start(script=script(), gpus="cpu,cpu")
    async with client_of(router) as http:
        load = Load(http)
        async with load.running(streaming=4, plain=1):
            await asyncio.sleep(0.3)
            assert (await http.post("/admin/replicas/0/drain")).is_success
            await until_state(http, 0, "parked", 1)
            row = await replica(http, 0)
            assert (row["pid"], row["reason"]) == (None, "drained by the operator")
            assert (await http.get("/health/ready")).status_code == 200
            assert (await http.post("/admin/replicas/0/restart")).is_success
            await until_state(http, 0, "serving", 2)
    assert router.events("engine_died") == []


@pytest.mark.parametrize("at_token", [0, 5])
async def test_r8_a_query_of_death(start: Start, at_token: int) -> None:
    """At most two engines die, only the guilty one fails, and it is refused from then on."""
    fault = {"kind": "crash", "how": "segv", "at_token": at_token}
    rule = {"match": {"contains": "poison"}, "reply": TEXT, "faults": [fault]}
    router = start(script=script(rule), gpus="cpu,cpu")
    async with client_of(router) as http:
        history = History()
        asked = [asking(f"the other {n:02}", stream=n % 5 > 0) for n in range(NORMAL)]
        answers = {}
        for stream in (True, False):
            answers[stream] = await undisturbed(http, asking("the other 00", stream=stream))
        poison = asking("poison", stream=False)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            for number, normal in enumerate(asked):
                group.create_task(ask(history, f"normal {number}", http, normal))
                await asyncio.sleep(0.01)
                if number == NORMAL // 2:
                    killing = group.create_task(http.post(poison.route, content=poison.body))
        assert history.check(lambda r: answers['"stream": true' in r.body]) == []
        answer = killing.result()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "request_quarantined"
        assert len(router.events("engine_died")) <= 2
        await until_ready(router, 4)
        for stream in (False, True):
            again = await http.post(poison.route, content=asking("poison", stream=stream).body)
            assert again.status_code == 500
            assert again.json()["error"]["code"] == "request_quarantined"
        assert (await undisturbed(http, asking("the other 00"))) == answers[True]
        assert await metric(http, "router_requests_quarantined_total") == 3
    assert len(router.events("engine_died")) <= 2


async def test_a10_refusals_are_no_failures_and_are_not_tried_again(start: Start) -> None:
    router = start("--max-queue", "2", "--max-concurrency", "1", script=script(tokens_per_s=100))
    async with client_of(router) as http:
        invalid = '{"model": "tiny", "prompt": "x", "max_tokens": -1}'
        answers = [await http.post("/v1/completions", content=invalid) for _ in range(200)]
        assert {answer.status_code for answer in answers} == {400}
        body = asking("one", stream=False).body
        async with asyncio.timeout(LIMIT_S):
            crowd = await asyncio.gather(
                *(http.post("/v1/completions", content=body) for _ in range(10))
            )
        codes = sorted(answer.status_code for answer in crowd)
        assert codes == [200] * 3 + [503] * 7
        assert all(answer.headers["retry-after"] for answer in crowd if answer.is_error)
        prompts = await metric(http, "router_engine_prompt_tokens_total")
        assert prompts == 3 * len("one")  # what was refused reached no engine, not even once
        assert await metric(http, "router_requests_migrated_total") == 0
    assert router.events("engine_died") == []


async def test_a11_one_silent_engine_occupies_nothing_that_others_need(
    start: Start, tmp_path: Any
) -> None:
    folder = tiny_model(tmp_path)
    words = ("--models", f"silent={folder},tiny={folder}", "--max-concurrency", "4")
    router = start("--hang-timeout", "60", *words, script=script(), gpus="cpu,cpu")
    async with client_of(router) as http:
        asked = asking("one")
        answer = await undisturbed(http, asked)
        os.kill(router.engine_pid(0), signal.SIGSTOP)
        waiting = '{"model": "silent", "prompt": "x", "max_tokens": 9, "stream": true}'
        async with asyncio.TaskGroup() as group:
            hanging = [
                group.create_task(http.post(asked.route, content=waiting)) for _ in range(12)
            ]
            await until_running(http, 4)
            for _ in range(3):
                assert await undisturbed(http, asked) == answer
            assert not any(task.done() for task in hanging)
            os.kill(router.engine_pid(0), signal.SIGCONT)
    assert {task.result().status_code for task in hanging} == {200}
    assert router.events("engine_died") == []
