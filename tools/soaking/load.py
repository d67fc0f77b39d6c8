"""Clients that keep asking, and when they saw what: for the rows that disturb a router under load.

Owns the clients' tasks and the times beside the history of their answers (`tests/history.py` proves
that history). Must not know what disturbs the router.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple

import httpx

from tests.history import Answer, Finish, History, Request, ask, undisturbed

PATIENCE_S: Final = 120.0  # for one answer: the router's own limits are shorter
LEAVES_WITHIN_S: Final = 2.0  # when an aborting client has had enough, at most
REST_S: Final = 0.1  # after a failure: a router that is gone must not be hammered


class Span(NamedTuple):
    """From one event of a client's stream to the next, or a whole request; monotonic seconds."""

    begin_s: float
    end_s: float

    @property
    def took_s(self) -> float:
        """Its length."""
        return self.end_s - self.begin_s


class Log(History):
    """A history with times. `findings` are the faults so far, from `check_now`."""

    def __init__(self, expected: Mapping[Request, Answer]) -> None:
        super().__init__()
        self.num_sent = 0
        self.num_left = 0  # by clients that leave, whether or not the answer was there already
        self.num_whole = 0  # of these, the answer was
        self.gaps: list[Span] = []  # between events of one stream
        self.answers: list[Span] = []
        self.findings: list[str] = []
        self._expected = expected
        self._began_s: dict[str, float] = {}
        self._latest_s: dict[str, float] = {}

    @property
    def finished(self) -> int:
        """Requests that are over: by an end, a failure, or because the client left."""
        return self.num_ended + self.num_failed + self.num_left

    @property
    def num_aborted(self) -> int:
        """Requests whose clients left before the answer was there."""
        return self.num_left - self.num_whole

    def sent(self, client: str, request: Request) -> None:
        super().sent(client, request)
        self.num_sent += 1
        self._began_s[client] = time.monotonic()
        self._latest_s.pop(client, None)

    def token(self, client: str, index: int, text: str, choice: int = 0) -> None:
        super().token(client, index, text, choice)
        now_s = time.monotonic()
        if (before_s := self._latest_s.get(client)) is not None:
            self.gaps.append(Span(before_s, now_s))
        self._latest_s[client] = now_s

    def ended(self, client: str, finish: Finish, usage: tuple[int, int]) -> None:
        super().ended(client, finish, usage)
        self.answers.append(Span(self._began_s[client], time.monotonic()))

    def check_now(self, *, running: bool = True) -> None:
        """Proves what is over, and forgets it; `running` False: nothing may still run."""
        self.findings += self.check(self._expected.__getitem__, running=running)


async def learn(url: str, requests: Sequence[Request]) -> dict[Request, Answer]:
    """The undisturbed answers, asked one after the other."""
    async with http_client(url) as http:
        return {one: await undisturbed(http, one) for one in requests}


class Load:
    """Clients in a closed loop: each asks again as soon as it has its answer."""

    def __init__(self, url: str, requests: Sequence[Request], log: Log, seed: int) -> None:
        self._url = url
        self._requests = requests
        self._log = log
        self._seed = seed
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self, staying: int, leaving: int = 0) -> AsyncIterator[None]:
        """`staying` clients that wait for their answers and `leaving` ones that don't, meanwhile.

        At its end each one gets the answer that it waits for.
        """
        async with http_client(self._url) as http, asyncio.TaskGroup() as group:
            for number in range(staying + leaving):
                rng = random.Random(f"{self._seed}/{number}")
                run = self._stay if number < staying else self._leave
                group.create_task(run(http, f"client {self._seed}/{number}", rng))
            try:
                yield
            finally:
                self._stop.set()

    async def _stay(self, http: httpx.AsyncClient, name: str, rng: random.Random) -> None:
        while not self._stop.is_set():
            failed = self._log.num_failed
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await ask(self._log, name, http, rng.choice(self._requests))
            except TimeoutError:
                self._log.failed(name, f"no whole answer within {PATIENCE_S:g} s")
            if self._log.num_failed > failed:
                await asyncio.sleep(REST_S)

    async def _leave(self, http: httpx.AsyncClient, name: str, rng: random.Random) -> None:
        while not self._stop.is_set():
            wanted = rng.choice(self._requests)
            self._log.num_sent += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVES_WITHIN_S * rng.random() ** 2):
                    failure = await read_and_forget(http, wanted)
                self._log.num_whole += not failure
                if failure:
                    self._log.findings.append(f"{name}, who leaves: {failure}")
                    await asyncio.sleep(REST_S)
            self._log.num_left += 1


async def read_and_forget(http: httpx.AsyncClient, wanted: Request) -> str:
    """One answer that nobody looks at; the sentence if it was none."""
    try:
        headers = {"Content-Type": "application/json"}
        call = http.stream("POST", wanted.route, content=wanted.body, headers=headers)
        async with call as response:
            body = [piece async for piece in response.aiter_bytes()]
        if response.status_code != 200:
            return f"{response.status_code} {b''.join(body)[:300]!r}"
    except httpx.HTTPError as error:
        return f"{type(error).__name__} {error}"
    return ""


@asynccontextmanager
async def http_client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """With room for many connections; how long a client waits is its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=url, timeout=None, limits=limits, trust_env=False
    ) as client:
        yield client
