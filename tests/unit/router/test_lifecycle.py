"""Phases and the parts of the start; signals and the end are system tests."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.protocol import PROTOCOL_VERSION, Limits, Ready, encode
from router.acceptor import bind, raise_descriptor_limit, url_of
from router.admission import Admission, Gate, QueueBounds
from router.engine_process import EngineSpec
from router.errors import Overloaded
from router.fleet import Fleet
from router.lifecycle import Lifecycle
from router.link import IpcLink
from router.metrics import Metrics
from router.streams import StreamTable
from router.supervisor import Supervisor


def test_bind_and_url() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}"
        with socket.create_connection(("127.0.0.1", port), timeout=60):
            pass  # it listens already, though nobody accepts yet
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", port)


def test_descriptor_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        assert raise_descriptor_limit() == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class World:
    """Two replicas of different models, not started."""

    def __init__(self) -> None:
        table, metrics, link = StreamTable(), Metrics(), IpcLink()
        self.fleet = Fleet(["a", "b"], table, link, metrics, time.monotonic)
        config = EngineConfig(endpoint="", replica=0, epoch=0, model="m")
        specs = [EngineSpec(model, ("true",), {}, config) for model in ("a", "b")]
        supervisor = Supervisor(specs, self.fleet, metrics, on_fatal="wait", clock=time.monotonic)
        gates = [
            Gate(m, QueueBounds(1), lambda: self.fleet.serving_count("a"), time.monotonic)
            for m in "ab"
        ]
        self.admission = Admission(gates)
        self.life = Lifecycle(self.fleet, link, supervisor, self.admission, table, metrics)

    def load(self, index: int) -> None:
        self.fleet.start(index, 1, b"%d" % index)

    def ready(self, index: int) -> None:
        limits = Limits(100, 50, 32, 10, 4)
        self.fleet.receive(b"%d" % index, encode(Ready(1, PROTOCOL_VERSION, limits)))


async def test_started_when_every_first_load_is_over() -> None:
    w = World()
    assert not w.life.started
    w.load(0)
    w.load(1)
    w.ready(0)
    assert not w.life.started
    w.fleet.lose(1, "exit code 1")  # its first load is over, too
    assert w.life.started
    assert not w.life.ready  # nothing was announced yet
    w.life.phase = "ready"
    assert w.life.ready
    w.fleet.lose(0, "signal")
    assert w.life.started
    assert not w.life.ready


async def test_nothing_ever_ready_is_not_started() -> None:
    w = World()
    for index in (0, 1):
        w.load(index)
        w.fleet.lose(index, "exit code 1")
    assert not w.life.started


@pytest.mark.parametrize(("phase", "closes"), [("ready", False), ("draining", True)])
async def test_answers_while_stopping_close_the_connection(phase: Any, closes: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"x"})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing to receive")

    life = World().life
    life.phase = phase
    await life.closing(app)({"type": "http"}, receive, send)
    assert ((b"connection", b"close") in sent[0]["headers"]) is closes
    assert sent[1]["body"] == b"x"


async def wait_for_permit(world: World) -> None:
    async with world.admission.permit("b"):
        raise AssertionError("there is no permit to be had")


async def test_nobody_waits_for_a_model_that_was_given_up() -> None:
    world = World()
    world.load(1)
    waiting = asyncio.create_task(wait_for_permit(world))
    await asyncio.sleep(0)
    world.fleet.lose(1, "crash")
    await asyncio.sleep(0)
    assert not waiting.done()
    world.fleet.park(1, "five crashes")
    with pytest.raises(Overloaded, match="'b' is parked"):
        await asyncio.wait_for(waiting, 60)
