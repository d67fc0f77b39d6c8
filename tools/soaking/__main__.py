"""The long rows of the acceptance table: see `tools/soak --help`.

Owns the command line, the order of the rows, the files of results and the exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import httpx
import msgspec

from bench.drive import run_async
from bench.report import host_facts
from tests.serving import ROOT
from tools.soaking.figures import RowResult, table
from tools.soaking.row import Orders
from tools.soaking.rows import ROWS
from tools.tiny_model import write_tiny_model

USAGE = 64
SHOWN_CHARS = 2000
RESULTS = ROOT / "bench" / "results"


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments, checked; leaves with 64 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="tools/soak",
        description="Plays the long rows of the acceptance table against routers on this machine.",
        epilog="Exit codes: 0 all rows met, 1 one was not, 64 usage.",
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of R27 (default: %(default)g)")
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--share", type=float, default=1.0, help="of the counts of the other rows")
    parser.add_argument("--model", default="smollm2-135m", help="of R27 (default: %(default)s)")
    parser.add_argument("--gpus", default="cpu,cpu", help="of R1, R2, R5, R27 (%(default)s)")
    parser.add_argument("--seed", type=int, default=6, help="of chance (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/soak-…")
    try:
        arguments = parser.parse_args(words)
    except SystemExit as leaving:
        sys.exit(USAGE if leaving.code else 0)
    arguments.rows = [row.strip().upper() for row in arguments.rows.split(",")]
    unknown = [row for row in arguments.rows if row not in ROWS]
    if unknown or arguments.minutes <= 0 or arguments.share <= 0:
        parser.print_usage(sys.stderr)
        print(f"tools/soak: rows are {', '.join(ROWS)}; numbers above 0", file=sys.stderr)
        sys.exit(USAGE)
    return arguments


def say(text: str) -> None:
    """Progress, with the time of day."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


async def play(name: str, arguments: argparse.Namespace, tiny: Path) -> RowResult:
    """One row. A row that breaks off is a row that is not met."""
    row = ROWS[name]
    n = max(1, round(row.n * arguments.share))
    minutes, model, gpus = arguments.minutes, arguments.model, arguments.gpus
    orders = Orders(n, row.n, minutes, tiny, model, gpus, arguments.seed, say)
    began_s = time.monotonic()
    say(f"{name}: begins")
    try:
        result = await row.play(orders)
    except (AssertionError, OSError, ValueError, httpx.HTTPError, ExceptionGroup) as error:
        result = RowResult(
            row=name,
            title="broke off",
            n=0,
            n_asked=row.n,
            duration_s=time.monotonic() - began_s,
            measures=(),
            findings=tuple(sentences(error)),
        )
    say(f"{name}: {'met' if result.met else 'NOT MET'} after {result.duration_s:,.0f} s")
    return result


def sentences(error: BaseException) -> list[str]:
    """What broke a row off: of a group each of its errors."""
    if isinstance(error, BaseExceptionGroup):
        return [line for inner in error.exceptions for line in sentences(inner)]
    return [f"{type(error).__name__}: {error}"[-SHOWN_CHARS:]]


def main(words: list[str]) -> int:
    """Plays the rows one after the other; the results are written after each."""
    arguments = parse(words)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's "&" had them ignored
        signal.signal(number, signal.default_int_handler)
    file: Path = arguments.json or RESULTS / f"soak-{datetime.now():%Y%m%d-%H%M%S}.json"
    facts = {**host_facts(), "command": "tools/soak " + " ".join(words)}
    results: list[RowResult] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        tiny = write_tiny_model(Path(folder) / "tiny")
        for name in arguments.rows:
            results.append(run_async(play(name, arguments, tiny)))
            rows = [{**msgspec.to_builtins(r), "met": r.met} for r in results]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(table(results))
    print(f"\nwritten to {file}", file=sys.stderr)
    whole = len(results) == len(arguments.rows)
    return 0 if whole and all(result.met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
