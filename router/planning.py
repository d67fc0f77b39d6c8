"""From what the operator asked for to what would be started: devices, files, memory, specs.

Owns nothing. Reads headers, tokenizers and the driver's tool, and downloads: it runs before the
event loop, or in a thread. Must not know processes, sockets or HTTP. Raises StartError.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from engine.config import EngineConfig, QuantName
from router.config import Placement, RouterConfig, place
from router.devices import Card, choose_devices, engine_sizes, find_cards, free_bytes_of
from router.downloads.hubs import hubs_of
from router.errors import EXIT_CONFIG, EXIT_USAGE, StartError
from router.memory import Demand, EnginePlan, free_memory_bytes
from router.memory import plan as plan_memory
from router.sources import Access, ModelSource, resolve
from router.supervisor import EngineSpec, available_cores, engine_environment, plan_threads
from router.text.model import load_text, thinking_of, tool_form_of
from router.text.pooling import load_pooling
from router.text.served import ServedModel

DEFAULT_ENGINE: Final = ("-m", "engine.main")


class Plan(NamedTuple):
    """What would be started: per replica its model (by position in `models`) and its engine."""

    models: list[ModelSource]
    replicas: list[Placement]
    engines: list[EnginePlan]


def make_plan(config: RouterConfig, environ: Mapping[str, str], *, download: bool = True) -> Plan:
    """Finds devices and models, places them, and checks that they fit. Starts nothing.

    Without `download` weights stay at their hub and their size is estimated. Raises StartError.
    """
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


def make_specs(
    config: RouterConfig,
    plan: Plan,
    models: Sequence[ServedModel],
    environ: Mapping[str, str],
    endpoint: str,
) -> list[EngineSpec]:
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
