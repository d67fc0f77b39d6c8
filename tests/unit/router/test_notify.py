"""What the service manager hears, over a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.notify import Condition, Notifier

PID = 4711


class ServiceManager:
    """The other end: systemd's socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def heard(self) -> list[dict[str, str]]:
        """Since the last time."""
        messages: list[dict[str, str]] = []
        while True:
            try:
                text = self._socket.recv(65536).decode()
            except BlockingIOError:
                return messages
            messages.append(dict(line.split("=", 1) for line in text.splitlines()))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    name = f"@router-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "n")
    manager = ServiceManager(name)
    yield manager
    manager.close()


def test_each_message_is_heard(manager: ServiceManager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address}, PID)
    before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.ready()
    notifier.status("busy")
    notifier.status("busy")  # no news
    with notifier.reloading():
        pass
    notifier.stopping()
    ready, status, reloading, again, stopping = manager.heard()
    assert ready == again == {"READY": "1"}
    assert status == {"STATUS": "busy"}
    assert reloading["RELOADING"] == "1"
    assert int(reloading["MONOTONIC_USEC"]) >= before_us
    assert stopping == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "30000000"}
    notifier.close()
    notifier.ready()
    assert manager.heard() == []


def test_a_reload_that_fails_ends_too(manager: ServiceManager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address}, PID)
    with pytest.raises(ValueError, match="bad"), notifier.reloading():
        raise ValueError("bad")
    assert manager.heard()[-1] == {"READY": "1"}
    notifier.close()


def test_a_manager_that_does_not_read_costs_messages_only(manager: ServiceManager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address}, PID)
    for number in range(10_000):
        notifier.status(f"{number}")
    assert 0 < len(manager.heard()) < 10_000
    manager.close()
    notifier.ready()  # nobody is there
    notifier.close()


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "4711"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_the_watchdog_is_meant_for_one_process(environ: dict[str, str], watchdog_s: float) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "@nobody", **environ}, PID)
    assert notifier.watchdog_s == watchdog_s
    notifier.close()


async def test_the_watchdog_hears_of_a_server_that_lives(manager: ServiceManager) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "40000"}
    notifier = Notifier(environ, PID)
    state = Condition("starting", alive=True, status="starting")
    task = asyncio.create_task(notifier.keep_telling(lambda: state))

    async def heard() -> set[str]:
        await asyncio.sleep(0.1)
        manager.heard()  # what was said before the change
        await asyncio.sleep(0.2)
        return {key for message in manager.heard() for key in message}

    assert await heard() == {"WATCHDOG", "EXTEND_TIMEOUT_USEC"}
    state = Condition("ready", alive=True, status="ready")
    assert await heard() == {"WATCHDOG"}
    state = Condition("ready", alive=False, status="ready")
    assert await heard() == set()
    state = Condition("draining", alive=True, status="draining")
    assert await heard() == {"WATCHDOG", "EXTEND_TIMEOUT_USEC"}
    task.cancel()
    notifier.close()


async def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({}, PID)
    notifier.ready()
    await notifier.keep_telling(lambda: Condition("ready", alive=True, status=""))
    notifier.close()
