"""STARTING -> READY -> DRAINING -> STOPPED: signals, the order of start and stop, the exit code.

Owns the phase of the whole server, and what the first and the second signal do. Must not know
what requests are: it sees only how many are active, and cuts the streams that outlive the deadline.

    first SIGTERM or SIGINT   drain: not ready at once, newcomers get 503, what runs may end until
                              the deadline, then error event + [DONE]; engines SIGTERM, then SIGKILL
    second one                now: streams end with an error, engines are killed; 128 + signal
    SIGHUP                    the configuration file is read again; without one as SIGTERM

The other signals are in signals.py. A fatal failure of the engines ends the server like a first
signal, and its exit code is the one that counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router import logs, signals
from router.acceptor import HTTP_GRACE_S, HttpServer, url_of
from router.admission import Admission
from router.errors import EXIT_OK, StartError
from router.fleet import Fleet
from router.link import IpcLink
from router.metrics import Metrics
from router.notify import Condition, Notifier
from router.replica import Replica
from router.streams import StreamTable
from router.supervisor import Supervisor
from router.versions import name_of

Phase = Literal["starting", "ready", "draining", "stopped"]

TICK_S: Final = 0.1
FAREWELL_S: Final = 1.0  # for cut streams to write their end
SILENT_S: Final = 1.0  # an engine that long without progress at the deadline heeds no SIGTERM
ENGINE_GRACE_S: Final = 5.0
WATCHED_S: Final = 5.0  # for so long the engines may go unwatched before we are what hangs
LAG_WINDOW_S: Final = 60.0


class Hooks(NamedTuple):
    """What the life cycle calls at its turns, and knows nothing more of.

    `reload` None: there is no configuration file to read again.
    """

    notifier: Notifier
    dump: Callable[[str], None]  # given the phase
    reopen_logs: Callable[[], None]
    reload: Callable[[], Awaitable[object]] | None = None


class RunLimits(NamedTuple):
    """Bounds of the run: seconds, and how many connections may be open."""

    drain_timeout_s: float
    hang_timeout_s: float
    connections: int


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
        self._reload = asyncio.Event()
        self._signals: list[int] = []
        self._watched_s = float("-inf")  # when `tick` last gave up every engine that hangs
        fleet.subscribe(self._on_change)

    # -- what the health routes ask

    @property
    def started(self) -> bool:
        """The first load of every replica is over, and at least one succeeded."""
        if self.phase != "starting":
            return True  # models that come later do not count
        return self._some_ready and self._tried >= {r.index for r in self._fleet.replicas}

    @property
    def ready(self) -> bool:
        """New requests are welcome: it has `started`, and an engine is ready or can be woken."""
        return self.phase == "ready" and any(
            replica.state == "serving"
            or (replica.state == "asleep" and self._admission.is_open(replica.model))
            for replica in self._fleet.replicas
        )

    def _on_change(self, replica: Replica) -> None:
        self._supervisor.changed(replica.index, replica.state, replica.reason)
        self._admission.refresh(replica.model)
        states = {each.state for each in self._fleet.of_model(replica.model)}
        if states == {"parked"}:
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
                model=name_of(replica.model),
                load_s=round(limits.load_s, 2) if limits else None,
                weights_bytes=limits.weights_bytes if limits else None,
                kv_bytes=limits.kv_bytes if limits else None,
                device=limits.device if limits else None,
                dtype=limits.dtype if limits else None,
                quant=limits.quant if limits else None,
            )

    # -- the run

    async def run(
        self, app: ASGIApp, listener: socket.socket, limits: RunLimits, hooks: Hooks
    ) -> int:
        """Serves until a signal or a fatal failure; returns the exit code.

        Raises StartError when the engines failed for good. Leaves no process, socket or file.
        """
        server = HttpServer(self.closing(app), listener, limits.connections)
        self._metrics.connections.set_function(lambda: server.connections)
        self._metrics.connections_refused.set_function(lambda: server.refused)

        def condition() -> Condition:
            watched = time.monotonic() - self._watched_s < WATCHED_S
            accepts = server.alive or self.phase in ("draining", "stopped")
            return Condition(self.phase, watched and accepts, self._status())

        with signals.handled(self._actions(hooks)):
            self._link.listen(self._fleet.receive)
            http = asyncio.create_task(server.serve(), name="http")
            engines = asyncio.create_task(self._supervisor.run(), name="engines")
            pulse = asyncio.create_task(self._pulse(limits.hang_timeout_s), name="pulse")
            reloads = asyncio.create_task(self._keep_reloading(hooks), name="reloads")
            beside = [
                asyncio.create_task(self._announce(listener, hooks.notifier), name="announce"),
                asyncio.create_task(hooks.notifier.keep_telling(condition), name="notify"),
            ]
            try:
                await self._until_end([http, engines, pulse, reloads])
                reloads.cancel()
                hooks.notifier.stopping()
                await self._drain(limits.drain_timeout_s, server)
            finally:
                reloads.cancel()
                # Who is still active now had a farewell, and does not read.
                server.force_exit = self._forced or server.answering > 0
                server.should_exit = True
                await asyncio.gather(
                    self._supervisor.stop(0 if self._forced else ENGINE_GRACE_S),
                    asyncio.wait([http], timeout=HTTP_GRACE_S + 1),
                )
                for task in (pulse, *beside):
                    task.cancel()
                await asyncio.gather(http, engines, pulse, reloads, *beside, return_exceptions=True)
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

    async def _drain(self, drain_timeout_s: float, server: HttpServer) -> None:
        self.phase = "draining"
        self._admission.close("The server is stopping.")
        logs.info("draining", active=self._admission.active, signal=self._signal_name())
        patience_s = 0.0 if self._supervisor.failure.done() else drain_timeout_s
        await self._idle(patience_s, server)
        self._admission.evict("The server is stopping.")
        silent = [r.replica for r in self._fleet.samples() if r.progress_age_s > SILENT_S]
        cut = list(self._table)
        for stream in cut:
            self._fleet.cut(stream, "The server is stopping.", "abort")
        self._metrics.shutdown_aborted.inc(len(cut))
        if cut:
            logs.warning("streams_cut", streams=len(cut))
        await self._idle(FAREWELL_S, server)
        for index in silent:
            self._fleet.lose(index, "no progress when the server stopped", hung=True)
        self._fleet.drain()

    async def _idle(self, patience_s: float, server: HttpServer) -> None:
        """Until all is answered and written, `patience_s` passed, or a second signal."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while not self._forced:
                    if not self._admission.active and not server.answering:
                        return
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

    def _actions(self, hooks: Hooks) -> signals.Actions:
        return signals.Actions(
            stop=self._on_signal,
            dump=lambda: hooks.dump(self.phase),
            reopen_logs=hooks.reopen_logs,
            ask_engines_for_stacks=lambda: self._supervisor.signal_all(signal.SIGQUIT),
            reload=None if hooks.reload is None else self._reload.set,
        )

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        if self._stop.is_set():
            self._force.set()
        self._stop.set()

    def _signal_name(self) -> str | None:
        return signal.Signals(self._signals[-1]).name if self._signals else None

    # -- the tasks beside the requests

    async def _keep_reloading(self, hooks: Hooks) -> None:
        """One at a time: what is asked for meanwhile is done once more afterwards."""
        while True:
            await self._reload.wait()
            self._reload.clear()
            if hooks.reload is None:
                continue
            with hooks.notifier.reloading(), contextlib.suppress(StartError):  # it was logged
                await hooks.reload()

    def _status(self) -> str:
        """One line for the service manager."""
        states = [replica.state for replica in self._fleet.replicas]
        views = self._admission.views()
        return (
            f"{self.phase}: {states.count('serving')} of {len(states)} engines serve, "
            f"{sum(view.used for view in views)} requests running, "
            f"{sum(view.waiting for view in views)} waiting"
        )

    async def _announce(self, listener: socket.socket, notifier: Notifier) -> None:
        """Says "ready" once, when requests will succeed."""
        while not self.started:  # noqa: ASYNC110 - changes with any replica
            await asyncio.sleep(0.02)
        if self.phase == "starting":
            self.phase = "ready"
            gc.collect()
            gc.freeze()  # what start-up made is there to stay
            logs.info("ready", url=url_of(listener))
            notifier.ready()

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
            self._watched_s = clock()

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
