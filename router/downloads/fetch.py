"""One model from a hub to this machine, once: list, choose, check the disk, transfer, publish.

Owns the lock between routers and the threads of a download. Must not know devices or text. What is
here already is never asked for again.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import msgspec

from router import logs
from router.downloads.choice import (
    PYTORCH_INDEX,
    SAFETENSORS_INDEX,
    NoChoice,
    gguf_name,
    is_gguf_only,
    small_files,
    weight_names,
)
from router.downloads.hubs import Hub, Listing, unreachable
from router.downloads.progress import Progress
from router.downloads.transfer import Damaged, HubFile, Stopped, Transfer, partial_bytes
from router.downloads.web import NoAnswer, Refused
from router.errors import EXIT_CONFIG, EXIT_UNAVAILABLE, StartError

PARALLEL: Final = 4  # connections; one alone rarely fills a fast line
LOOK_S: Final = 0.2
SPARE_BYTES: Final = 64 * 1024 * 1024  # of the disk, left free


@dataclass(frozen=True, slots=True)
class Wish:
    """What to bring: a repository of a hub; of a .gguf one the file or quantization `part`."""

    hub: Hub
    repository: str
    part: str = ""
    needs_weights: bool = True


def fetch(wish: Wish, terminal: IO[str] | None, is_here: Callable[[], bool]) -> None:
    """Brings what is missing; afterwards the hub's snapshot folder has all of it.

    `is_here` is asked again once it is this router's turn. Raises `StartError`, with code 130 after
    Ctrl-C; what has come is kept for the next time.
    """
    try:
        with _only_one(wish):
            if not is_here():
                _download(wish, terminal)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        raise StartError(
            f"the download of '{wish.repository}' was stopped; the same command goes on from there",
            128 + number,
        ) from stop


@contextlib.contextmanager
def _only_one(wish: Wish) -> Generator[None]:
    """Waits while another router downloads the same repository. Raises `StartError`."""
    import fcntl

    path = wish.hub.lock(wish.repository)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise _unwritable(wish, error) from error
    with lock:
        said = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    logs.info("waiting_for_download", model=wish.repository, by="another router")
                said = True
                time.sleep(LOOK_S)
            except OSError:  # a file system without locks: hashes still guard what arrives
                break
        yield


def _download(wish: Wish, terminal: IO[str] | None) -> None:
    hub, repository = wish.hub, wish.repository
    try:
        listing = hub.listing(repository)
        files = {file.name: file for file in listing.files}
        names = list(files)
        if wish.part or is_gguf_only(names):
            chosen = [files[gguf_name(names, wish.part)]]
            _bring(wish, listing, chosen, terminal)
        else:
            chosen = [files[name] for name in small_files(names)]
            _bring(wish, listing, chosen, None)
            if wish.needs_weights:
                weights = [files[name] for name in weight_names(names, _index(wish, chosen))]
                _bring(wish, listing, weights, terminal)
                chosen += weights
        hub.publish(repository, listing, chosen)
    except NoChoice as error:
        raise StartError(f"model '{repository}' at {hub.site}: {error}", EXIT_CONFIG) from error
    except OSError as error:
        raise _unwritable(wish, error) from error


def _index(wish: Wish, chosen: Sequence[HubFile]) -> dict[str, str] | None:
    """weight_map of the index among the small files, which are all here by now."""
    for file in chosen:
        if file.name in (SAFETENSORS_INDEX, PYTORCH_INDEX):
            content = wish.hub.target(wish.repository, file).read_bytes()
            try:
                return msgspec.json.decode(content, type=_Index).weight_map
            except msgspec.MsgspecError as error:
                raise NoChoice(f"its {file.name} is not usable: {error}") from error
    return None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _bring(
    wish: Wish, listing: Listing, files: Sequence[HubFile], terminal: IO[str] | None
) -> None:
    hub, repository = wish.hub, wish.repository
    # files of equal content are one
    missing = {hub.target(repository, f): f for f in files if not hub.has(repository, f)}
    if not missing:
        return
    total_bytes = sum(file.num_bytes for file in missing.values())
    begun_bytes = sum(partial_bytes(file, target) for target, file in missing.items())
    _check_space(wish, total_bytes - begun_bytes)
    transfers = [
        Transfer(file, hub.address(repository, listing.revision, file.name), target)
        for target, file in missing.items()
    ]
    progress = Progress(repository, total_bytes, begun_bytes, terminal=terminal)
    logs.info(
        "download_started",
        model=repository,
        site=hub.site,
        files=len(transfers),
        total_mb=round(total_bytes / 1e6, 1),
        resumed_mb=round(begun_bytes / 1e6, 1),
        folder=str(hub.home(repository)),
    )
    try:
        _run(wish, transfers, progress)
    finally:
        progress.close()
    logs.info("download_done", model=repository, seconds=round(progress.seconds, 1))


def _run(wish: Wish, transfers: Sequence[Transfer], progress: Progress) -> None:
    """Runs them in threads and watches. At a failure or signal nobody waits for the others."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="download")
    try:
        running = {pool.submit(transfer.run, stop): transfer for transfer in transfers}
        pending = set(running)
        while pending:
            done, pending = wait(pending, LOOK_S, FIRST_EXCEPTION)
            for future in done:
                _check(wish, future, running[future])
            progress.show(sum(transfer.done_bytes for transfer in transfers))
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _check(wish: Wish, future: Future[None], transfer: Transfer) -> None:
    """Raises `StartError` (or the disk's OSError) if that transfer failed."""
    try:
        future.result()
    except Refused as error:
        raise wish.hub.refusal(wish.repository, error) from error
    except NoAnswer as error:
        raise unreachable(wish.hub, wish.repository, error) from error
    except Damaged as error:
        raise StartError(
            f"model '{wish.repository}': {transfer.file.name} from {wish.hub.site} is refused: "
            f"{error}; try again, or use another mirror",
            EXIT_UNAVAILABLE,
        ) from error
    except Stopped:
        pass


def _check_space(wish: Wish, needed_bytes: int) -> None:
    home = wish.hub.home(wish.repository)
    free_bytes = shutil.disk_usage(_existing(home)).free
    if needed_bytes + SPARE_BYTES > free_bytes:
        raise StartError(
            f"model '{wish.repository}' needs {needed_bytes / 1e9:,.1f} GB in {home}, where "
            f"{free_bytes / 1e9:,.1f} GB are free: make room, or set HF_HOME (MODELSCOPE_CACHE) to "
            "a folder on another disk",
            EXIT_UNAVAILABLE,
        )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _unwritable(wish: Wish, error: OSError) -> StartError:
    home = wish.hub.home(wish.repository)
    return StartError(
        f"model '{wish.repository}' cannot be written to {home}: {error.strerror or error}; make "
        "room there, or set HF_HOME (MODELSCOPE_CACHE) to another folder",
        EXIT_UNAVAILABLE,
    )
