"""Sends sessions at a server, in a closed or an open loop, from one or several processes.

Owns the tasks that keep requests open, the client processes and their common start. Must not know
how sessions were made or how rows are reported. Orders and rows cross between processes as
msgpack, never as pickles.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing as mp
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing.connection import Connection as Pipe
from typing import Any, TypeVar

import msgspec

from bench.client import (
    ClientError,
    ConnectionPool,
    Sink,
    StreamTally,
    Target,
    build_request,
    error_message,
    fetch,
)
from bench.report import Row, Run
from bench.workloads import Endpoint, Message, Session, Turn, request_body, turn_messages

# Between "all processes are ready" and the first request, so that they start together.
START_DELAY_S = 0.05

T = TypeVar("T")


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with the sessions; the same for every process but for `concurrency`.

    `concurrency` None means no bound (open loop only). `exact_output`: an answer of another
    length than asked for is a failure (the server was told to ignore end tokens).
    """

    target: Target
    endpoint: Endpoint
    body: dict[str, Any]  # goes into every request
    open_loop: bool = False
    concurrency: int | None = 1
    timeout_s: float = 600.0
    max_s: float = 3600.0
    exact_output: bool = False


class _Share(msgspec.Struct, frozen=True):
    """One process's part of the work."""

    orders: Orders
    sessions: list[Session]


class _Part(msgspec.Struct):
    """One process's part of the result; the two times are on the system-wide monotonic clock."""

    rows: list[Row]
    end_at: float
    num_started: int
    cpu_s: float


class RequestFailed(Exception):
    """An answer that does not count; `kind` is the short name it is counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Driver:
    """Sends one process's sessions; owns its connections and rows.

    `clock` gives seconds and must be the one on which `start_at` is meant.
    """

    def __init__(
        self, orders: Orders, start_at: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rows: list[Row] = []
        self.num_started = 0
        self.end_at = start_at
        self._orders = orders
        self._start_at = start_at
        self._clock = clock
        self._pool = ConnectionPool(orders.target)
        self._path = "/v1/chat/completions" if orders.endpoint == "chat" else "/v1/completions"

    async def run(self, sessions: list[Session]) -> None:
        """Runs them all, or until the time limit; requests then under way leave no row."""
        load = self._open_loop(sessions) if self._orders.open_loop else self._closed_loop(sessions)
        try:
            async with asyncio.timeout(self._orders.max_s):
                await load
        except TimeoutError:
            pass
        finally:
            self.end_at = self._clock()
            self._pool.close()

    async def _closed_loop(self, sessions: list[Session]) -> None:
        todo = iter(sessions)
        await asyncio.sleep(self._start_at - self._clock())
        async with asyncio.TaskGroup() as group:
            for _ in range(self._orders.concurrency or 1):
                group.create_task(self._worker(todo))

    async def _worker(self, todo: Iterator[Session]) -> None:
        for session in todo:
            await self._session(session, self._clock())

    async def _open_loop(self, sessions: list[Session]) -> None:
        bound = self._orders.concurrency
        gate = asyncio.Semaphore(bound) if bound else None
        async with asyncio.TaskGroup() as group:
            for session in sessions:
                due_at = self._start_at + session.arrival_s
                await asyncio.sleep(due_at - self._clock())
                group.create_task(self._gated(gate, session, due_at))

    async def _gated(self, gate: asyncio.Semaphore | None, session: Session, due_at: float) -> None:
        if gate is None:
            await self._session(session, due_at)
            return
        async with gate:
            await self._session(session, due_at)

    async def _session(self, session: Session, due_at: float) -> None:
        """Its turns, one after the other; a turn that fails ends the session."""
        history: list[Message] = []
        for number, turn in enumerate(session.turns):
            keep_text = number + 1 < len(session.turns)
            body = request_body(turn, self._orders.endpoint, history, self._orders.body)
            request = build_request(
                self._orders.target, "POST", self._path, msgspec.json.encode(body)
            )
            sent_at = self._clock()
            self.num_started += 1
            row = Row(session=session.id, turn=number, start_s=sent_at - self._start_at)
            row.late_s = max(0.0, sent_at - due_at)
            tally = StreamTally(keep_text)
            try:
                await self._ask(request, tally)
                self._fill(row, tally, turn, sent_at)
            except RequestFailed as failed:
                row.error, row.detail = failed.kind, str(failed)
            row.latency_s = row.latency_s or self._clock() - sent_at
            self.rows.append(row)
            if row.error:
                return
            history += turn_messages(turn)
            history.append({"role": "assistant", "content": "".join(tally.text)})
            due_at = self._clock()

    async def _ask(self, request: bytes, tally: StreamTally) -> None:
        """One request, its events into `tally`. Raises `RequestFailed`."""
        refusal: list[bytes] = []

        def sink(status: int) -> Sink:
            return tally.feed if status == 200 else lambda piece, _now: refusal.append(piece)

        try:
            async with asyncio.timeout(self._orders.timeout_s):
                status = await self._pool.exchange(request, sink)
        except TimeoutError as error:
            raise RequestFailed("timeout", f"over {self._orders.timeout_s:g} s") from error
        except ClientError as error:
            raise RequestFailed(error.kind, str(error)) from error
        if status != 200:
            raise RequestFailed(f"http_{status}", error_message(b"".join(refusal)))

    def _fill(self, row: Row, tally: StreamTally, turn: Turn, sent_at: float) -> None:
        """The figures of a whole answer. Raises `RequestFailed` if it was not one."""
        if tally.error is not None:
            raise RequestFailed("stream_error", tally.error)
        if not tally.done or tally.last_at is None:
            raise RequestFailed("truncated", "the stream ended without its last events")
        try:
            usage = tally.usage()
        except ClientError as error:
            raise RequestFailed(error.kind, str(error)) from error
        if usage is None:
            raise RequestFailed("no_usage", "the stream stated no token counts")
        first_at = tally.last_at if tally.first_at is None else tally.first_at
        row.ttft_s = first_at - sent_at
        row.latency_s = tally.last_at - sent_at
        row.itl_s = tally.gaps_s
        row.text_events = tally.num_text_events
        row.input_tokens = usage.prompt_tokens
        row.cached_tokens = usage.cached_tokens
        row.output_tokens = usage.completion_tokens
        row.finish_reason = tally.finish_reason or ""
        if self._orders.exact_output and usage.completion_tokens != turn.max_tokens:
            raise RequestFailed(
                "wrong_length",
                f"asked for {turn.max_tokens} tokens, got {usage.completion_tokens}",
            )


def drive(orders: Orders, sessions: list[Session], procs: int = 1) -> Run:
    """Sends all sessions and returns what happened.

    With more than one process, sessions are dealt out in turn and `concurrency` is divided.
    Raises RuntimeError if a client process dies.
    """
    if orders.concurrency is not None:
        procs = min(procs, orders.concurrency)
    procs = max(1, min(procs, len(sessions)))
    start_at = time.monotonic()
    if procs == 1:
        parts = [_drive_share(_Share(orders, sessions), start_at)]
    else:
        shares = [
            _Share(_divide(orders, rank, procs), sessions[rank::procs]) for rank in range(procs)
        ]
        start_at, parts = _drive_processes(shares)
    rows = [row for part in parts for row in part.rows]
    duration_s = max(part.end_at for part in parts) - start_at
    return Run(
        rows=sorted(rows, key=lambda row: row.start_s),
        duration_s=duration_s,
        unfinished=sum(part.num_started for part in parts) - len(rows),
        client_cpu_share=max(part.cpu_s for part in parts) / max(duration_s, 1e-9),
    )


def _divide(orders: Orders, rank: int, procs: int) -> Orders:
    if orders.concurrency is None:
        return orders
    share = orders.concurrency // procs + (rank < orders.concurrency % procs)
    return msgspec.structs.replace(orders, concurrency=share)


def _drive_share(share: _Share, start_at: float, parent: Pipe | None = None) -> _Part:
    driver = Driver(share.orders, start_at)
    gc.freeze()  # what exists now need not be looked at while the streams are timed
    cpu_before_s = time.process_time()
    run_async(_until_gone(driver.run(share.sessions), parent))
    cpu_s = time.process_time() - cpu_before_s
    gc.unfreeze()
    return _Part(driver.rows, driver.end_at, driver.num_started, cpu_s)


async def _until_gone(work: Coroutine[Any, Any, None], parent: Pipe | None) -> None:
    """`work`, cancelled when the parent's end of the pipe closes."""
    task = asyncio.current_task()
    if parent is not None and task is not None:
        asyncio.get_running_loop().add_reader(parent.fileno(), task.cancel)
    await work


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _drive_processes(shares: list[_Share]) -> tuple[float, list[_Part]]:
    """Starts a process per share, lets them begin together; returns (start, their parts)."""
    context = mp.get_context("spawn")
    pipes: list[Pipe] = []
    processes: list[Any] = []
    try:
        for share in shares:
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
            ours.send_bytes(msgspec.msgpack.encode(share))
        for pipe in pipes:
            _receive(pipe)  # ready
        start_at = time.monotonic() + START_DELAY_S
        for pipe in pipes:
            pipe.send_bytes(msgspec.msgpack.encode(start_at))
        parts = [msgspec.msgpack.decode(_receive(pipe), type=_Part) for pipe in pipes]
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
    return start_at, parts


def _receive(pipe: Pipe) -> bytes:
    try:
        return pipe.recv_bytes()
    except EOFError as error:
        raise RuntimeError("a client process died; its own message is above") from error


def _child(pipe: Pipe) -> None:
    """A client process: one share in, "ready" out, the start time in, one part out."""
    # Ctrl-C reaches the whole terminal group; the parent's end of the pipe tells us instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        share = msgspec.msgpack.decode(pipe.recv_bytes(), type=_Share)
        pipe.send_bytes(b"ready")
        start_at = msgspec.msgpack.decode(pipe.recv_bytes(), type=float)
        part = _drive_share(share, start_at, pipe)
    except (EOFError, asyncio.CancelledError):
        sys.exit(1)  # the parent is gone: nobody wants the rows
    pipe.send_bytes(msgspec.msgpack.encode(part))


async def ask_once(target: Target, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request on a connection of its own: (status, body). Raises `ClientError`."""
    pool = ConnectionPool(target)
    try:
        return await fetch(pool, build_request(target, method, path, body))
    finally:
        pool.close()
