"""The ROUTER socket: private, never silent about a lost message, nothing left behind."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from router.leftovers import sweep
from router.link import IpcLink
from tests.router_process import until


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    link = Path("/tmp") / f"lk{id(tmp_path_factory) % 10**9}"
    link.symlink_to(tmp_path_factory.mktemp("link"))
    yield link
    link.unlink()


def modes(folder: Path) -> list[int]:
    """Of everything in it."""
    return [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()]


async def test_frames_both_ways_and_nothing_left(short: Path) -> None:
    link, got = IpcLink(), list[tuple[bytes, bytes]]()
    endpoint = link.open([short])
    assert modes(short) == [0o700]
    link.listen(lambda identity, frame: got.append((identity, frame)))
    assert link.send(b"e", b"too early") == "gone"
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.IDENTITY, b"e")
        peer.linger = 0
        peer.connect(endpoint)
        for n in range(200):  # more than one wake-up reads
            peer.send(b"%d" % n)
        peer.send_multipart([b"two", b"parts"])
        await until(lambda: len(got) == 201)
        assert got[:200] == [(b"e", b"%d" % n) for n in range(200)]
        assert got[200] == (b"e", b"")  # no message of ours: to be counted by the receiver
        assert link.send(b"e", b"hello") == "sent"
        assert await asyncio.to_thread(peer.recv) == b"hello"
    link.close()
    link.close()
    assert link.send(b"e", b"x") == "gone"
    assert modes(short) == []


async def test_a_peer_that_does_not_read_is_full_not_lost(short: Path) -> None:
    link = IpcLink()
    endpoint = link.open([short])
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.IDENTITY, b"e")
        peer.setsockopt(zmq.RCVHWM, 1)
        peer.linger = 0
        peer.connect(endpoint)
        await until(lambda: link.send(b"e", b"0") == "sent")
        sent = 1
        while link.send(b"e", bytes(10_000)) == "sent":
            sent += 1
            assert sent < 50_000
        assert link.send(b"e", b"x") == "full"
        received = 0
        while received < sent:
            if await asyncio.to_thread(peer.poll, 1000):
                peer.recv()
                received += 1
        assert received == sent
    link.close()


def test_paths_that_are_too_long_are_passed_over(tmp_path: Path, short: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    link = IpcLink()
    assert link.open([long, tmp_path / "missing", short]).startswith(f"ipc://{short}/")
    link.close()
    with pytest.raises(OSError, match="no folder"):
        link.open([long])


def test_only_the_folders_of_the_dead_are_removed(short: Path) -> None:
    living = IpcLink()
    living.open([short])
    dead = short / f"router-{'d' * 10}"
    folders = {dead: "1-2\n", short / "router-mine": "1-2\n", short / f"router-{'f' * 10}": ""}
    for folder, owner in folders.items():
        folder.mkdir()
        (folder / "lock").write_text(owner)
        (folder / "r").touch()
    before = set(short.iterdir())
    sweep([short])
    assert before - set(short.iterdir()) == {dead}
    living.close()
