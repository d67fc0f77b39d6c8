"""What the operator asked for: the raw options, and the small frozen configs made of them.

Owns the names, defaults and bounds of all options; the command line and `router.toml` share them.
Reads no file, no environment, no device. Raises ValueError with one sentence for the operator.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import shlex
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

from engine.config import DTypeName, LoadFormat, QuantName, RopeRule

LOOPBACK = ("127.0.0.1", "::1", "localhost")
DEMO_MODEL = "smollm2-135m"
MIB = 1024 * 1024

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
LogFormat = Literal["json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Options(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """Everything an operator can set, as typed: flags of the command line, keys of router.toml.

    This is the one flat list of names; code below the command line sees the resolved configs.
    """

    models: str | list[str] = ""
    gpus: str | list[str | int] = ""
    host: str = "127.0.0.1"
    port: Port = 8000
    max_concurrency: Count = 0
    max_queue: Count = 512
    max_queue_tokens: Count = 4_000_000
    request_timeout: Seconds | None = None
    queue_timeout: Seconds = 0.0
    first_token_timeout: Seconds = 0.0
    drain_timeout: Seconds = 30.0
    hang_timeout: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    idle_unload: Seconds = 0.0
    max_len: Count = 0
    dtype: DTypeName = "auto"
    quant: QuantName = "none"
    rope_rule: RopeRule = "auto"
    chat_format: str = ""
    chat_template: str = ""
    tool_parser: str = ""
    reasoning_parser: str = ""
    load_format: LoadFormat = "auto"
    kv_memory: str | Count = 0
    kv_blocks: Count = 0
    step_tokens: Count = 0
    max_batch: Count = 0
    no_prefix_cache: bool = False
    threads: Count = 0
    model_dir: str = ""
    engine_command: str = ""
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    log_file: str = ""
    metrics_names: Literal["own", "vllm"] = "own"
    on_fatal: Literal["exit", "wait"] = "exit"
    insecure_no_auth: bool = False
    api_key_file: str = ""
    admin_key_file: str = ""
    cors_origins: str | list[str] = ""
    allowed_hosts: str | list[str] = ""


class ModelArgument(msgspec.Struct, frozen=True):
    """One entry of `--models`: `[NAME|NAME=]SOURCE[@GPU]`. Empty `names`: named by its source."""

    names: tuple[str, ...]
    source: str
    gpu: str | None = None


class Placement(msgspec.Struct, frozen=True):
    """One engine to start: which model argument (by position) on which device."""

    model: int
    device: str


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side needs. `api_keys` and `admin_keys` are SHA-256 digests; no API key means
    open, no key of either kind on loopback alone means `admin_open`.

    `cors_origins`: web pages that may call; `allowed_hosts`: names in Host headers, none = any.
    """

    host: str
    port: int
    api_keys: tuple[bytes, ...] = ()
    admin_keys: tuple[bytes, ...] = ()
    admin_open: bool = False
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    metrics_names: Literal["own", "vllm"] = "own"


class LimitConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits per replica (`max_concurrency`), per model (`max_queue…`), per request, at the end.

    A time limit of 0 is none.
    """

    max_concurrency: int  # 0 = as many as an engine runs at once
    max_queue: int
    max_queue_tokens: int
    request_timeout_s: float
    queue_timeout_s: float
    first_token_timeout_s: float
    drain_timeout_s: float
    hang_timeout_s: float
    idle_unload_s: float = 0.0
    on_fatal: Literal["exit", "wait"] = "exit"


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What all engines are told alike; zero means "decide from model and device"."""

    max_len: int
    dtype: DTypeName
    quant: QuantName
    rope_rule: RopeRule
    load_format: LoadFormat
    kv_bytes: int
    num_blocks: int
    step_tokens: int
    max_batch: int
    prefix_cache: bool
    threads: int
    command: tuple[str, ...] = ()  # words of --engine-command; empty = our own engine


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, resolved except for devices and files."""

    models: tuple[ModelArgument, ...]
    gpus: tuple[str, ...]  # empty = all there are
    http: HttpConfig
    limits: LimitConfig
    engine: EngineOptions
    model_dir: str
    chat_format: str  # its name, or
    chat_template: str  # a file; both empty = the model's own
    tool_parser: str  # empty = as its chat template says
    reasoning_parser: str  # the same
    log_format: LogFormat
    log_level: LogLevel
    log_file: str  # empty = standard error
    file: str = ""  # --config, which SIGHUP reads again


def resolve(
    options: Options,
    *,
    api_keys: tuple[bytes, ...] = (),
    admin_keys: tuple[bytes, ...] = (),
    fallback_timeout_s: float = 0.0,
) -> RouterConfig:
    """Options -> configs. `fallback_timeout_s` holds where no request time limit was given."""
    timeout_s = options.request_timeout
    if options.host not in LOOPBACK and not (api_keys or options.insecure_no_auth):
        raise ValueError(
            f"--host {options.host} would let anyone use this server: give --api-key-file FILE "
            "(or ROUTER_API_KEY), or --insecure-no-auth if that is meant"
        )
    if options.chat_format and options.chat_template:
        raise ValueError("--chat-format and --chat-template exclude each other: give one of them")
    return RouterConfig(
        models=parse_models(options.models),
        gpus=parse_gpus(options.gpus),
        http=HttpConfig(
            host=options.host,
            port=options.port,
            api_keys=api_keys,
            admin_keys=admin_keys,
            admin_open=not api_keys and not admin_keys and _only_local(options),
            cors_origins=parse_origins(options.cors_origins),
            allowed_hosts=_allowed_hosts(options, has_keys=bool(api_keys)),
            metrics_names=options.metrics_names,
        ),
        limits=LimitConfig(
            max_concurrency=options.max_concurrency,
            max_queue=options.max_queue,
            max_queue_tokens=options.max_queue_tokens,
            request_timeout_s=fallback_timeout_s if timeout_s is None else timeout_s,
            queue_timeout_s=options.queue_timeout,
            first_token_timeout_s=options.first_token_timeout,
            drain_timeout_s=options.drain_timeout,
            hang_timeout_s=options.hang_timeout,
            idle_unload_s=options.idle_unload,
            on_fatal=options.on_fatal,
        ),
        engine=_engine_options(options),
        model_dir=options.model_dir,
        chat_format=options.chat_format,
        chat_template=options.chat_template,
        tool_parser=options.tool_parser,
        reasoning_parser=options.reasoning_parser,
        log_format=options.log_format,
        log_level=options.log_level,
        log_file=options.log_file,
    )


def parse_origins(value: str | list[str]) -> tuple[str, ...]:
    """Origins of web pages as browsers send them, separated by commas; `*` is all of them."""
    origins = _entries(value)
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s*]+", origin):
            raise ValueError(
                f"--cors-origins: '{origin}' is no origin: write for example https://chat.example, "
                "without a path, or * for all"
            )
    return origins


def _allowed_hosts(options: Options, *, has_keys: bool) -> tuple[str, ...]:
    """Who needs no key must at least call the server by its name: see `origins.HostCheck`."""
    given = _entries(options.allowed_hosts)
    if given or has_keys or options.host not in LOOPBACK:
        return (*given, "localhost") if given else ()
    return ("localhost",)


def _only_local(options: Options) -> bool:
    """Who sits at a machine that asks nobody for a key may also operate it; but names that were
    allowed are those of a proxy, behind which others may sit."""
    return options.host in LOOPBACK and not _entries(options.allowed_hosts)


def _entries(value: str | list[str]) -> tuple[str, ...]:
    entries = value.split(",") if isinstance(value, str) else value
    return tuple(entry.strip() for entry in entries if entry.strip())


def _engine_options(options: Options) -> EngineOptions:
    try:
        command = tuple(shlex.split(options.engine_command))
    except ValueError as error:
        raise ValueError(f"--engine-command cannot be split into words ({error})") from error
    return EngineOptions(
        max_len=options.max_len,
        dtype=options.dtype,
        quant=options.quant,
        rope_rule=options.rope_rule,
        load_format=options.load_format,
        kv_bytes=parse_bytes(options.kv_memory),
        num_blocks=options.kv_blocks,
        step_tokens=options.step_tokens,
        max_batch=options.max_batch,
        prefix_cache=not options.no_prefix_cache,
        threads=options.threads,
        command=command,
    )


def parse_models(value: str | list[str]) -> tuple[ModelArgument, ...]:
    """`[NAME|NAME=]SOURCE[@GPU]`, separated by commas. Empty = the demo model."""
    entries = value.split(",") if isinstance(value, str) else value
    if isinstance(value, str) and not value.strip():
        return (ModelArgument((), DEMO_MODEL),)
    return tuple(_parse_model(entry.strip()) for entry in entries)


def _parse_model(entry: str) -> ModelArgument:
    names, equals, rest = entry.rpartition("=")
    source, at, gpu = rest.rpartition("@")
    if not at:
        source, gpu = rest, ""
    parts = tuple(name.strip() for name in names.split("|")) if equals else ()
    if not source.strip() or (at and not gpu.strip()) or not all(parts) or "\0" in entry:
        raise ValueError(f"--models: '{entry}' is not of the form [NAME=]SOURCE[@GPU]")
    return ModelArgument(parts, source.strip(), gpu.strip() or None)


def parse_gpus(value: str | list[str | int]) -> tuple[str, ...]:
    """Indices, UUIDs or `cpu`, separated by commas. Empty = all there are."""
    entries = value.split(",") if isinstance(value, str) else [str(entry) for entry in value]
    if isinstance(value, str) and not value.strip():
        return ()
    gpus = tuple(entry.strip() for entry in entries)
    for gpu in gpus:
        if not re.fullmatch(r"cpu|\d+|(GPU|MIG)-[0-9A-Za-z/-]+", gpu):
            raise ValueError(f"--gpus: '{gpu}' is no device index, UUID or 'cpu'")
    cards = [gpu for gpu in gpus if gpu != "cpu"]
    if len(set(cards)) != len(cards):
        raise ValueError("--gpus names a card twice; name it once, several models share it")
    return gpus


def parse_bytes(value: str | int) -> int:
    """`800M`, `2.5G`, `4GiB` or a plain number of bytes; units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"'{value}' is no amount of memory: write for example 800M or 4G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def place(models: tuple[ModelArgument, ...], devices: tuple[str, ...]) -> tuple[Placement, ...]:
    """Which model runs where.

    `NAME@GPU` is fixed. The others: as many models as devices -> pairwise; one model -> a replica
    on each device; more models than devices -> dealt out in turn (the memory plan must then agree).
    """
    fixed = [Placement(i, m.gpu) for i, m in enumerate(models) if m.gpu is not None]
    for placement in fixed:
        if placement.device not in devices:
            raise ValueError(
                f"--models puts '{models[placement.model].source}' on {placement.device}, "
                f"which is not in --gpus {','.join(devices)}"
            )
    free = [i for i, model in enumerate(models) if model.gpu is None]
    if not fixed and len(free) == 1:
        return tuple(Placement(free[0], device) for device in devices)
    if not fixed and len(free) < len(devices):
        raise ValueError(
            f"{len(free)} models and {len(devices)} GPUs: name one model per GPU, one model for "
            "all GPUs, or more models than GPUs"
        )
    dealt = [Placement(model, devices[i % len(devices)]) for i, model in enumerate(free)]
    return tuple(sorted([*fixed, *dealt], key=lambda placement: placement.model))


def key_digests(text: str) -> tuple[bytes, ...]:
    """API keys, one a line (blank lines and `#` comments skipped), as SHA-256 digests."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(
        hashlib.sha256(line.encode()).digest() for line in lines if line and line[0] != "#"
    )


def key_matches(key: bytes, digests: Iterable[bytes]) -> bool:
    """Is `key` one of them? Always compares with all, so that time tells nothing."""
    digest = hashlib.sha256(key).digest()
    matches = False
    for known in digests:
        matches |= hmac.compare_digest(digest, known)
    return matches
