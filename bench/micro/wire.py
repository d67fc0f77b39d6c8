"""Cost of the wire at a full batch of 256: encode, decode, and a real socket per step.

usage: python -m bench.micro.wire [--json FILE]

Prints medians in microseconds beside the budgets of a step (a StepOutput decoded and its tokens
handed out: 500; link input and output of one step: 100) and exits 1 if one is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from engine.config import EngineConfig
from engine.link import RouterLink, connect
from engine.protocol import (
    Ping,
    Sampling,
    Stats,
    StepOutput,
    Submit,
    decode_to_engine,
    decode_to_router,
    encode,
    pack_tokens,
    unpack_tokens,
)

BATCH = 256
PROMPT_TOKENS = 8000
# Median microseconds that must not be exceeded, for those that have a promise.
BUDGETS_US = {"decode and fan out": 500.0, "link per step": 100.0}


def median_us(work: Callable[[], object], rounds: int = 400) -> float:
    """Median time of one call, after some to warm up."""
    for _ in range(rounds // 10):
        work()
    times: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def step_output() -> StepOutput:
    """One step of a full batch, one token each."""
    return StepOutput(
        1, 100_000, tuple(range(70_000, 70_000 + BATCH)), (), pack_tokens(range(BATCH)), (),
        Stats(0, BATCH, 4096, 2048, 512, 100_000, 1_000_000, 2_000_000),
    )  # fmt: skip


def fan_out(frame: bytes, streams: dict[int, list[int]]) -> None:
    """What a router must at least do with a step: give every stream its token."""
    output = decode_to_router(frame)
    assert isinstance(output, StepOutput)
    for id_, token in zip(output.ids, unpack_tokens(output.tokens), strict=True):
        streams[id_].append(token)


def codec_us() -> dict[str, float]:
    """Encode and decode, without a socket."""
    output = step_output()
    frame = encode(output)
    streams: dict[int, list[int]] = {id_: [] for id_ in output.ids}
    tokens = list(range(PROMPT_TOKENS))
    submit = encode(Submit(1, 1, pack_tokens(tokens), Sampling(), 100))
    return {
        "encode step": median_us(lambda: encode(output)),
        "decode step": median_us(lambda: decode_to_router(frame)),
        "decode and fan out": median_us(lambda: fan_out(frame, streams)),
        "pack 8000 tokens": median_us(lambda: pack_tokens(tokens)),
        "decode submit of 8000": median_us(lambda: decode_to_engine(submit)),
    }


def link_us() -> dict[str, float]:
    """`RouterLink` against a ROUTER socket that another thread reads empty.

    "link idle receive" finds nothing; "link per step" receives what has arrived (nothing mostly,
    a message now and then) and sends a full StepOutput; "round trip" is a Ping answered at once.
    """
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        config = EngineConfig(endpoint=f"ipc://{folder}/s", replica=0, epoch=1, model="none")
        router = context.socket(zmq.ROUTER)
        router.bind(config.endpoint)
        socket = connect(context, config)
        parent_fd, parent_end = os.pipe()
        signal_fd, signal_end = os.pipe()
        link = RouterLink(socket, signal_fd, parent_fd, 1, sys.exit)
        output = step_output()
        link.send(output)
        identity, _frame = router.recv_multipart()
        ping = encode(Ping(1, 1))
        router.send_multipart([identity, ping])
        link.receive(None)

        def echo() -> None:
            link.receive(None)

        def round_trip() -> None:
            router.send_multipart([identity, ping])
            echo()

        found = {"link ping received": median_us(round_trip)}
        stop = threading.Event()
        reader = threading.Thread(target=_read_empty, args=(router, stop))
        reader.start()

        def step() -> None:
            time.sleep(0.001)  # the device's part: the reader keeps up as it would in life
            began = time.perf_counter()
            link.receive(0)
            link.send(output)
            times.append(time.perf_counter() - began)

        times: list[float] = []
        found["link idle receive"] = median_us(lambda: link.receive(0))
        for _ in range(400):
            step()
        found["link per step"] = statistics.median(times) * 1e6
        stop.set()
        reader.join()
        socket.close()
        router.close(linger=0)
        for fd in (parent_fd, parent_end, signal_fd, signal_end):
            os.close(fd)
    return found


def _read_empty(router: zmq.Socket[bytes], stop: threading.Event) -> None:
    while not stop.is_set():
        if router.poll(10):
            router.recv_multipart()


def main(words: list[str]) -> int:
    """Command line; the exit status is 1 if a budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    path: Path | None = parser.parse_args(words).json
    found = codec_us() | link_us()
    exceeded = [name for name, budget in BUDGETS_US.items() if found[name] > budget]
    for name, microseconds in found.items():
        budget = f"   budget {BUDGETS_US[name]:.0f}" if name in BUDGETS_US else ""
        mark = "   EXCEEDED" if name in exceeded else ""
        print(f"{name:24} {microseconds:9.1f} us{budget}{mark}")
    print(f"{'bytes of a step':24} {len(encode(step_output())):9d}")
    if path is not None:
        path.write_text(json.dumps({"median_us": found, "budget_us": BUDGETS_US}, indent=1))
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
