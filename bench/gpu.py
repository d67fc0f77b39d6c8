"""Speed of the whole server on one GPU, beside vLLM's anchors.

    python -m bench.gpu                                       # all of `bench.shapes.MATRIX`
    python -m bench.gpu --rows 'c=(1|64)$' --models chatglm2-6b
    python -m bench.gpu --client ../shared/bench/closed_loop.py --repeat 3

Owns router processes, the order of the rows and their report. For each model it starts a router
with random weights of the released shape, measures the time until it is ready and its first answer,
then runs the rows one after the other, each after a few requests of its own kind. The client is a
process of its own (`bench.closed_loop`, or any program with its options and its line of output).
The anchors were measured with the yardstick of the third line, whose TTFT reads 1 to 5 ms more
(seen on two cores): compare TTFT by the same client. Rates are alike.
The whole matrix takes about five minutes. Prints a line for each row (the columns are explained by
a first line) and writes bench/results/CARD-<date>.json after every row; times there are in ms.

A row that fails is reported with the end of the router's log, and the others go on.

Exit codes: 0 all rows were measured, 1 one failed, 64 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench import report
from bench.client import ClientError, Target
from bench.drive import ask_once, run_async
from bench.shapes import MATRIX, QUANT_BYTES, Row, estimated_s, floor_tok_s

ROOT = Path(__file__).resolve().parent.parent
USAGE = 64
READY_S, CLIENT_S, STOP_S = 180.0, 150.0, 40.0
WARM_OUTPUT = 16  # tokens of each answer of the requests before a row
LOG_LINES = 20

# Each run takes its prompts from another range of ids. The client's random ids depend on that range
# and on nothing else, so the same one again would be answered from the prefix cache. The stride
# puts ranges that follow each other so far apart that their prompts part within some ten tokens.
_VOCAB_LOW, _VOCAB_SPAN, _VOCAB_STRIDE = 16_500, 13_500, 5_077

_LINE = re.compile(
    r"(?P<tok_s>[\d.]+) tok/s (?P<req_s>[\d.]+) req/s "
    r"TTFT p50 (?P<ttft_p50>[\d.]+) p99 (?P<ttft_p99>[\d.]+) TPOT p50 (?P<tpot_p50>[\d.]+) "
    r"ITL p50 (?P<itl_p50>[\d.]+) p99 (?P<itl_p99>[\d.]+) ms"
)
_HEADER = (
    f"{'row':<34}{'tok/s':>8}{'vLLM':>8}{'':>7}{'goal':>7}{'floor':>7}"
    f"{'TTFT p50':>10}{'vLLM':>7}{'p99':>8}{'TPOT':>7}{'ITL p50':>9}{'p99':>7}"
)


class Figures(msgspec.Struct, frozen=True):
    """What one run of the client printed; times in ms."""

    tok_s: float
    req_s: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    itl_p50: float
    itl_p99: float


class Settings(NamedTuple):
    """The same for every row. `router_words` come last on the router's command line."""

    quant: str
    gpus: str
    dtype: str
    router_words: list[str]
    client: list[str]
    settle_s: float


class RowFailed(Exception):
    """A row without figures; the text is one line for the report."""


def parse_line(output: str) -> Figures:
    """The figures in the client's last line. Raises `RowFailed` if there are none."""
    for line in reversed(output.splitlines()):
        found = _LINE.search(line)
        if found:
            return Figures(**{name: float(value) for name, value in found.groupdict().items()})
    last = output.strip().splitlines()[-1:] or ["nothing"]
    raise RowFailed(f"the client printed no figures: {last[0][:300]}")


def vocab_of(run: int) -> int:
    """Ids of the prompts of run number `run` are below this."""
    return _VOCAB_LOW + run * _VOCAB_STRIDE % _VOCAB_SPAN


def client_words(row: Row, vocab: int, url: str) -> list[str]:
    """The client's options for a row."""
    return [
        *("--url", url, "--model", row.model, "-c", str(row.c), "-n", str(row.requests)),
        *("-i", str(row.unique), "-o", str(row.output), "--shared-prefix", str(row.prefix)),
        *("--vocab", str(vocab), "--procs", str(row.procs)),
    ]


def warm_up_of(row: Row) -> Row:
    """The requests before a row: of its kind and width but short; the same ones for hits."""
    if row.hits:
        return row
    return row._replace(requests=max(2, row.c), output=min(row.output, WARM_OUTPUT))


def line_of(row: Row, figures: Figures, quant: str) -> str:
    """One line of the report, its columns under `_HEADER`."""

    def known(value: float, width: int) -> str:
        return f"{value:{width}.0f}" if value else f"{'-':>{width}}"

    # Anchors and goals are for 16 bits; a hit's rate says little beside its TTFT.
    vllm, floor = row.vllm, floor_tok_s(row, quant)
    ratio = f"{figures.tok_s / vllm.tok_s:6.2f}x" if vllm.tok_s else f"{'':7}"
    share = f"{figures.tok_s / floor:7.0%}" if floor else f"{'-':>7}"
    name = row.name if quant == "none" else f"{row.name} {quant}"
    return (
        f"{name:<34}{figures.tok_s:8.0f}{known(vllm.tok_s, 8)}{ratio}{known(row.goal.tok_s, 7)}"
        f"{share}{figures.ttft_p50:10.1f}{known(vllm.ttft_ms, 7)}{figures.ttft_p99:8.1f}"
        f"{figures.tpot_p50:7.2f}{figures.itl_p50:9.2f}{figures.itl_p99:7.2f}"
    )


def entry_of(row: Row, run: int, quant: str) -> dict[str, Any]:
    """What the results say of a row besides its figures. `in` are the prompt's unique tokens."""
    return {
        "model": row.model,
        "row": row.name,
        "run": run,
        "quant": quant,
        "c": row.c,
        "n": row.requests,
        "prefix": row.prefix,
        "in": row.unique,
        "out": row.output,
        "procs": row.procs,
        "hits": row.hits,
        "vllm_tok_s": row.vllm.tok_s,
        "floor_tok_s": round(floor_tok_s(row, quant), 1),
    }


class Router:
    """A router process: where it listens, what it logged."""

    def __init__(self, words: list[str], log: Path) -> None:
        """Starts it; it is ready only after `wait`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.target = Target("127.0.0.1", port)
        self._log = log
        self._began_s = time.monotonic()
        command = [sys.executable, "-m", "router.cli", *words, "--port", str(port)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    @property
    def url(self) -> str:
        return f"http://{self.target.host}:{self.target.port}"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> float:
        """Seconds from the start until it is ready. Raises `RowFailed`."""
        while self.alive and time.monotonic() < self._began_s + READY_S:
            with contextlib.suppress(ClientError):
                status, _ = run_async(ask_once(self.target, "GET", "/health/ready"))
                if status == 200:
                    return time.monotonic() - self._began_s
            time.sleep(0.05)
        state = "is not ready" if self.alive else f"ended with {self._process.returncode}"
        raise RowFailed(f"the router {state}")

    def first_answer_ms(self, model: str) -> float:
        """Milliseconds of one answer of one token to 16 tokens. Raises `RowFailed`."""
        body = {"model": model, "prompt": list(range(100, 116)), "max_tokens": 1, "temperature": 0}
        began_s = time.monotonic()
        try:
            status, answer = run_async(
                ask_once(self.target, "POST", "/v1/completions", msgspec.json.encode(body))
            )
        except ClientError as error:
            raise RowFailed(f"the first answer: {error}") from error
        if status != 200:
            raise RowFailed(f"the first answer: {status} {answer[:200]!r}")
        return (time.monotonic() - began_s) * 1e3

    def log_tail(self) -> str:
        """The end of its log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line[:300]}" for line in lines[-LOG_LINES:])

    def stop(self) -> None:
        """SIGTERM, twice if one is not enough, then SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.alive:
                self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_S)
                return


def run_client(words: list[str]) -> Figures:
    """One run of the client. Raises `RowFailed`; none of its processes is left then."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=CLIENT_S)
    except subprocess.TimeoutExpired as error:
        raise RowFailed(f"not done after {CLIENT_S:.0f} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        last = (errors.strip() or output.strip()).splitlines()[-1:] or ["no message"]
        raise RowFailed(f"the client ended with {process.returncode}: {last[0][:300]}")
    return parse_line(output)


class Report:
    """What was measured so far, written after every row."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.num_failed = 0
        self._path = path
        self._results: dict[str, Any] = {**facts, "ready_s": {}, "first_answer_ms": {}, "rows": []}

    def start(self, model: str, ready_s: float, first_ms: float) -> None:
        self._results["ready_s"][model] = round(ready_s, 2)
        self._results["first_answer_ms"][model] = round(first_ms, 1)
        print(f"{model}: ready after {ready_s:.1f} s, first answer {first_ms:.0f} ms", flush=True)
        self._save()

    def row(self, entry: dict[str, Any], figures: Figures) -> None:
        self._results["rows"].append({**entry, **msgspec.structs.asdict(figures)})
        self._save()

    def failure(self, entry: dict[str, Any], problem: str, log_tail: str) -> None:
        self.num_failed += 1
        self._results["rows"].append({**entry, "error": problem})
        print(f"{entry['row']}: FAILED: {problem}\n{log_tail}", flush=True)
        self._save()

    def _save(self) -> None:
        report.save_json(self._path, self._results)


@contextlib.contextmanager
def running(words: list[str], log: Path) -> Generator[Router, None, None]:
    """A router that is stopped at the end, whatever happens."""
    router = Router(words, log)
    try:
        yield router
    finally:
        router.stop()


def measure_model(
    rows: list[tuple[Row, int]], folder: Path, settings: Settings, results: Report
) -> None:
    """All (row, run) of one model; a router that dies is started anew for the rows left."""
    model = rows[0][0].model
    words = [
        *("--models", f"{model}={folder}", "--gpus", settings.gpus, "--load-format", "dummy"),
        *("--dtype", settings.dtype, "--quant", settings.quant, *settings.router_words),
    ]
    left = list(rows)
    number = 0
    with tempfile.TemporaryDirectory() as logs:
        while left:
            with running(words, Path(logs, "router.log")) as router:
                try:
                    ready_s = router.wait()
                    results.start(model, ready_s, router.first_answer_ms(model))
                except RowFailed as failed:
                    row, run = left.pop(0)
                    results.failure(
                        entry_of(row, run, settings.quant), str(failed), router.log_tail()
                    )
                    if number == 0:  # it never was ready: nor will it be for the others
                        results.num_failed += len(left)
                        return
                    continue
                time.sleep(settings.settle_s)
                while left:
                    row, run = left.pop(0)
                    number += 1
                    measure_row(row, run, (router, settings, results), number)
                    if not router.alive:
                        break


def measure_row(row: Row, run: int, around: tuple[Router, Settings, Report], number: int) -> None:
    """Warm-up, measurement, report."""
    router, settings, results = around
    entry = entry_of(row, run, settings.quant)
    vocab = vocab_of(2 * number)
    warm_vocab = vocab if row.hits else vocab_of(2 * number + 1)
    try:
        run_client([*settings.client, *client_words(warm_up_of(row), warm_vocab, router.url)])
        figures = run_client([*settings.client, *client_words(row, vocab, router.url)])
    except RowFailed as failed:
        results.failure(entry, str(failed), router.log_tail())
        return
    print(line_of(row, figures, settings.quant), flush=True)
    results.row(entry, figures)


def card_name(gpu: str) -> str:
    """What nvidia-smi calls the first of the GPUs; "cpu" without one."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", gpu.split(",")[0]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "cpu"


def slug(card: str) -> str:
    """A short file name: "NVIDIA H100 80GB HBM3" is h100."""
    words = [word for word in re.findall(r"[a-z0-9]+", card.lower()) if re.search(r"\d", word)]
    return words[0] if words else "gpu" if card != "cpu" else "cpu"


def chosen_rows(models: Iterable[str], pattern: str, repeat: int) -> dict[str, list[Row]]:
    """The rows of each model whose names match, each `repeat` times in turn."""
    wanted = re.compile(pattern)
    return {
        model: [row for row in MATRIX if row.model == model and wanted.search(row.name)] * repeat
        for model in models
    }


def numbered(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """Each row with how often it was there before."""
    seen: dict[str, int] = {}
    found: list[tuple[Row, int]] = []
    for row in rows:
        found.append((row, seen.get(row.name, 0)))
        seen[row.name] = seen.get(row.name, 0) + 1
    return found


def make_folder(folder: Path, model: str) -> Path:
    """Config and tokenizer of a released model's shape, in a process: bench knows no tools."""
    words = [sys.executable, "tools/make_model.py", str(folder), "--shape", model]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def parse_models(text: str) -> dict[str, str]:
    """`NAME[=FOLDER],…` as folders by name, "" where one is to be made. Raises ValueError."""
    known = {row.model for row in MATRIX}
    models = {name: folder for name, _, folder in (w.partition("=") for w in text.split(","))}
    if not models.keys() <= known:
        raise ValueError(f"--models is of {', '.join(sorted(known))}")
    return models


def build_parser() -> argparse.ArgumentParser:
    """All options with their defaults."""
    parser = argparse.ArgumentParser(
        "bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(dict.fromkeys(row.model for row in MATRIX))
    add: Callable[..., argparse.Action] = parser.add_argument
    add("--models", default=names, metavar="NAME[=FOLDER],…", help="default: %(default)s, "
        "folders made by tools/make_model.py --shape")  # fmt: skip
    add("--rows", default="", metavar="REGEX", help="only rows whose names it finds (--list)")
    add("--list", action="store_true", help="print the rows' names and end")
    add("--quant", choices=QUANT_BYTES, default="none", help="default: %(default)s")
    add("--repeat", type=int, default=1, help="how often each row is run (default: %(default)s)")
    add("--client", type=Path, help="a program to run in place of bench.closed_loop")
    add("--router-args", default="", metavar="WORDS", help="more words for the router")
    add("--gpus", default="0", help="the router's (default: %(default)s)")
    add("--dtype", default="float16", help="the router's (default: %(default)s)")
    add("--settle", type=float, default=6.0, metavar="S", help="pause after the first answer, in "
        "which the engine may capture graphs (default: %(default)s)")  # fmt: skip
    add("--commit", default="", help="of this tree, where there is no git to tell")
    add("--save", type=Path, help="default: bench/results/CARD-<date>.json")
    return parser


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        models = parse_models(args.models)
        rows = chosen_rows(models, args.rows, args.repeat)
    except (ValueError, re.error) as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return USAGE
    every = [row for found in rows.values() for row in found]
    if args.list or not every:
        print("\n".join(row.name for row in every) or "no row has such a name")
        return 0 if args.list else USAGE
    client = [str(args.client.resolve())] if args.client else ["-m", "bench.closed_loop"]
    settings = Settings(
        quant=args.quant,
        gpus=args.gpus,
        dtype=args.dtype,
        router_words=shlex.split(args.router_args),
        client=[sys.executable, *client],
        settle_s=args.settle,
    )
    facts, card = report.host_facts(), card_name(args.gpus)
    facts |= {
        "card": card,
        "torch": importlib.metadata.version("torch"),
        "commit": args.commit or facts["commit"],
        "client": Path(client[-1]).name,
        "router_args": args.router_args,
    }
    path: Path = args.save or ROOT / "bench" / "results" / f"{slug(card)}-{facts['date']}.json"
    results = Report(path, facts)
    signal.signal(signal.SIGTERM, _leave)  # so that no router is left behind
    seconds = estimated_s(every)
    print(f"{card}, commit {facts['commit']}, {len(every)} rows, about {seconds:.0f} s of load")
    print("ratio to vLLM 0.26 on an H100, goal, share of the floor (bench/shapes.py); ms")
    print(_HEADER, flush=True)
    with tempfile.TemporaryDirectory() as made:
        for model, found in rows.items():
            if not found:
                continue
            given = models[model]
            folder = Path(given).resolve() if given else make_folder(Path(made, model), model)
            measure_model(numbered(found), folder, settings, results)
    print(f"results in {path}")
    return 1 if results.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
