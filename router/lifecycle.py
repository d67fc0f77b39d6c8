"""STARTING -> READY -> DRAINING -> STOPPED: signals, the order of start and stop, the exit code.

Owns the phase of the whole server and every signal; nobody else installs handlers. Must not know
what requests are: it sees only how many are active, and cuts the streams that outlive the deadline.

    first SIGTERM or SIGINT   drain: not ready at once, newcomers get 503, what runs may end until
                              the deadline, then error event + [DONE]; engines SIGTERM, then SIGKILL
    second one                now: streams end with an error, engines are killed; 128 + signal
    SIGHUP                    as SIGTERM (unless it was ignored at start, as under nohup)
    SIGUSR1                   the state, as one log line per replica and model
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
import socket
import time
from collections.abc import Generator
from typing import Any, Final, Literal

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router import logs
from router.admission import Admission
from router.connection import Connection
from router.errors import EXIT_OK
from router.fleet import Fleet, Replica
from router.link import IpcLink
from router.metrics import Metrics
from router.streams import StreamTable
from router.supervisor import Supervisor

Phase = Literal["starting", "ready", "draining", "stopped"]

TICK_S: Final = 0.1
FAREWELL_S: Final = 2.0  # for cut streams to write their end
ENGINE_GRACE_S: Final = 5.0
HTTP_GRACE_S: Final = 2  # for connections that still write, at the very end
LAG_WINDOW_S: Final = 60.0
KEEP_ALIVE_S: Final = 75  # between two requests of a connection


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are the lifecycle's."""
        yield


class Lifecycle:
    """Runs the server from its first to its last moment."""

    def __init__(
        self,
        fleet: Fleet,
        link: IpcLink,
        supervisor: Supervisor,
        admission: Admission,
        table: StreamTable,
        metrics: Metrics,
    ) -> None:
        self.phase: Phase = "starting"
        self._fleet = fleet
        self._link = link
        self._supervisor = supervisor
        self._admission = admission
        self._table = table
        self._metrics = metrics
        self._tried: set[int] = set()  # replicas whose first load is over, well or not
        self._some_ready = False
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._signals: list[int] = []
        fleet.subscribe(self._on_change)

    # -- what the health routes ask

    @property
    def started(self) -> bool:
        """The first load of every replica is over, and at least one succeeded."""
        return self._some_ready and len(self._tried) == len(self._fleet.replicas)

    @property
    def ready(self) -> bool:
        """New requests are welcome: it has `started`, and an engine is ready."""
        return self.phase == "ready" and any(r.state == "serving" for r in self._fleet.replicas)

    def _on_change(self, replica: Replica) -> None:
        self._supervisor.changed(replica.index, replica.state, replica.reason)
        self._admission.refresh(replica.model)
        if all(each.state == "parked" for each in self._fleet.of_model(replica.model)):
            # Nobody will serve those who wait, and without a time limit they would wait for ever.
            self._admission.evict(self._fleet.unavailable(replica.model).message, replica.model)
        if replica.state != "starting":
            self._tried.add(replica.index)
        if replica.state == "serving":
            self._some_ready = True
            limits = replica.limits
            logs.info(
                "engine_ready",
                replica=replica.index,
                model=replica.model,
                load_s=round(limits.load_s, 2) if limits else None,
                weights_bytes=limits.weights_bytes if limits else None,
                kv_bytes=limits.kv_bytes if limits else None,
                device=limits.device if limits else None,
                dtype=limits.dtype if limits else None,
                quant=limits.quant if limits else None,
            )

    # -- the run

    async def run(
        self,
        app: ASGIApp,
        listener: socket.socket,
        *,
        drain_timeout_s: float,
        hang_timeout_s: float,
    ) -> int:
        """Serves until a signal or a fatal failure; returns the exit code.

        Raises StartError when the engines failed for good. Leaves no process, socket or file.
        """
        server = make_http_server(self.closing(app))
        with self._handlers():
            self._link.listen(self._fleet.receive)
            http = asyncio.create_task(server.serve(sockets=[listener]), name="http")
            engines = asyncio.create_task(self._supervisor.run(), name="engines")
            pulse = asyncio.create_task(self._pulse(hang_timeout_s), name="pulse")
            announce = asyncio.create_task(self._announce(listener), name="announce")
            try:
                await self._until_end([http, engines, pulse])
                await self._drain(drain_timeout_s)
            finally:
                announce.cancel()
                await self._supervisor.stop(0 if self._forced else ENGINE_GRACE_S)
                server.force_exit = self._forced
                server.should_exit = True
                await asyncio.wait([http], timeout=HTTP_GRACE_S + 1)
                pulse.cancel()
                await asyncio.gather(announce, pulse, engines, http, return_exceptions=True)
                self._link.close()
                self.phase = "stopped"
        return self._exit_code()

    async def _until_end(self, tasks: list[asyncio.Task[None]]) -> None:
        """Until the first signal, or the engines' failure. Raises what a task of ours died of."""
        stop = asyncio.create_task(self._stop.wait())
        ends: list[asyncio.Future[Any]] = [stop, self._supervisor.failure, *tasks]
        try:
            await asyncio.wait(ends, return_when="FIRST_COMPLETED")
        finally:
            stop.cancel()
        for task in tasks:
            if task.done():
                task.result()

    async def _drain(self, drain_timeout_s: float) -> None:
        self.phase = "draining"
        self._admission.close("The server is stopping.")
        logs.info("draining", active=self._admission.active, signal=self._signal_name())
        patience_s = 0.0 if self._supervisor.failure.done() else drain_timeout_s
        await self._idle(patience_s)
        self._admission.evict("The server is stopping.")
        cut = list(self._table)
        for stream in cut:
            self._fleet.cut(stream, "The server is stopping.", "abort")
        self._metrics.shutdown_aborted.inc(len(cut))
        if cut:
            logs.warning("streams_cut", streams=len(cut))
        await self._idle(FAREWELL_S)
        self._fleet.drain()

    async def _idle(self, patience_s: float) -> None:
        """Until nothing is active, `patience_s` passed, or a second signal."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self._admission.active and not self._forced:  # noqa: ASYNC110 - two owners
                    await asyncio.sleep(0.02)

    def _exit_code(self) -> int:
        if self._forced:
            return 128 + self._signals[-1]
        if self._supervisor.failure.done():
            raise self._supervisor.failure.result()
        return EXIT_OK

    # -- signals

    @property
    def _forced(self) -> bool:
        return self._force.is_set()

    @contextlib.contextmanager
    def _handlers(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGUSR1, self._log_state)
        try:
            yield
        finally:
            for number in [*numbers, signal.SIGUSR1]:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # all is over: nothing left to interrupt

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        if self._stop.is_set():
            self._force.set()
        self._stop.set()

    def _signal_name(self) -> str | None:
        return signal.Signals(self._signals[-1]).name if self._signals else None

    def _log_state(self) -> None:
        logs.info(
            "state", phase=self.phase, streams=len(self._table), tasks=len(asyncio.all_tasks())
        )
        for sample in self._fleet.samples():
            logs.info(
                "state_replica",
                replica=sample.replica,
                model=sample.model,
                state=sample.state,
                running=sample.running,
                progress_age_s=round(sample.progress_age_s, 3),
                blocks_held=sample.stats.blocks_held,
                blocks_total=sample.stats.blocks_total,
            )
        for view in self._admission.views():
            logs.info("state_queue", **view._asdict())

    # -- the tasks beside the requests

    async def _announce(self, listener: socket.socket) -> None:
        """Says "ready" once, when requests will succeed."""
        while not self.started:  # noqa: ASYNC110 - changes with any replica
            await asyncio.sleep(0.02)
        if self.phase == "starting":
            self.phase = "ready"
            gc.collect()
            gc.freeze()  # what start-up made is there to stay
            logs.info("ready", url=url_of(listener))

    async def _pulse(self, hang_timeout_s: float) -> None:
        """Drives the progress rule, and measures how late the event loop is."""
        clock = time.monotonic
        worst_s, window_s = 0.0, clock()
        while True:
            due_s = clock() + TICK_S
            await asyncio.sleep(TICK_S)
            late_s = max(0.0, clock() - due_s)
            self._metrics.loop_lag_s.observe(late_s)
            if clock() - window_s > LAG_WINDOW_S:
                worst_s, window_s = 0.0, clock()
            worst_s = max(worst_s, late_s)
            self._metrics.loop_lag_max_s.set(worst_s)
            self._link.drain()  # what came while the loop was late counts as progress
            self._fleet.tick(hang_timeout_s)

    def closing(self, app: ASGIApp) -> ASGIApp:
        """`app`, whose answers ask clients to leave the connection once the server is stopping."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            async def closing_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
                await send(message)

            stopping = self.phase in ("draining", "stopped")
            await app(scope, receive, closing_send if stopping else send)

        return wrapped


def make_http_server(app: ASGIApp) -> HttpServer:
    """The server, with limits on what comes before a body."""
    return HttpServer(
        uvicorn.Config(
            app,
            loop="none",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=2048,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=HTTP_GRACE_S,
        )
    )


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before any engine starts. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_descriptor_limit() -> int:
    """Lifts the soft limit of open files to the hard one; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
