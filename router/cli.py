"""The `router` command: arguments -> configs -> objects -> run. The only wiring of the router.

Heavy imports happen inside `serve` and `check`, so that `router --help` and wrong command lines
answer at once. No environment is read below this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from router.arguments import Invocation, parse
from router.errors import EXIT_CONFIG, EXIT_OK, EXIT_UNAVAILABLE, StartError

if TYPE_CHECKING:
    import socket

    from router import planning
    from router.admission import Admission, Gate
    from router.app import Access
    from router.config import RouterConfig
    from router.devices import Card
    from router.embed_flow import EmbedFlow
    from router.fleet import Fleet
    from router.flow import Flow
    from router.link import IpcLink
    from router.logs import BackgroundLines, LogFile
    from router.memory import EnginePlan
    from router.metrics import Metrics
    from router.notify import Notifier
    from router.planning import PlannedModel, Running
    from router.roster import Planner
    from router.sources import ModelSource
    from router.text.grammar_process import GrammarProcesses
    from router.text.served import ServedModel
    from router.waiting import FlowSettings


class Outside(NamedTuple):
    """What of the system is open before the event loop runs."""

    link: IpcLink
    listener: socket.socket
    lines: BackgroundLines
    notifier: Notifier
    connections: int  # that may be open
    grammars: GrammarProcesses


def main(words: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code; a StartError becomes one sentence on standard error.

    As a command (`words` None) it leaves the process itself: nobody waits for threads that still
    work on a text, or that write to a standard error which nobody reads.
    """
    if words is None:
        _fill_standard_streams()
    code = run(sys.argv[1:] if words is None else words)
    if words is None:
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                file.flush()
        os._exit(code)
    return code


def _fill_standard_streams() -> None:
    """Who was started with one of them closed gets /dev/null there, not its next socket."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # no context: they live as long as the process
            setattr(sys, name, open(fd, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def run(words: Sequence[str]) -> int:
    """One command line; returns the exit code."""
    try:
        invocation = parse(words, os.environ)
        if invocation.command == "check":
            return check(invocation, os.environ)
        return serve(invocation, words, os.environ)
    except StartError as error:
        with contextlib.suppress(OSError):  # no room for it: the code still tells
            sys.stderr.write(f"router: {error.message}\n")
        return error.code
    except KeyboardInterrupt:  # a signal while nothing was started yet
        return EXIT_OK


def check(invocation: Invocation, environ: Mapping[str, str]) -> int:
    """Prints the memory plan. Raises StartError where `serve` would; downloads no weights."""
    from router import planning

    plan = planning.make_plan(invocation.config, environ, download=False)
    models = [planning.served_model(invocation.config, plan, i) for i in range(len(plan.models))]
    quant = invocation.config.engine.quant
    layers = "" if quant == "none" else f" with {quant} layers"
    out = [f"not needed: {old} -> {new}" for old, new in invocation.notes]
    for replica, engine in zip(plan.replicas, plan.engines, strict=True):
        model = plan.models[replica.model]
        names = " | ".join(model.names)
        cache = f"KV cache {_mb(engine.kv_bytes)} ({engine.num_blocks} blocks)"
        if model.checkpoint.facts.encoder:
            cache = "no KV cache"
        out.append(
            f"{names} on {_place(replica.device, plan.cards)}: {engine.dtype}{layers}, "
            f"weights {_mb(engine.weights_bytes)}{_here(model)}, {cache}, "
            f"{engine.max_len} tokens per request, in all {_mb(engine.total_bytes)}"
        )
    out += map(_ways, filter(lambda model: model.template is not None, models))
    sys.stdout.write("\n".join([*out, "all of this fits; nothing was started", ""]))
    return 0


def _place(device: str, cards: Mapping[str, Card]) -> str:
    """The device, with all that tells a card from others."""
    card = cards.get(device)
    if card is None:
        return device
    return f"GPU {card.number} ({card.uuid}, {card.name}, {_mb(card.free_bytes)} free)"


def _ways(model: ServedModel) -> str:
    """How a chat model is expected to call tools and to think."""
    thinking = model.thinking
    thinks = "no thinking" if thinking is None else f"thinking in {thinking.open}"
    return f"{' | '.join(model.names)}: tool calls as {model.tool_form.name}, {thinks}"


def _here(model: ModelSource) -> str:
    return "" if model.checkpoint.file_bytes else " (estimated, no file of them is here)"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes else "as the engine decides"


def serve(invocation: Invocation, words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serves until a signal; returns the exit code."""
    from router import acceptor, leftovers, logs, planning
    from router.link import IpcLink
    from router.notify import Notifier
    from router.supervisor import child_environment
    from router.text.grammar_process import GrammarProcesses

    signal.signal(signal.SIGTERM, _interrupt)  # until the lifecycle takes over
    config = invocation.config
    lines = logs.start(config.log_format, config.log_level, _log_file(config.log_file))
    with contextlib.ExitStack() as stack:
        stack.callback(lines.stop)
        notifier = Notifier(environ, os.getpid())
        stack.callback(notifier.close)
        for old, new in invocation.notes:
            logs.warning("flag_renamed", old=old, new=new)
        folders = _runtime_folders(environ)
        _log_leftovers(*leftovers.sweep(folders))  # before free memory is looked at
        link = IpcLink()
        stack.callback(link.close)
        endpoint = _open(link, folders)
        environ = {**environ, leftovers.INSTANCE: link.instance}
        planner = _Planner(words, environ, planning.Site(environ, endpoint))
        planned = planner.plan(config, ())
        listener = stack.enter_context(_bind(config.http.host, config.http.port))
        descriptors = acceptor.raise_descriptor_limit()
        num_engines = sum(len(model.engines) for model in planned)
        connections = acceptor.connection_limit(descriptors, num_engines)
        logs.info("descriptors", limit=descriptors, connections=connections)
        grammars = GrammarProcesses(child_environment(environ))
        stack.callback(grammars.close)
        outside = Outside(link, listener, lines, notifier, connections, grammars)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_run(config, planned, planner, outside))


def _log_file(path: str) -> LogFile:
    from router.logs import LogFile

    try:
        return LogFile(path)
    except OSError as error:
        text = f"cannot open --log-file {path}: {error.strerror}"
        raise StartError(text, EXIT_CONFIG) from error


class _Planner:
    """The command line as it was given, with the files as they are when asked."""

    def __init__(
        self, words: Sequence[str], environ: Mapping[str, str], site: planning.Site
    ) -> None:
        self._words = words
        self._environ = environ
        self._site = site

    def read(self) -> RouterConfig:
        """What the operator wants now. Raises StartError."""
        return parse(self._words, self._environ).config

    def plan(self, config: RouterConfig, running: Sequence[Running]) -> list[PlannedModel]:
        """See `planning.plan_models`."""
        from router import planning

        return planning.plan_models(config, self._site, running)

    def lack(self, engines: Sequence[EnginePlan], device: str) -> str:
        """See `planning.lack`."""
        from router import planning

        return planning.lack(engines, device)


def _interrupt(number: int, _frame: object) -> NoReturn:
    """What Ctrl-C does, with the signal's number."""
    raise KeyboardInterrupt(number)


def _runtime_folders(environ: Mapping[str, str]) -> list[Path]:
    """Where the engines' socket may lie, the best first: its path must be short."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    return [*([Path(runtime)] if runtime else []), Path("/tmp")]


def _log_leftovers(folders: int, engines: int) -> None:
    from router import logs

    if folders:
        logs.warning("leftovers_removed", folders=folders, engines=engines)


def _open(link: IpcLink, folders: Sequence[Path]) -> str:
    """The engines' endpoint."""
    try:
        return link.open(folders)
    except OSError as error:
        raise StartError(str(error), EXIT_UNAVAILABLE) from error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


def _bind(host: str, port: int) -> socket.socket:
    from router.acceptor import bind

    try:
        return bind(host, port)
    except OSError as error:
        if error.errno is not None and os.strerror(error.errno).startswith("Address already"):
            text = f"port {port} is in use: stop what listens there, or give another --port"
        else:
            text = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise StartError(text, EXIT_UNAVAILABLE) from error


# -- the objects


async def _run(
    config: RouterConfig,
    planned: Sequence[PlannedModel],
    planner: Planner,
    outside: Outside,
) -> int:
    from router.api.models import Operator
    from router.app import Parts, build_app
    from router.dump import StateDump
    from router.embed_flow import EmbedFlow
    from router.fleet import Fleet
    from router.flow import Flow
    from router.lifecycle import Hooks, Lifecycle, RunLimits
    from router.metrics import Metrics
    from router.operations import Operations
    from router.quarantine import Quarantine
    from router.roster import Roster, Works
    from router.streams import StreamTable
    from router.supervisor import Supervisor
    from router.text.pool import TextPool
    from router.text.served import ModelTable
    from router.text.wire_vocabulary import vocabulary_of
    from router.turnover import Turnover

    limits, clock, link = config.limits, time.monotonic, outside.link
    metrics = Metrics(vllm_names=config.http.metrics_names == "vllm")
    streams, served = StreamTable(), ModelTable([model.served for model in planned])
    keys = [model.served.key for model in planned for _ in model.engines]
    fleet = Fleet(keys, streams, link, metrics, clock, vocabulary_of(served))
    gates = _Gates(config, planned, fleet.serving_count)
    admission = gates.admission(model.served for model in planned)
    specs = [engine.spec for model in planned for engine in model.engines]
    supervisor = Supervisor(specs, fleet, metrics, on_fatal=limits.on_fatal, clock=clock)
    works = Works(fleet, supervisor, admission, served, streams, planner, gates.of)
    roster = Roster(works, limits, planned, clock)
    settings = gates.settings(config)
    quarantine = Quarantine(clock)
    flow = Flow(fleet, admission, metrics, settings, quarantine, clock)
    embeds = EmbedFlow(fleet, admission, metrics, settings, quarantine, clock)
    turnover = Turnover(roster, planner, config, _limiter(gates, admission, [flow, embeds]))
    life = Lifecycle(fleet, link, supervisor, admission, streams, metrics)
    _export(metrics, outside.lines, fleet, admission)
    pool, grammars = TextPool(), outside.grammars
    dump = StateDump(fleet, supervisor, admission, streams, clock)
    access, operator = _access(config), Operator(roster, turnover)
    operations = Operations(fleet, supervisor, served, clock)
    parts = Parts(served, flow, embeds, pool, grammars, metrics, life, access, operator, operations)
    reload = turnover.reload if config.file else None
    bounds = RunLimits(limits.drain_timeout_s, limits.hang_timeout_s, outside.connections)
    hooks = Hooks(outside.notifier, dump, outside.lines.reopen, reload)
    looking_after = asyncio.create_task(roster.run(), name="roster")
    try:
        return await life.run(build_app(parts), outside.listener, bounds, hooks)
    finally:
        looking_after.cancel()
        await asyncio.gather(looking_after, return_exceptions=True)
        pool.close()


def _export(metrics: Metrics, lines: BackgroundLines, fleet: Fleet, admission: Admission) -> None:
    """What is asked for at each scrape."""
    from router.metrics import QueueSample

    metrics.log_lines_lost.set_function(lambda: lines.lost_lines)
    metrics.add_replicas(fleet.samples)
    metrics.add_queues(lambda: [QueueSample(*view) for view in admission.views()])


def _access(config: RouterConfig) -> Access:
    from router.app import Access

    http = config.http
    return Access(
        http.api_keys, http.cors_origins, http.allowed_hosts, http.admin_keys, http.admin_open
    )


def _limiter(
    gates: _Gates, admission: Admission, flows: Sequence[Flow | EmbedFlow]
) -> Callable[[RouterConfig, Iterable[PlannedModel]], None]:
    """Puts the limits of a configuration into force."""

    def limit(config: RouterConfig, models: Iterable[PlannedModel]) -> None:
        gates.limit(config, models)
        admission.bound(gates.bounds)
        for flow in flows:
            flow.limit(gates.settings(config))

    return limit


class _Gates:
    """Up to `most` requests in each replica, and `bounds` on those that wait for each model."""

    def __init__(
        self,
        config: RouterConfig,
        models: Iterable[PlannedModel],
        serving_count: Callable[[str], int],
    ) -> None:
        self._serving_count = serving_count
        self.limit(config, models)

    def limit(self, config: RouterConfig, models: Iterable[PlannedModel]) -> None:
        """From now on these hold."""
        from router.admission import QueueBounds

        limits = config.limits
        batches = [engine.spec.config.max_batch for model in models for engine in model.engines]
        self._most = limits.max_concurrency or max(batches)
        self.bounds = QueueBounds(limits.max_queue, limits.max_queue_tokens)

    def settings(self, config: RouterConfig) -> FlowSettings:
        """Of one request."""
        from router.waiting import FlowSettings

        limits = config.limits
        return FlowSettings(
            request_timeout_s=limits.request_timeout_s,
            queue_timeout_s=limits.queue_timeout_s,
            first_token_timeout_s=limits.first_token_timeout_s,
            max_concurrency=self._most,
        )

    def admission(self, models: Iterable[ServedModel]) -> Admission:
        """The queues of all of them."""
        from router.admission import Admission

        pairs = [self.of(model) for model in models]
        return Admission([gate for gate, _ in pairs], [gate for _, gate in pairs if gate])

    def of(self, model: ServedModel) -> tuple[Gate, Gate | None]:
        """The queue of one, and that of its embeddings if it also generates."""
        from router.admission import EMBEDDING_SHARE, Gate

        def all_permits() -> int:
            return self._serving_count(model.key) * self._most

        def few_permits() -> int:
            return self._serving_count(model.key) * max(1, self._most // EMBEDDING_SHARE)

        gate = Gate(model.key, self.bounds, all_permits, time.monotonic)
        few = Gate(model.key, self.bounds, few_permits, time.monotonic)
        return gate, few if model.generates else None


if __name__ == "__main__":
    sys.exit(main())
