"""From what the operator asked for to what would be started: devices, files, memory, specs.

Owns nothing. Reads headers, tokenizers and the driver's tool, and downloads: it runs before the
event loop, or in a thread. Must not know processes, sockets or HTTP. Raises StartError.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from engine.config import EngineConfig, QuantName
from router.config import Placement, RouterConfig, place
from router.devices import (
    Card,
    cards_by_name,
    choose_devices,
    engine_sizes,
    find_cards,
    free_bytes_of,
)
from router.downloads.hubs import hubs_of
from router.engine_process import EngineSpec
from router.errors import EXIT_CONFIG, EXIT_USAGE, StartError
from router.memory import Demand, EnginePlan, free_memory_bytes
from router.memory import plan as plan_memory
from router.reload import Wanted, text_options
from router.sources import Access, ModelSource, resolve
from router.supervisor import engine_environment
from router.text.model import load_text, thinking_of, tool_form_of
from router.text.pooling import load_pooling
from router.text.served import ServedModel

DEFAULT_ENGINE: Final = ("-m", "engine.main")


class Plan(NamedTuple):
    """What would be started: per replica its model (by position in `models`) and its engine."""

    models: list[ModelSource]
    replicas: list[Placement]
    engines: list[EnginePlan]
    cards: Mapping[str, Card]  # by the names of devices


class PlannedEngine(NamedTuple):
    """One engine, ready to be started; `spec.config.replica` is filled in then."""

    device: str
    plan: EnginePlan
    spec: EngineSpec


class PlannedModel(NamedTuple):
    """One model: how it was wanted, how clients see it, and its engines."""

    wanted: Wanted
    served: ServedModel
    engines: tuple[PlannedEngine, ...]


class Running(NamedTuple):
    """A model that is served already; `loaded`: its engines hold memory."""

    planned: PlannedModel
    loaded: bool = True


class Site(NamedTuple):
    """Where engines are started: with which environment, and the endpoint they connect to."""

    environ: Mapping[str, str]
    endpoint: str


class _Layout(NamedTuple):
    """Models and their places, before memory is planned."""

    models: list[ModelSource]
    replicas: list[Placement]
    free_bytes: dict[str, int]  # of the devices that are known
    cards: dict[str, Card]


def make_plan(config: RouterConfig, environ: Mapping[str, str], *, download: bool = True) -> Plan:
    """Finds devices and models, places them, and checks that they fit. Starts nothing.

    Without `download` weights stay at their hub and their size is estimated. Raises StartError.
    """
    layout = _lay_out(config, environ, download)
    demands = _demands(config, layout.models, layout.replicas)
    memory = plan_memory(demands, layout.free_bytes)
    return Plan(layout.models, layout.replicas, list(memory.engines), layout.cards)


def plan_models(
    config: RouterConfig, site: Site, running: Sequence[Running] = ()
) -> list[PlannedModel]:
    """As `make_plan`, up to the orders of each engine.

    Engines of `running` that are wanted as they are stay as they are, with their memory. Others of
    them make room, but if all fits beside them it is planned so. Raises StartError.
    """
    layout = _lay_out(config, site.environ, download=True)
    models = [
        _wanted(config, source, _devices_of(layout, i)) for i, source in enumerate(layout.models)
    ]
    kept = _kept_engines(models, layout.replicas, running)
    missing = [place for place, engine in zip(layout.replicas, kept, strict=True) if engine is None]
    stays = {id(engine) for engine in kept}
    leaving = [
        engine.plan
        for old in running
        if old.loaded
        for engine in old.planned.engines
        if id(engine) not in stays
    ]
    fitted = iter(_fit(_demands(config, layout.models, missing), layout.free_bytes, leaving))
    plans = [next(fitted) if engine is None else engine.plan for engine in kept]
    plan = Plan(layout.models, layout.replicas, plans, layout.cards)
    planned: list[PlannedModel] = []
    for position, wanted in enumerate(models):
        served = _as_before(wanted, running) or served_model(config, plan, position)
        engines = tuple(
            engine or make_engine(config, site, plan, at, served)
            for at, (place, engine) in enumerate(zip(layout.replicas, kept, strict=True))
            if place.model == position
        )
        planned.append(PlannedModel(wanted, served, engines))
    return planned


def lack(engines: Sequence[EnginePlan], device: str) -> str:
    """Why these engines do not fit into the memory that `device` has free now, or ""."""
    try:
        cards = [] if device == "cpu" else find_cards()
    except StartError as error:
        return error.message
    free = _free_bytes([device], cards).get(device)
    needed = sum(engine.total_bytes for engine in engines)
    if free is None or needed <= free:
        return ""
    names = ", ".join(dict.fromkeys(engine.name for engine in engines))
    return f"{names}: {device} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def _lay_out(config: RouterConfig, environ: Mapping[str, str], download: bool) -> _Layout:
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
    known = cards_by_name(devices, cards)
    return _Layout(models, replicas, _free_bytes(devices, cards), known)


def _devices_of(layout: _Layout, position: int) -> tuple[str, ...]:
    return tuple(place.device for place in layout.replicas if place.model == position)


def _wanted(config: RouterConfig, source: ModelSource, devices: tuple[str, ...]) -> Wanted:
    return Wanted(source.names, str(source.path), config.engine, text_options(config), devices)


def _kept_engines(
    models: Sequence[Wanted], replicas: Sequence[Placement], running: Sequence[Running]
) -> list[PlannedEngine | None]:
    """For each replica the running engine that already is what is wanted there."""
    free = {
        position: [
            engine
            for old in running
            if wanted.is_same_model(old.planned.wanted)
            for engine in old.planned.engines
        ]
        for position, wanted in enumerate(models)
    }
    kept: list[PlannedEngine | None] = []
    for replica in replicas:
        engines = free[replica.model]
        same = next((engine for engine in engines if engine.device == replica.device), None)
        if same is not None:
            engines[:] = [engine for engine in engines if engine is not same]
        kept.append(same)
    return kept


def _as_before(wanted: Wanted, running: Sequence[Running]) -> ServedModel | None:
    """The model as it is served already, with its names of now."""
    for old in running:
        if wanted.is_same_model(old.planned.wanted):
            return replace(old.planned.served, names=wanted.names)
    return None


def _fit(
    demands: Sequence[Demand], free_bytes: Mapping[str, int], leaving: Sequence[EnginePlan]
) -> tuple[EnginePlan, ...]:
    """Beside those that leave if that costs no context, else in their place."""
    if not demands:
        return ()
    room = dict(free_bytes)
    for engine in leaving:
        if engine.device in room:
            room[engine.device] += engine.total_bytes
    in_place = plan_memory(demands, room).engines
    try:
        beside = plan_memory(demands, free_bytes).engines
    except StartError:
        return in_place
    longest = [engine.max_len for engine in in_place]
    return beside if [engine.max_len for engine in beside] == longest else in_place


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
    known = {
        device: free_memory_bytes() if device == "cpu" else free_bytes_of(device, cards)
        for device in devices
    }
    return {device: free for device, free in known.items() if free}


def served_model(config: RouterConfig, plan: Plan, position: int) -> ServedModel:
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


def make_engine(
    config: RouterConfig, site: Site, plan: Plan, at: int, served: ServedModel
) -> PlannedEngine:
    """The orders of the plan's replica `at`."""
    replica, engine, options = plan.replicas[at], plan.engines[at], config.engine
    source = plan.models[replica.model]
    # "python" in an --engine-command is the interpreter of the router, as in a shell of its venv.
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, site.environ.get("PATH", os.defpath)])
    threads = plan_threads(available_cores(), len(plan.replicas), options.threads)
    sizes = engine_sizes(replica.device, options.max_batch, options.step_tokens)
    orders = EngineConfig(
        endpoint=site.endpoint,
        replica=at,
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
        text_ids=_text_ids(source, served),
    )
    card = plan.cards.get(replica.device)
    device = replica.device if card is None else card.uuid
    environment = engine_environment({**site.environ, "PATH": path}, threads=threads, device=device)
    command = options.command or (sys.executable, *DEFAULT_ENGINE)
    spec = EngineSpec(source.names[0], command, environment, orders)
    return PlannedEngine(replica.device, engine, spec)


def plan_threads(cores: int, num_engines: int, wanted: int = 0) -> int:
    """Compute threads of each engine, so that all of them and the router have a core."""
    if wanted:
        return wanted
    reserved = 1 if cores > 2 else 0
    return max(1, (cores - reserved) // max(1, num_engines))


def available_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its cgroup (v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores or 1, math.ceil(int(quota) / int(period))))
    return cores or 1


def _text_ids(source: ModelSource, model: ServedModel) -> int:
    """How many of the model's ids have a text, 0 if all: embeddings are padded to round sizes."""
    size = model.tokenizer.vocab_size
    return size if size < source.checkpoint.facts.vocab_size else 0
