"""What a router leaves that dies without cleaning up: its folder, and, at the worst, its engines.

Owns the marks by which they are found. A router holds the lock of its folder for as long as it
lives, whatever happens to it; the folder's name is handed to its engines in their environment.
Only what carries the name of a folder whose lock is free is touched, never anything by the name of
a program: the living instances of the same user are none of our business.

The kernel ends engines with their router (see engine/link.py), so orphans should not exist.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import select
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

INSTANCE: Final = "ROUTER_INSTANCE"  # the variable of the engines that holds the folder's name
FOLDER_PREFIX: Final = "router-"
HIDDEN_PREFIX: Final = ".router-"  # being made: nobody sweeps it before its lock is held
FOLDER_NAME: Final = re.compile(r"router-[0-9a-f]{10}")
LOCK_NAME: Final = "lock"
OWNER: Final = re.compile(rb"\d+-\d*\n")  # what its lock file says
TRIES: Final = 3
GONE_S: Final = 2.0  # for killed orphans to end: what they held is then free


def private_folder(parent: Path) -> tuple[Path, int]:
    """A new folder of mode 0700, and the descriptor of its lock, to be held while we live.

    Its lock file tells people whose it is: process id and start time. Raises OSError.
    """
    owner = f"{os.getpid()}-{_start_time('self')}"
    for attempt in range(TRIES):
        name = secrets.token_hex(5)
        hidden = parent / f"{HIDDEN_PREFIX}{name}-{owner}"
        try:
            hidden.mkdir(mode=0o700)
            lock_fd = os.open(hidden / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(lock_fd, f"{owner}\n".encode())
            folder = parent / f"{FOLDER_PREFIX}{name}"
            hidden.rename(folder)
            return folder, lock_fd
        except FileNotFoundError:  # swept by a router that cannot see our process
            if attempt + 1 == TRIES:
                raise
    raise AssertionError("the last try raises")


def sweep(parents: Iterable[Path]) -> tuple[int, int]:
    """Removes what dead routers of this user left; returns how many (folders, engines)."""
    folders = engines = 0
    for parent in parents:
        with contextlib.suppress(OSError):
            for folder in parent.glob(f"{HIDDEN_PREFIX}*"):
                _remove_unfinished(folder)
            for folder in parent.glob(f"{FOLDER_PREFIX}*"):
                ended = _remove_dead(folder)
                if ended is not None:
                    folders, engines = folders + 1, engines + ended
    return folders, engines


def _remove_unfinished(folder: Path) -> None:
    """One whose maker died between two lines."""
    pid, _, started = folder.name.removeprefix(HIDDEN_PREFIX).partition("-")[2].partition("-")
    if pid.isdecimal() and _is_ours(folder) and _start_time(pid) != started:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_dead(folder: Path) -> int | None:
    """How many engines of it were ended; None if it is alive, or none of ours."""
    if not FOLDER_NAME.fullmatch(folder.name) or not _is_ours(folder):
        return None
    try:
        lock_fd = os.open(folder / LOCK_NAME, os.O_RDWR)
    except OSError:
        return None  # gone meanwhile, or no router's
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not OWNER.fullmatch(os.read(lock_fd, 64)):
            return None  # another program's folder of that name
        engines = _end_orphans(folder.name)
        shutil.rmtree(folder, ignore_errors=True)
        return engines
    except BlockingIOError:
        return None
    finally:
        os.close(lock_fd)


def _is_ours(folder: Path) -> bool:
    try:
        return folder.lstat().st_uid == os.getuid()
    except OSError:
        return False


def _end_orphans(instance: str) -> int:
    """Kills the processes that carry this mark, and waits for their end."""
    pidfds: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        if not _carries(entry, instance):
            continue
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(int(entry.name))
            pidfds.append(pidfd)
            if _carries(entry, instance):  # still the same: from here on the number is ours
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    deadline_s = time.monotonic() + GONE_S
    for pidfd in pidfds:
        left_ms = 1000 * max(0.0, deadline_s - time.monotonic())
        ending = select.poll()
        ending.register(pidfd, select.POLLIN)
        ending.poll(left_ms)
        os.close(pidfd)
    return len(pidfds)


def _carries(process: Path, instance: str) -> bool:
    """Only processes of our own user can be read at all."""
    try:
        entries = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{INSTANCE}={instance}".encode() in entries


def _start_time(pid: str) -> str:
    """In clock ticks after the system's start; with the number it names a process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
