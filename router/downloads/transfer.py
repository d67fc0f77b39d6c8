"""One file on its way from a hub: resumed where it stopped, and only accepted if its hash agrees.

Owns the partial file. Must not know which files a model needs, nor where hubs keep them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Protocol

from router.downloads.web import (
    CHUNK_BYTES,
    Address,
    NoAnswer,
    Refused,
    open_url,
    read_chunks,
    total_bytes,
)

MAX_FAILURES: Final = 6  # in a row, without a single byte between them
PARTIAL_SUFFIX: Final = ".incomplete"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. `digest` is the SHA-256 of its content, or git's SHA-1 of it."""

    name: str  # its path in the repository, with /
    num_bytes: int
    digest: str


class Damaged(Exception):
    """What came is not what the hub's listing promises."""


class Stopped(Exception):
    """Another transfer failed, or the command is being ended."""


class Transfer:
    """Brings `file` to `target`, by way of a partial file beside it that outlives this process.

    `done_bytes` may be read by other threads at any time.
    """

    def __init__(self, file: HubFile, address: Address, target: Path) -> None:
        self.file = file
        self.done_bytes = partial_bytes(file, target)
        self._address = address
        self._target = target
        self._digest = _new_digest(file)

    def run(self, stop: threading.Event) -> None:
        """Returns when the file is there, complete and checked.

        Raises `Damaged`, `NoAnswer` or `Refused` of the server, `Stopped`, or OSError of the disk.
        """
        self._target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(self._target)
        with partial.open("r+b" if partial.exists() else "w+b") as out:
            resumed = self._take_up(out)
            try:
                self._receive_all(out, stop)
            except Damaged:
                if not resumed:
                    self._restart(out)  # a lie is not worth keeping
                    raise
                self._restart(out)  # its first part may be older than the hub's file
                self._receive_all(out, stop)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(self._target)

    def _take_up(self, out: IO[bytes]) -> bool:
        """Hashes what an earlier run left; is there any?"""
        self._restart(out, keep=True)
        while chunk := out.read(CHUNK_BYTES):
            self._digest.update(chunk)
            self.done_bytes += len(chunk)
        if self.done_bytes > self.file.num_bytes:
            self._restart(out)
        return self.done_bytes > 0

    def _restart(self, out: IO[bytes], *, keep: bool = False) -> None:
        out.seek(0)
        if not keep:
            out.truncate()
        self._digest = _new_digest(self.file)
        self.done_bytes = 0

    def _receive_all(self, out: IO[bytes], stop: threading.Event) -> None:
        failures = 0
        while self.done_bytes < self.file.num_bytes:
            before = self.done_bytes
            try:
                self._receive(out, stop)
            except NoAnswer as error:
                problem = error
            else:
                problem = NoAnswer(f"{self._address.host} closed the connection early")
            if self.done_bytes >= self.file.num_bytes:
                break
            failures = 1 if self.done_bytes > before else failures + 1
            if failures > MAX_FAILURES:
                raise problem
            if stop.wait(min(2.0 ** (failures - 2), 10.0)):
                raise Stopped
        if self._digest.hexdigest() != self.file.digest:
            raise Damaged("its content does not have the hash that the hub promises")

    def _receive(self, out: IO[bytes], stop: threading.Event) -> None:
        """What one answer brings; it may end early."""
        try:
            answer = open_url(self._address, self.done_bytes)
        except Refused as error:
            if error.status == 416:
                raise Damaged("the server's file is shorter than the hub's listing says") from error
            raise
        with answer:
            if self.done_bytes and answer.status != 206:  # the server knows no ranges
                self._restart(out)
            total = total_bytes(answer)
            if total not in (None, self.file.num_bytes):
                raise Damaged(
                    f"the server's file has {total:,} bytes, the hub's listing says "
                    f"{self.file.num_bytes:,}"
                )
            for chunk in read_chunks(answer):
                if stop.is_set():
                    raise Stopped
                if self.done_bytes + len(chunk) > self.file.num_bytes:
                    raise Damaged(
                        f"more than the {self.file.num_bytes:,} bytes of the listing came"
                    )
                out.write(chunk)
                self._digest.update(chunk)
                self.done_bytes += len(chunk)


def partial_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.router{PARTIAL_SUFFIX}")


def partial_bytes(file: HubFile, target: Path) -> int:
    """How much of it an earlier run left."""
    try:
        return min(partial_path(target).stat().st_size, file.num_bytes)
    except OSError:
        return 0


def has_digest(path: Path, file: HubFile) -> bool:
    """Is this, byte for byte, that file?"""
    digest = _new_digest(file)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == file.digest


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def _new_digest(file: HubFile) -> _Digest:
    if len(file.digest) == hashlib.sha256().digest_size * 2:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)
