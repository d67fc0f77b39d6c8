"""The engine process: orders in, objects built, loop run, exit code out.

Owns the wiring and the boundary at which an exception becomes `Fatal` and an exit code. Nothing
below this file reads the environment or the command line. torch is imported only after the thread
counts are set, and only once the router has heard that a load has begun.

Exit codes: 0 drained · 64 unreadable orders · 70 fatal · 75 not enough memory · 78 model or
settings unusable · 128+n second signal n · 1 the router is gone.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import msgspec
import zmq

from engine.blocks import BlockPool
from engine.compiling import Compiling
from engine.config import EngineConfig, ModelError, NotEnoughMemory, decode_config
from engine.encoding import EncoderScheduler
from engine.link import (
    RouterLink,
    catch_signals,
    connect,
    leave_with_parent,
    send,
    show_stacks_on_demand,
)
from engine.loop import EngineLoop, SchedulerLike, run
from engine.prefix import PrefixIndex
from engine.protocol import PROTOCOL_VERSION, Busy, Fatal, Limits, Ready
from engine.scheduler import Scheduler

EXIT_USAGE = 64
EXIT_FATAL = 70
EXIT_MEMORY = 75
EXIT_CONFIG = 78

_STDIN = 0
_MAX_LINE_BYTES = 1024 * 1024
# How long the last messages may take to leave a process that ends in order.
_FAREWELL_MS = 500
# What a load may take before the router gives up: start-up plus reading at a slow disk's pace.
_START_S, _LOAD_BYTES_PER_S = 120.0, 50e6


def read_line(fd: int) -> bytes:
    """One line from `fd`, newline included, and not a byte more: the rest is the parent pipe.

    Shorter than a line if `fd` ends first or the line exceeds 1 MiB.
    """
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES:
        byte = os.read(fd, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


def expected_load_s(model: Path) -> float:
    """Upper estimate of a load's seconds from the size of the files, of which none is read."""
    files = [model] if model.is_file() else [*model.glob("*.safetensors"), *model.glob("*.bin")]
    return _START_S + sum(file.stat().st_size for file in files) / _LOAD_BYTES_PER_S


def build_loop(config: EngineConfig) -> tuple[EngineLoop, Ready]:
    """The object graph: device, pool, scheduler, loop. The import of torch happens here.

    Raises `ModelError` or `NotEnoughMemory`.
    """
    from engine.device.build import build_device

    runner, limits = build_device(config)
    scheduler = build_scheduler(config, limits)
    compiling = Compiling(limits.vocab_size)
    loop = EngineLoop(
        scheduler, runner, epoch=config.epoch, overlap=config.overlap, compiling=compiling
    )
    return loop, Ready(config.epoch, PROTOCOL_VERSION, limits)


def build_scheduler(config: EngineConfig, limits: Limits) -> SchedulerLike:
    """The decisions that fit the model: of one that generates, over a pool of KV blocks."""
    if not limits.generates:
        return EncoderScheduler(limits, step_tokens=config.step_tokens, epoch=config.epoch)
    index = PrefixIndex(os.urandom(32)) if config.prefix_cache else None
    pool = BlockPool(limits.num_blocks, limits.block_size, index)
    return Scheduler(
        pool,
        limits,
        step_tokens=config.step_tokens,
        mixed_tokens=config.mixed_tokens,
        epoch=config.epoch,
    )


def serve(config: EngineConfig, socket: zmq.Socket[bytes]) -> int:
    """Load, announce, run; returns the exit code. The engine's one boundary for exceptions.

    Until the load is done signals keep their default action: there is nothing to drain yet.
    """
    try:
        send(socket, Busy(config.epoch, "load", expected_load_s(Path(config.model))))
        loop, ready = build_loop(config)
        link = RouterLink(socket, catch_signals(), _STDIN, config.epoch, report)
        link.send(ready)
        return run(loop, link)
    except Exception as error:  # noqa: BLE001 - the router must learn why, whatever it is
        fatal = describe(error, config.epoch)
        if fatal.code == EXIT_FATAL:
            report(traceback.format_exc())
        report(fatal.reason)
        send(socket, fatal)
        return fatal.code


def describe(error: Exception, epoch: int) -> Fatal:
    """An exception as the last message of the engine."""
    match error:
        case ModelError():
            return Fatal(epoch, str(error), EXIT_CONFIG)
        case NotEnoughMemory():
            return Fatal(epoch, str(error), EXIT_MEMORY)
        case MemoryError():
            return Fatal(epoch, "the machine has no memory left for the engine", EXIT_MEMORY)
        case _:
            return Fatal(epoch, f"{type(error).__name__}: {error}", EXIT_FATAL)


def report(text: str) -> None:
    """Lines for the operator. A closed or full stderr costs the lines, not the engine."""
    try:
        sys.stderr.write(f"engine: {text.rstrip()}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def main() -> int:
    """Run one engine under the orders that arrive on standard input; returns the exit code."""
    show_stacks_on_demand()
    try:
        config = decode_config(read_line(_STDIN))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        report(f"the first line of standard input is no engine configuration: {error}")
        return EXIT_USAGE
    leave_with_parent(_STDIN)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(config.threads))
    with zmq.Context() as context:
        try:
            socket = connect(context, config)
        except zmq.ZMQError as error:
            report(f"cannot connect to {config.endpoint!r}: {error}")
            return EXIT_USAGE
        try:
            return serve(config, socket)
        finally:
            socket.close(linger=_FAREWELL_MS)


if __name__ == "__main__":
    sys.exit(main())
