"""The `router` command: arguments -> configs -> objects -> run. The only wiring of the router.

Heavy imports happen inside `serve` and `check`, so that `router --help` and wrong command lines
answer at once. No environment is read below this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from router.arguments import Invocation, parse
from router.config import Placement, RouterConfig, place
from router.errors import EXIT_CONFIG, EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE, StartError

if TYPE_CHECKING:
    import socket

    from engine.config import QuantName
    from router.admission import Admission, QueueBounds
    from router.devices import Card
    from router.fleet import Fleet
    from router.link import IpcLink
    from router.logs import BackgroundLines
    from router.memory import Demand, EnginePlan
    from router.sources import ModelSource
    from router.supervisor import EngineSpec
    from router.text.served import ServedModel

DEFAULT_ENGINE = ("-m", "engine.main")


class Plan(NamedTuple):
    """What would be started: per replica its model (by position in `models`) and its engine."""

    models: list[ModelSource]
    replicas: list[Placement]
    engines: list[EnginePlan]


def main(words: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code; a StartError becomes one sentence on standard error.

    As a command (`words` None) it leaves the process itself: nobody waits for threads that still
    work on a text, or that write to a standard error which nobody reads.
    """
    code = run(sys.argv[1:] if words is None else words)
    if words is None:
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                file.flush()
        os._exit(code)
    return code


def run(words: Sequence[str]) -> int:
    """One command line; returns the exit code."""
    try:
        invocation = parse(words, os.environ)
        if invocation.command == "check":
            return check(invocation, os.environ)
        return serve(invocation, os.environ)
    except StartError as error:
        sys.stderr.write(f"router: {error.message}\n")
        return error.code
    except KeyboardInterrupt:  # a signal while nothing was started yet
        return EXIT_OK


def check(invocation: Invocation, environ: Mapping[str, str]) -> int:
    """Prints the memory plan. Raises StartError where `serve` would; downloads no weights."""
    plan = make_plan(invocation.config, environ, download=False)
    models = [_served_model(invocation.config, plan, i) for i in range(len(plan.models))]
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
            f"{names} on {replica.device}: {engine.dtype}{layers}, "
            f"weights {_mb(engine.weights_bytes)}{_here(model)}, {cache}, "
            f"{engine.max_len} tokens per request, in all {_mb(engine.total_bytes)}"
        )
    out += map(_ways, filter(lambda model: model.template is not None, models))
    sys.stdout.write("\n".join([*out, "all of this fits; nothing was started", ""]))
    return 0


def _ways(model: ServedModel) -> str:
    """How a chat model is expected to call tools and to think."""
    thinking = model.thinking
    thinks = "no thinking" if thinking is None else f"thinking in {thinking.open}"
    return f"{' | '.join(model.names)}: tool calls as {model.tool_form.name}, {thinks}"


def _here(model: ModelSource) -> str:
    return "" if model.checkpoint.file_bytes else " (estimated, no file of them is here)"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes else "as the engine decides"


def serve(invocation: Invocation, environ: Mapping[str, str]) -> int:
    """Serves until a signal; returns the exit code."""
    from router import lifecycle, logs
    from router.link import IpcLink

    signal.signal(signal.SIGTERM, _interrupt)  # until the lifecycle takes over
    config = invocation.config
    lines = logs.start(config.log_format, config.log_level)
    with contextlib.ExitStack() as stack:
        stack.callback(lines.stop)
        plan = make_plan(config, environ)
        link = IpcLink()
        listener = stack.enter_context(_bind(config.http.host, config.http.port))
        stack.callback(link.close)
        for old, new in invocation.notes:
            logs.warning("flag_renamed", old=old, new=new)
        lifecycle.raise_descriptor_limit()
        models = [_served_model(config, plan, i) for i in range(len(plan.models))]
        specs = _specs(config, plan, models, environ, _open(link, environ))
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_run(config, models, specs, link, listener, lines))


def _interrupt(number: int, _frame: object) -> NoReturn:
    """What Ctrl-C does, with the signal's number."""
    raise KeyboardInterrupt(number)


def _open(link: IpcLink, environ: Mapping[str, str]) -> str:
    """The engines' endpoint, in a folder whose path is short."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    folders = [Path(runtime)] if runtime else []
    try:
        return link.open([*folders, Path("/tmp")])
    except OSError as error:
        raise StartError(str(error), EXIT_UNAVAILABLE) from error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


def _bind(host: str, port: int) -> socket.socket:
    from router.lifecycle import bind

    try:
        return bind(host, port)
    except OSError as error:
        if error.errno is not None and os.strerror(error.errno).startswith("Address already"):
            text = f"port {port} is in use: stop what listens there, or give another --port"
        else:
            text = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise StartError(text, EXIT_UNAVAILABLE) from error


# -- the plan


def make_plan(config: RouterConfig, environ: Mapping[str, str], *, download: bool = True) -> Plan:
    """Finds devices and models, places them, and checks that they fit. Starts nothing.

    Without `download` weights stay at their hub and their size is estimated. Raises StartError.
    """
    from router.devices import choose_devices, find_cards
    from router.memory import plan as plan_memory

    if not config.engine.command:
        _check_quant(config.engine.quant)
    asked = config.gpus
    cards = [] if asked and set(asked) == {"cpu"} else find_cards()
    devices = choose_devices(asked, cards, environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        placements = place(config.models, devices)
    except ValueError as error:
        raise StartError(str(error), EXIT_USAGE) from error
    models, replicas = _merge(_sources(config, environ, download), placements)
    memory = plan_memory(_demands(config, models, replicas), _free_bytes(devices, cards))
    return Plan(models, replicas, list(memory.engines))


def _check_quant(quant: QuantName) -> None:
    """Raises StartError for a kind that no engine of this installation can load."""
    if quant == "fp8":
        raise StartError(
            "--quant fp8 is not built in yet: take int8, or bnb-int8 or nf4 with bitsandbytes",
            EXIT_CONFIG,
        )
    if quant in ("bnb-int8", "nf4") and importlib.util.find_spec("bitsandbytes") is None:
        raise StartError(
            f"--quant {quant} needs bitsandbytes, which is not installed: "
            "pip install 'llm-router[bitsandbytes]' (or take --quant int8, which needs nothing)",
            EXIT_CONFIG,
        )


def _sources(config: RouterConfig, environ: Mapping[str, str], download: bool) -> list[ModelSource]:
    from router.downloads.hubs import hubs_of
    from router.sources import Access, resolve

    real = config.engine.load_format != "dummy" and not config.engine.command
    terminal = sys.stderr if sys.stderr.isatty() else None
    access = Access(hubs_of(environ), terminal, with_weights=download)
    return [
        resolve(
            model.source,
            names=model.names,
            model_dir=Path(config.model_dir) if config.model_dir else None,
            access=access,
            needs_weights=real,
        )
        for model in config.models
    ]


def _merge(
    sources: list[ModelSource], placements: Sequence[Placement]
) -> tuple[list[ModelSource], list[Placement]]:
    """The same model named twice is one model with more replicas.

    Raises StartError when one name means two models.
    """
    models: list[ModelSource] = []
    position: dict[int, int] = {}
    for i, source in enumerate(sources):
        same = [j for j, m in enumerate(models) if (m.names, m.path) == (source.names, source.path)]
        taken = {name for model in models for name in model.names} & set(source.names)
        if taken and not same:
            raise StartError(
                f"--models: '{min(taken)}' would name two models; write NAME=SOURCE", EXIT_USAGE
            )
        if not same:
            models.append(source)
        position[i] = same[0] if same else len(models) - 1
    replicas = [Placement(position[p.model], p.device) for p in placements]
    return models, replicas


def _demands(
    config: RouterConfig, models: list[ModelSource], replicas: list[Placement]
) -> list[Demand]:
    from router.devices import engine_sizes
    from router.memory import Demand

    engine = config.engine
    return [
        Demand(
            name=models[replica.model].names[0],
            checkpoint=models[replica.model].checkpoint,
            device=replica.device,
            dtype=engine.dtype,
            quant=engine.quant,
            max_len=engine.max_len,
            max_batch=engine_sizes(replica.device, engine.max_batch).max_batch,
            num_blocks=engine.num_blocks,
            kv_bytes=engine.kv_bytes,
        )
        for replica in replicas
    ]


def _free_bytes(devices: Sequence[str], cards: list[Card]) -> dict[str, int]:
    from router.devices import free_bytes_of
    from router.memory import free_memory_bytes

    known = {
        device: free_memory_bytes() if device == "cpu" else free_bytes_of(device, cards)
        for device in devices
    }
    return {device: free for device, free in known.items() if free}


# -- the objects


def _served_model(config: RouterConfig, plan: Plan, position: int) -> ServedModel:
    from router.text.model import load_text, thinking_of, tool_form_of
    from router.text.pooling import load_pooling
    from router.text.served import ServedModel

    source = plan.models[position]
    generates = not source.checkpoint.facts.encoder
    text = load_text(
        source.path,
        names=source.names,
        chat_format=config.chat_format if generates else "",
        chat_template=config.chat_template if generates else "",
    )
    pooling = load_pooling(source.path)
    lengths = [
        engine.max_len
        for replica, engine in zip(plan.replicas, plan.engines, strict=True)
        if replica.model == position
    ]
    if not generates and pooling.max_len:
        lengths.append(pooling.max_len)
    return ServedModel(
        names=source.names,
        tokenizer=text.tokenizer,
        template=text.template,
        max_len=min(lengths),
        created_s=int(time.time()),
        generates=generates,
        pooling=pooling,
        tool_form=tool_form_of(text, config.tool_parser),
        thinking=thinking_of(text, config.reasoning_parser) if generates else None,
    )


def _specs(
    config: RouterConfig,
    plan: Plan,
    models: Sequence[ServedModel],
    environ: Mapping[str, str],
    endpoint: str,
) -> list[EngineSpec]:
    from engine.config import EngineConfig
    from router.devices import engine_sizes
    from router.supervisor import EngineSpec, available_cores, engine_environment, plan_threads

    options = config.engine
    # "python" in an --engine-command is the interpreter of the router, as in a shell of its venv.
    folder = str(Path(sys.executable).parent)
    environ = {**environ, "PATH": os.pathsep.join([folder, environ.get("PATH", os.defpath)])}
    threads = plan_threads(available_cores(), len(plan.replicas), options.threads)
    specs: list[EngineSpec] = []
    for index, (replica, engine) in enumerate(zip(plan.replicas, plan.engines, strict=True)):
        source = plan.models[replica.model]
        sizes = engine_sizes(replica.device, options.max_batch, options.step_tokens)
        orders = EngineConfig(
            endpoint=endpoint,
            replica=index,
            epoch=0,
            model=str(source.path),
            device="cpu" if replica.device == "cpu" else "cuda:0",
            threads=threads,
            dtype=options.dtype,
            quant=options.quant,
            rope_rule=options.rope_rule,
            load_format=options.load_format,
            max_len=engine.max_len,
            num_blocks=engine.num_blocks,
            kv_bytes=engine.kv_bytes,
            max_batch=sizes.max_batch,
            step_tokens=sizes.step_tokens,
            mixed_tokens=sizes.mixed_tokens,
            overlap=0 if replica.device == "cpu" else 1,
            prefix_cache=options.prefix_cache,
            text_ids=_text_ids(source, models[replica.model]),
        )
        environment = engine_environment(environ, threads=threads, device=replica.device)
        command = options.command or (sys.executable, *DEFAULT_ENGINE)
        specs.append(EngineSpec(source.names[0], command, environment, orders))
    return specs


def _text_ids(source: ModelSource, model: ServedModel) -> int:
    """How many of the model's ids have a text, 0 if all: embeddings are padded to round sizes."""
    size = model.tokenizer.vocab_size
    return size if size < source.checkpoint.facts.vocab_size else 0


async def _run(
    config: RouterConfig,
    models: list[ServedModel],
    specs: list[EngineSpec],
    link: IpcLink,
    listener: socket.socket,
    lines: BackgroundLines,
) -> int:
    from router.admission import QueueBounds
    from router.app import Access, Parts, build_app
    from router.embed_flow import EmbedFlow
    from router.fleet import Fleet
    from router.flow import Flow
    from router.lifecycle import Lifecycle
    from router.metrics import Metrics, QueueSample
    from router.streams import StreamTable
    from router.supervisor import Supervisor
    from router.text.pool import TextPool
    from router.text.served import ModelTable
    from router.text.wire_vocabulary import vocabulary_of
    from router.waiting import FlowSettings

    limits = config.limits
    most = limits.max_concurrency or max(spec.config.max_batch for spec in specs)
    metrics = Metrics(vllm_names=config.http.metrics_names == "vllm")
    table = StreamTable()
    bounds = QueueBounds(limits.max_queue, limits.max_queue_tokens)
    names = [spec.model for spec in specs]
    served = ModelTable(models)
    fleet = Fleet(names, table, link, metrics, time.monotonic, vocabulary_of(served))
    admission = _admission(most, bounds, models, fleet)
    supervisor = Supervisor(specs, fleet, metrics, on_fatal=limits.on_fatal, clock=time.monotonic)
    life = Lifecycle(fleet, link, supervisor, admission, table, metrics)
    metrics.log_lines_lost.set_function(lambda: lines.lost_lines)
    metrics.add_replicas(fleet.samples)
    metrics.add_queues(lambda: [QueueSample(*view) for view in admission.views()])
    pool = TextPool()
    settings = FlowSettings(
        request_timeout_s=limits.request_timeout_s,
        queue_timeout_s=limits.queue_timeout_s,
        first_token_timeout_s=limits.first_token_timeout_s,
        max_concurrency=most,
    )
    flow = Flow(fleet, admission, metrics, settings, time.monotonic)
    embed_flow = EmbedFlow(fleet, admission, metrics, settings, time.monotonic)
    access = Access(config.http.api_keys, config.http.cors_origins, config.http.allowed_hosts)
    parts = Parts(served, flow, embed_flow, pool, metrics, life, access)
    try:
        return await life.run(
            build_app(parts),
            listener,
            drain_timeout_s=limits.drain_timeout_s,
            hang_timeout_s=limits.hang_timeout_s,
        )
    finally:
        pool.close()


def _admission(
    most: int, bounds: QueueBounds, models: list[ServedModel], fleet: Fleet
) -> Admission:
    """Up to `most` requests in each replica, and `bounds` on those that wait for each model."""
    from router.admission import EMBEDDING_SHARE, Admission, Gate

    def gate(name: str, permits_each: int) -> Gate:
        def permits() -> int:
            return fleet.serving_count(name) * permits_each

        return Gate(name, bounds, permits, time.monotonic)

    few = max(1, most // EMBEDDING_SHARE)
    return Admission(
        [gate(model.name, most) for model in models],
        [gate(model.name, few) for model in models if model.generates],
    )


if __name__ == "__main__":
    sys.exit(main())
