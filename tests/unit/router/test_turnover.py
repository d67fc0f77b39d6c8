"""Changes of models step by step: a real fleet and admission, engines that start at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import protocol
from engine.protocol import Limits, Ready
from router.admission import Admission, Ask, Gate, QueueBounds
from router.arguments import parse
from router.config import RouterConfig
from router.errors import ModelNotFound, ModelUnloaded, Overloaded, RequestError, StartError
from router.fleet import Fleet, SendResult
from router.memory import EnginePlan
from router.metrics import Metrics
from router.planning import PlannedModel, Running, Site, plan_models
from router.roster import Roster, Works
from router.streams import StreamTable
from router.supervisor import EngineSpec
from router.text.served import ModelTable, ServedModel
from router.turnover import Turnover
from router.waiting import hold_permit
from tests.router_process import tiny_model, until
from tools.tiny_model import VOCAB_SIZE

LIMITS = Limits(512, VOCAB_SIZE, 32, 100, 64)


class Silent:
    """A link that takes everything."""

    def send(self, identity: bytes, frame: bytes) -> SendResult:
        return "sent"


@dataclass
class Machines:
    """Processes that are ready at once, or whose load fails; `alive` are their replicas."""

    fleet: Fleet
    fails: Callable[[EngineSpec], bool] = lambda spec: False
    alive: set[int] = field(default_factory=set)
    most: int = 0

    def add(self, index: int, spec: EngineSpec) -> None:
        epoch = spec.config.epoch + 1
        identity = f"{index}-{epoch}".encode()
        self.fleet.start(index, epoch, identity)
        if self.fails(spec):
            self.fleet.lose(index, "no such layer")
            return
        self.alive.add(index)
        self.most = max(self.most, len(self.alive))
        ready = Ready(epoch, protocol.PROTOCOL_VERSION, LIMITS)
        self.fleet.receive(identity, protocol.encode(ready))

    async def retire(self, index: int, grace_s: float, *, for_now: bool = False) -> None:
        await asyncio.sleep(0)
        self.alive.discard(index)


@dataclass
class Plans:
    """The planner: `words` is the command line that is read at a reload."""

    words: list[str]
    machines: Machines
    room: int | None = None  # engines that fit at once

    def read(self) -> RouterConfig:
        return parse(self.words, {}).config

    def plan(self, config: RouterConfig, running: Sequence[Running]) -> list[PlannedModel]:
        return plan_models(config, Site({}, "ipc:///none"), running)

    def lack(self, engines: Sequence[EnginePlan], device: str) -> str:
        if self.room is None or len(self.machines.alive) + len(engines) <= self.room:
            return ""
        return "cpu needs 2 GB, 1 GB are free"


@dataclass
class Server:
    """A server without a process."""

    plans: Plans
    works: Works
    roster: Roster
    turnover: Turnover

    @property
    def fleet(self) -> Fleet:
        return self.works.fleet

    @property
    def machines(self) -> Machines:
        return self.plans.machines

    @property
    def admission(self) -> Admission:
        return self.works.admission

    @property
    def table(self) -> ModelTable:
        return self.works.table

    async def ask(self, model: str, served: ServedModel | None = None) -> str:
        """What a request that does nothing gets: "ok" or the error's code."""
        try:
            found = served or self.table.find(model)
            wait = hold_permit(self.fleet, self.admission, Metrics(), found, None, ASK)
            async with asyncio.timeout(5), wait:
                return "ok"
        except RequestError as error:
            return str(error.code)


ASK = Ask()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Callable[..., Server]]:
    tasks: list[asyncio.Task[None]] = []

    def make(*models: str, gpus: str = "cpu", extra: Sequence[str] = ()) -> Server:
        words = ["--models", ",".join(models), "--gpus", gpus, "--drain-timeout", "0.2", *extra]
        config = parse(words, {}).config
        planned = plan_models(config, Site({}, "ipc:///none"))
        streams, table = StreamTable(), ModelTable([model.served for model in planned])
        keys = [model.served.key for model in planned for _ in model.engines]
        fleet = Fleet(keys, streams, Silent(), Metrics(), time.monotonic)
        machines = Machines(fleet)

        def gates(model: ServedModel) -> tuple[Gate, None]:
            def permits() -> int:
                return fleet.serving_count(model.key) * 4

            return Gate(model.key, QueueBounds(64), permits, time.monotonic), None

        admission = Admission([gates(model.served)[0] for model in planned])
        fleet.subscribe(lambda replica: admission.refresh(replica.model))
        plans = Plans(words, machines)
        works = Works(fleet, machines, admission, table, streams, plans, gates)
        roster = Roster(works, config.limits, planned, time.monotonic)
        turnover = Turnover(roster, plans, config, lambda _config, _models: None)
        made = Server(plans, works, roster, turnover)
        specs = [engine.spec for model in planned for engine in model.engines]
        for index, spec in enumerate(specs):
            machines.add(index, spec)
        tasks.append(asyncio.ensure_future(roster.run()))
        return made

    yield make
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_without_memory_for_both_old_replicas_make_room(
    site: Callable[..., Server], tmp_path: Path
) -> None:
    a, b = tiny_model(tmp_path), other_model(tmp_path)
    s = site(f"m={a}", gpus="cpu,cpu")
    s.plans.room = 2
    old = s.table.find("m")
    stream = s.fleet.open([1, 2], 8)
    assert s.fleet.submit(stream, 1, ORDERS)
    s.plans.words[1] = f"m={b}"
    reload = asyncio.ensure_future(s.turnover.reload())
    await until(lambda: stream.lost)  # replica 1 made room; a flow would go on on replica 0
    assert stream.suspicion.weight == 0
    s.fleet.close(stream)
    await reload
    assert s.machines.most == 2
    assert s.machines.alive == {2, 3}
    assert (s.table.find("m").version, s.table.find("m").key == old.key) == (2, False)
    assert await s.ask("m") == "ok"
    assert await s.ask("m", old) == "server_is_overloaded"  # it came between: try again


async def test_with_room_for_one_newcomers_wait_for_the_exchange(
    site: Callable[..., Server], tmp_path: Path
) -> None:
    s = site(f"m={tiny_model(tmp_path)}")
    s.plans.room = 1
    s.plans.words[1] = f"m={other_model(tmp_path)}"
    old = s.table.find("m")
    async with s.admission.permit(old.key):  # somebody still works on the old one
        reload = asyncio.ensure_future(s.turnover.reload())
        await until(lambda: s.table.find("m") is not old)
        waiter = asyncio.ensure_future(s.ask("m"))
        await asyncio.sleep(0.02)
        assert not waiter.done()
    assert await waiter == "ok"
    await reload
    assert s.machines.most == 1


async def test_an_exchange_that_does_not_load_leaves_the_old_one(
    site: Callable[..., Server], tmp_path: Path
) -> None:
    s = site(f"m={tiny_model(tmp_path)}")
    s.machines.fails = lambda spec: spec.config.replica > 0
    s.plans.words[1] = f"m={other_model(tmp_path)}"
    with pytest.raises(StartError, match="'m' does not load: no such layer"):
        await s.turnover.reload()
    assert (await s.ask("m"), s.machines.alive, len(s.fleet.replicas)) == ("ok", {0}, 1)
    assert s.table.find("m").version == 1
    s.machines.fails = lambda spec: False
    assert [change.kind for change in (await s.turnover.reload()).models] == ["replace"]
    assert (await s.ask("m"), s.machines.alive) == ("ok", {2})


async def test_a_newcomer_takes_the_memory_of_one_that_leaves(
    site: Callable[..., Server], tmp_path: Path
) -> None:
    a = tiny_model(tmp_path)
    s = site(f"m={a}")
    s.plans.room = 1
    s.plans.words[1] = f"n={a},m={a}"
    with pytest.raises(StartError, match="1 GB are free"):
        await s.turnover.reload()
    assert (s.table.names, s.machines.alive) == (("m",), {0})
    s.plans.words[1] = f"n={a}"
    await s.turnover.reload()
    assert (s.table.names, await s.ask("n"), await s.ask("m")) == (
        ("n",),
        "ok",
        "model_not_found",
    )


async def test_unloading_cuts_who_outlives_the_drain_limit(
    site: Callable[..., Server], tmp_path: Path
) -> None:
    s = site(f"m={tiny_model(tmp_path)}")
    stream = s.fleet.open([1], 8)
    assert s.fleet.submit(stream, 0, ORDERS)
    async with s.admission.permit("m"):
        view = await s.roster.unload("m")
    assert view.state == "unloaded"
    assert stream.finish is not None
    assert (stream.finish.reason, stream.lost) == ("abort", False)
    s.fleet.close(stream)
    assert await s.ask("m") == "model_unloaded"
    s.roster.tick()
    assert s.machines.alive == set()


async def test_a_sleeper_without_memory_refuses_with_numbers(
    site: Callable[..., Server], tmp_path: Path
) -> None:
    s = site(f"m={tiny_model(tmp_path)}", extra=["--idle-unload", "0.01"])
    await until(lambda: not s.machines.alive)
    s.plans.room = 0
    with pytest.raises(Overloaded, match="cannot be loaded now: cpu needs 2 GB, 1 GB are free"):
        async with hold_permit(s.fleet, s.admission, Metrics(), s.table.find("m"), None, ASK):
            pass
    with pytest.raises(StartError, match="1 GB are free"):
        await s.roster.load("m")
    s.plans.room = 1
    assert await s.ask("m") == "ok"


async def test_r30_a13_any_order_of_events_answers_everyone(
    site: Callable[..., Server], tmp_path: Path
) -> None:
    """Requests, rest, unload, load, reload and deaths in a seeded random order."""
    import random

    a, b = tiny_model(tmp_path), other_model(tmp_path)
    s = site(f"m={a}", extra=["--idle-unload", "0.01"])
    dice = random.Random(13)

    async def work() -> str:
        try:
            model = s.table.find("m")
            async with hold_permit(s.fleet, s.admission, Metrics(), model, None, ASK):
                await asyncio.sleep(dice.random() / 100)
                return "ok"
        except (Overloaded, ModelUnloaded, ModelNotFound) as error:
            return str(error.code)

    async def reload() -> None:
        s.plans.words[1] = f"m={dice.choice([a, b])}"
        await s.turnover.reload()

    def die() -> None:
        serving = [r for r in s.fleet.replicas if r.state == "serving"]
        for replica in serving:
            s.fleet.lose(replica.index, "the test says so")
            entry = s.roster.find("m")
            if replica.index in entry.engines:
                spec = entry.engines[replica.index].spec
                orders = msgspec.structs.replace(
                    spec.config, replica=replica.index, epoch=replica.epoch
                )
                s.machines.add(replica.index, spec._replace(config=orders))

    pending: list[asyncio.Task[Any]] = []
    for _ in range(200):
        match dice.randrange(12):
            case 0:
                pending.append(asyncio.ensure_future(s.roster.unload("m")))
            case 1 | 2:
                pending.append(asyncio.ensure_future(s.roster.load("m")))
            case 3:
                pending.append(asyncio.ensure_future(reload()))
            case 4:
                die()
            case _:
                pending.append(asyncio.ensure_future(work()))
        await asyncio.sleep(dice.choice([0, 0.002, 0.02]))
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*pending)
    told = {answer for answer in answers if isinstance(answer, str)}
    assert "ok" in told
    assert told <= {"ok", "server_is_overloaded", "model_unloaded", "model_not_found"}
    await s.roster.load("m")
    assert await s.ask("m") == "ok"
    assert s.admission.active == 0
    assert len(s.fleet.replicas) == 1


def other_model(folder: Path) -> Path:
    (folder / "other").mkdir(exist_ok=True)
    return tiny_model(folder / "other")


@dataclass(frozen=True)
class _Orders:
    sampling: protocol.Sampling = field(default_factory=protocol.Sampling)
    stop_ids: tuple[int, ...] = ()
    salt: bytes = b""
    priority: int = 0
    grammar: str = ""


ORDERS = _Orders()
