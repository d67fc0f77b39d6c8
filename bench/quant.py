"""What each --quant costs and saves: perplexity, memory, load peak and speed of one model.

    python -m bench.quant                            # the demo model on the CPU, about 4 minutes
    python -m bench.quant --quants none,int8 --model FOLDER --device cuda:0

Owns the comparison: the same text and weights, rounds in turn, each engine in a fresh process that
runs alone; medians of the speeds. The engine is driven in process, without router and sockets.
Memory is what a load adds to the process: anonymous memory on a CPU, torch's own count on a GPU;
`code` is what the imports took before it.
Prints a Markdown table and writes all figures to bench/results/quant-<date>.json. Needs Linux, the
test extras and, without --model, the demo model.

Exit codes: 0 measured, 1 a measurement failed, 64 usage.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bench import report
from bench.cpu import ROOT, demo_model
from bench.report import median

if TYPE_CHECKING:
    from engine.device.build import Device
    from router.checkpoint.facts import Checkpoint

QUANTS = ("none", "int8", "bnb-int8", "nf4")
TEXT = ROOT / "tests" / "data" / "alice.txt"

DECODE_PROMPT_TOKENS = 37
DECODE_TOKENS = 64
REPEATS = 3
BLOCK_SIZE = 32
STEP_TOKENS = 512
_LOAD_BLOCKS = 4  # a KV cache too small to count, while the load is measured
_SAMPLE_S = 0.001


class Task(msgspec.Struct, frozen=True):
    """What one process measures."""

    model: str
    quant: str
    text: str
    threads: int = 2
    device: str = "cpu"
    dtype: str = "auto"
    repeats: int = REPEATS  # of the decode


class Figures(msgspec.Struct, kw_only=True):
    """What was measured of one engine. Linear layers are all weights but embedding and norms."""

    quant: str
    dtype: str
    tokens: int
    perplexity: float
    code_bytes: int  # what torch, the engine and bitsandbytes take before anything is loaded
    weights_bytes: int
    linear_bytes: int
    linear_fp16_bytes: int
    loaded_bytes: int  # what the loaded engine holds more than the empty process
    load_peak_bytes: int  # the most that it held more while it loaded
    load_s: float
    prefill_s: float
    decode_tok_s: list[float]

    @property
    def linear_share(self) -> float:
        """Memory of the linear layers as a share of what 16 bits would take."""
        return self.linear_bytes / self.linear_fp16_bytes

    @property
    def peak_share(self) -> float:
        """Peak of the load as a share of the weights."""
        return self.load_peak_bytes / self.weights_bytes


def measure(task: Task) -> Figures:
    """One engine, in a process of its own. Raises RuntimeError with the end of its output."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.quant", "--worker"],
        input=msgspec.json.encode(task),
        capture_output=True,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"--quant {task.quant} failed:\n{done.stderr.decode()[-2000:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Figures)


# -- in the process that is measured


def work(task: Task) -> Figures:
    """Loads the engine twice: for the memory, and with a KV cache for the text."""
    from router.checkpoint.facts import read_checkpoint

    empty_bytes = _anonymous_bytes()
    _import_all(task)
    code_bytes = _anonymous_bytes() - empty_bytes
    with watched(task.device) as memory:
        device = _device(task, _LOAD_BLOCKS)
    limits = device.limits
    del device
    ids = _ids(task)
    device = _device(task, -(-(len(ids) + BLOCK_SIZE) // BLOCK_SIZE))
    began_s = time.monotonic()
    perplexity = perplexity_of(device, ids)
    prefill_s = time.monotonic() - began_s
    linear, other = linear_sizes(read_checkpoint(Path(task.model)))
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[limits.dtype]
    return Figures(
        quant=task.quant,
        dtype=limits.dtype,
        tokens=len(ids),
        perplexity=perplexity,
        code_bytes=code_bytes,
        weights_bytes=limits.weights_bytes,
        linear_bytes=limits.weights_bytes - other * size,
        linear_fp16_bytes=linear * 2,
        loaded_bytes=memory.after_bytes - memory.before_bytes,
        load_peak_bytes=memory.peak_bytes - memory.before_bytes,
        load_s=limits.load_s,
        prefill_s=prefill_s,
        decode_tok_s=[decode_rate(device, ids[:DECODE_PROMPT_TOKENS]) for _ in range(task.repeats)],
    )


def linear_sizes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Weights of a decoder's linear layers, head included, and of embedding and norms."""
    facts = checkpoint.facts
    embedding = facts.vocab_size * facts.hidden_size
    other = embedding + (2 * facts.num_layers + 1) * facts.hidden_size
    parameters = checkpoint.num_parameters + (embedding if facts.tied else 0)
    return parameters - other, other


def _import_all(task: Task) -> None:
    """Code that is imported on demand is no part of a load."""
    import torch

    import engine.device.build  # noqa: F401
    from engine.quant.methods import linear_method

    quant: Any = task.quant
    linear_method(quant, torch.device(task.device), torch.float32)


class Memory:
    """Bytes of the process before, at most and after; each is read by `watched`."""

    def __init__(self, now_bytes: int) -> None:
        self.before_bytes = self.peak_bytes = self.after_bytes = now_bytes

    def observe(self, now_bytes: int) -> None:
        """A reading."""
        self.after_bytes = now_bytes
        self.peak_bytes = max(self.peak_bytes, now_bytes)


@contextmanager
def watched(device: str) -> Generator[Memory]:
    """Memory while the block runs; torch counts a GPU's itself, a thread watches the process's."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        memory = Memory(torch.cuda.memory_allocated())
        yield memory
        memory.observe(torch.cuda.max_memory_allocated())
        memory.observe(torch.cuda.memory_allocated())
        return
    memory, done = Memory(_anonymous_bytes()), threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_S):
            memory.observe(_anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.observe(_anonymous_bytes())


def _anonymous_bytes() -> int:
    """Resident memory that is no file's: pages of mapped weight files do not count."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not tell RssAnon")


def _device(task: Task, num_blocks: int) -> Device:
    from engine.config import EngineConfig
    from engine.device.build import build_device

    orders: dict[str, Any] = {"quant": task.quant, "device": task.device, "dtype": task.dtype}
    config = EngineConfig(
        endpoint="",
        replica=0,
        epoch=0,
        model=task.model,
        threads=task.threads,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        **orders,
    )
    return build_device(config)


def _ids(task: Task) -> list[int]:
    """The text's tokens; its first paragraph tells where it is from and is left out."""
    from router.text.model import load_text

    _, _, text = Path(task.text).read_text(encoding="utf-8").partition("\n\n")
    tokenizer = load_text(Path(task.model)).tokenizer
    return tokenizer.encode(text, add_special=True, parse_special=False)


def perplexity_of(device: Device, ids: list[int]) -> float:
    """exp of the mean negative log-probability of every token after the first."""
    scores = _run(device, ids, 0, prompt_logprobs=0)
    return math.exp(-sum(scores) / len(scores))


def decode_rate(device: Device, prompt: list[int]) -> float:
    """Tokens a second after the first one, one sequence alone."""
    seconds: list[float] = []
    for max_new in (1, 1 + DECODE_TOKENS):
        began_s = time.monotonic()
        _run(device, prompt, max_new)
        seconds.append(time.monotonic() - began_s)
    return DECODE_TOKENS / (seconds[1] - seconds[0])


def _run(device: Device, ids: list[int], max_new: int, prompt_logprobs: int = -1) -> list[float]:
    """One greedy sequence to its end; returns the log-probabilities of its prompt, if asked."""
    from engine.blocks import BlockPool
    from engine.protocol import Sampling, Submit, pack_tokens, unpack_floats
    from engine.scheduler import Scheduler

    pool = BlockPool(device.limits.num_blocks, device.limits.block_size, None)
    scheduler = Scheduler(pool, device.limits, step_tokens=STEP_TOKENS)
    sampling = Sampling(temperature=0.0, prompt_logprobs=prompt_logprobs)
    scheduler.add(Submit(0, 1, pack_tokens(ids), sampling, max_new))
    scores: list[float] = []
    while scheduler.busy:
        plan = scheduler.plan()
        if plan is not None:
            scheduler.commit(plan, device.runner.launch(plan).result())
        output = scheduler.take_output()
        for entry in output.prompt_logprobs if output else ():
            scores += unpack_floats(entry.chosen)
    return scores


# -- the comparison


def markdown(results: dict[str, list[Figures]]) -> str:
    """The table; speeds are medians over all rounds, the rest is the first round's."""
    head = "quant | perplexity | linear layers, of 16 bits | weights | load peak, of the weights"
    rows = [f"| {head} | code | load | prefill | decode |", "|" + "---|" * 9]
    base = results.get("none")
    for quant, rounds in results.items():
        one = rounds[0]
        change = f" ({one.perplexity / base[0].perplexity - 1:+.2%})" if base else ""
        prefill = one.tokens / median([each.prefill_s for each in rounds])
        decode = median([rate for each in rounds for rate in each.decode_tok_s])
        rows.append(
            f"| {quant}, {one.dtype} | {one.perplexity:.3f}{change} | {one.linear_share:.3f} "
            f"| {one.weights_bytes / 1e6:,.0f} MB "
            f"| {one.load_peak_bytes / 1e6:,.0f} MB, {one.peak_share:.2f} "
            f"| {one.code_bytes / 1e6:,.0f} MB | {median([each.load_s for each in rounds]):.1f} s "
            f"| {prefill:,.0f} tok/s | {decode:.1f} tok/s |"
        )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the figures; returns the exit code."""
    parser = argparse.ArgumentParser(
        "bench.quant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="folder or .gguf file (default: the demo model)")
    parser.add_argument("--quants", default=",".join(QUANTS), help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--save", type=Path, help="default: bench/results/quant-<date>.json")
    args = parser.parse_args(argv)
    if args.worker:
        figures = work(msgspec.json.decode(sys.stdin.buffer.read(), type=Task))
        sys.stdout.buffer.write(msgspec.json.encode(figures) + b"\n")
        return 0
    quants: list[str] = args.quants.split(",")
    if args.rounds < 1 or not set(quants) <= set(QUANTS):
        _say(f"--rounds is at least 1, --quants is of {','.join(QUANTS)}")
        return 64
    facts = report.host_facts()
    results: dict[str, list[Figures]] = {quant: [] for quant in quants}
    try:
        model = str(args.model or demo_model())
        for number in range(args.rounds):
            for quant in quants:
                _say(f"round {number + 1} of {args.rounds}: {quant}")
                task = Task(model, quant, str(TEXT), args.threads, args.device, args.dtype)
                results[quant].append(measure(task))
    except RuntimeError as error:
        _say(str(error))
        return 1
    print(markdown(results))
    path: Path = args.save or ROOT / "bench" / "results" / f"quant-{facts['date']}.json"
    settings = {"model": Path(model).name, "text": TEXT.name, "threads": args.threads}
    report.save_json(path, facts | settings | {"rounds": msgspec.to_builtins(results)})
    _say(f"figures in {path}")
    return 0


def _say(text: str) -> None:
    print(f"bench.quant: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
