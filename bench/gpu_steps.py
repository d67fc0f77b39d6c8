"""What a step of the engine costs on a card, and which kernels take the time.

    python -m bench.gpu_steps --model FOLDER [--rows 1,8,32,64,128,256] [--prompts 32,512,2048]

Owns the measurement of steps without router and sockets: made-up weights of a real shape, plans
made by hand, launched one ahead as the engine's loop does. For each step: milliseconds, the host's
share of them, and kernel by kernel microseconds from torch's profiler, beside the bytes that must
be read at 3.07 TB/s. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.device.build import Device, build_device
from engine.plan import Admit, Row, StepPlan
from engine.protocol import Sampling

READ_BYTES_PER_S = 3.07e12  # an H100's, measured
GREEDY = Sampling(temperature=0.0)
STEPS, WARM_STEPS, PROFILED = 40, 6, 4


class Bench:
    """One engine's device, and sequences of made-up tokens in it."""

    def __init__(self, device: Device, *, profiled: bool) -> None:
        self._device = device
        self._profiled = profiled
        self._size = device.limits.block_size
        self._random = random.Random(1)
        self._step = 0

    def launch(self, rows: list[Row], admits: Sequence[Admit] = ()) -> object:
        self._step += 1
        return self._device.runner.launch(StepPlan(self._step, rows, list(admits), [], []))

    def fill(self, count: int, context: int, room: int) -> None:
        """`count` sequences of `context` computed tokens, with blocks for `room` more."""
        each = -(-(context + room) // self._size)
        for slot in range(count):
            blocks = list(range(each * slot, each * slot + each))
            tokens = [self._random.randrange(10, 30000) for _ in range(context)]
            admit = Admit(slot, tokens, context, blocks, GREEDY, ())
            for at in range(0, context, 2048):
                end = min(at + 2048, context)
                row = Row(slot, slot, at, end - at, samples=end == context)
                self.launch([row], [admit] if at == 0 else []).result()  # type: ignore[attr-defined]

    def decode(self, count: int, context: int) -> None:
        """Prints one line for a step of `count` rows, and its kernels."""
        self.fill(count, context, WARM_STEPS + STEPS + PROFILED + 2)
        position = context

        def run(steps: int) -> float:
            nonlocal position
            pending, host_s = None, 0.0
            for _ in range(steps):
                rows = [Row(slot, slot, position, 1, samples=True) for slot in range(count)]
                began_s = time.perf_counter()
                launched = self.launch(rows)
                host_s += time.perf_counter() - began_s
                if pending is not None:
                    pending.result()  # type: ignore[attr-defined]
                pending = launched
                position += 1
            pending.result()  # type: ignore[union-attr]
            return host_s

        run(2)
        time.sleep(0.6)  # a graph is captured on demand only so often
        run(WARM_STEPS - 2)
        began_s = time.perf_counter()
        host_s = run(STEPS)
        step_s = (time.perf_counter() - began_s) / STEPS
        limits = self._device.limits
        per_token = limits.kv_bytes / (limits.num_blocks * self._size)
        read = limits.weights_bytes - limits.vocab_size * limits.embedding_size * 2
        floor_s = (read + count * context * per_token) / READ_BYTES_PER_S
        print(
            f"decode {count} x {context}: {step_s * 1e3:.2f} ms, {count / step_s:.0f} tok/s, "
            f"{floor_s / step_s:.0%} of the read limit, host {host_s / STEPS * 1e3:.2f} ms"
        )
        self.profile(lambda: run(PROFILED), PROFILED)

    def prompt(self, tokens: int) -> None:
        """Prints one line for a lone prompt, and its kernels."""
        blocks = list(range(-(-tokens // self._size)))
        times: list[float] = []

        def run() -> float:
            ids = [self._random.randrange(10, 30000) for _ in range(tokens)]
            admit = Admit(0, ids, tokens, blocks, GREEDY, ())
            began_s = time.perf_counter()
            launched = self.launch([Row(0, 0, 0, tokens, samples=True)], [admit])
            host_s = time.perf_counter() - began_s
            launched.result()  # type: ignore[attr-defined]
            times.append(time.perf_counter() - began_s)
            return host_s

        run()
        time.sleep(0.6)
        hosts = [run() for _ in range(8)]
        middle = sorted(times[2:])[len(times) // 2 - 1]
        print(f"prompt {tokens}: {middle * 1e3:.2f} ms, host {sorted(hosts)[4] * 1e3:.2f} ms")
        self.profile(run, 1)

    def mixed(self, decodes: int, context: int, tokens: int) -> None:
        """Prints one line for decode rows beside one chunk of a prompt, launched one ahead."""
        self.fill(decodes, context, STEPS + 4)
        each = -(-(context + STEPS + 4) // self._size)
        blocks = list(range(each * decodes, each * decodes - (-tokens // self._size)))
        position = context

        def run(steps: int) -> None:
            nonlocal position
            pending = None
            for _ in range(steps):
                rows = [Row(slot, slot, position, 1, samples=True) for slot in range(decodes)]
                ids = [self._random.randrange(10, 30000) for _ in range(tokens)]
                admit = Admit(decodes, ids, tokens, blocks, GREEDY, ())
                rows.append(Row(decodes, decodes, 0, tokens, samples=True))
                launched = self.launch(rows, [admit])
                if pending is not None:
                    pending.result()  # type: ignore[attr-defined]
                pending = launched
                position += 1
            pending.result()  # type: ignore[attr-defined]

        run(3)
        began_s = time.perf_counter()
        run(20)
        step_s = (time.perf_counter() - began_s) / 20
        total = decodes + tokens
        token_us = step_s / total * 1e6
        print(f"mixed {decodes} + {tokens}: {step_s * 1e3:.2f} ms, {token_us:.2f} us a token")
        self.profile(lambda: run(4), 4)

    def profile(self, run: object, steps: int) -> None:
        if not self._profiled:
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()  # type: ignore[operator]
            torch.cuda.synchronize()
        times, counts = Counter[str](), Counter[str]()
        with tempfile.NamedTemporaryFile(suffix=".json") as trace:
            profiler.export_chrome_trace(trace.name)
            events = json.loads(Path(trace.name).read_text())["traceEvents"]
        for event in events:
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
                grid = event["args"].get("grid", "")
                name = f"{event['name'][:60]} {grid}"
                times[name] += event["dur"] / steps
                counts[name] += 1
        total = sum(times.values())
        print(f"    kernels {total / 1e3:.2f} ms")
        for name, took in times.most_common(12):
            print(f"    {took:8.0f} us {counts[name] / steps:6.1f} x {name}", flush=True)


def main() -> int:
    """Prints the lines; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", default="1,8,32,64,128,256")
    parser.add_argument("--prompts", default="32,512,2048")
    parser.add_argument("--mixed", default="64x256,64x448,128x384,128x512,128x896")
    parser.add_argument("--context", type=int, default=576)
    parser.add_argument("--quant", default="none")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--captured", action="store_true", help="all usual graphs first")
    options = parser.parse_args()
    began_s = time.monotonic()
    config = EngineConfig(
        endpoint="ipc://none",
        replica=0,
        epoch=0,
        model=options.model,
        device="cuda:0",
        dtype="float16",
        load_format="dummy",
        quant=options.quant,
        max_batch=320,
        step_tokens=2048,
        max_len=4096,
        num_blocks=8192 if "vicuna" not in options.model else 3500,
    )
    device = build_device(config)
    print(f"built in {time.monotonic() - began_s:.1f} s", flush=True)
    if options.captured:
        while device.runner.idle():
            pass
        print(f"captured after {time.monotonic() - began_s:.1f} s", flush=True)
    bench = Bench(device, profiled=not options.no_profile)
    for count in filter(None, options.prompts.split(",")):
        bench.prompt(int(count))
    for count in filter(None, options.rows.split(",")):
        bench.decode(int(count), options.context)
    for pair in filter(None, options.mixed.split(",")):
        decodes, tokens = map(int, pair.split("x"))
        bench.mixed(decodes, options.context, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
