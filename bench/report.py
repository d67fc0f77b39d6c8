"""From the rows of a run to its figures: the fields and JSON keys of `vllm bench serve`.

Owns the definitions of the metrics. Pure but for `host_facts` and the two writers. Must not know
HTTP or how the load was made. Definitions, per request that succeeded:

* TTFT  first event that carries text, counted from sending
* E2EL  last event that has a choice, counted from sending
* TPOT  (E2EL - TTFT) / (output tokens - 1), for answers of two tokens or more
* ITL   each gap between events that carry text; an event may carry several tokens, so compare
        `tokens per chunk` before comparing ITL
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec


class Row(msgspec.Struct, kw_only=True):
    """One request. Times in seconds; `start_s` counts from the start of the run.

    `error` is empty for a request that succeeded, else the kind it is counted under.
    """

    session: int
    turn: int
    start_s: float
    late_s: float = 0.0  # sent this much after its arrival time (open loop)
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itl_s: list[float] = []
    text_events: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = ""
    error: str = ""
    detail: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Mean time of the tokens after the first, None with fewer than two."""
        if self.output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def chunk_times_s(self) -> list[float]:
        """When each event with text arrived, counted from the start of the run."""
        at = self.start_s + self.ttft_s
        times = [at]
        for gap in self.itl_s:
            at += gap
            times.append(at)
        return times


class Run(msgspec.Struct, kw_only=True):
    """What was measured: the rows, the time they took, and what it cost the clients."""

    rows: list[Row]
    duration_s: float
    unfinished: int = 0  # dropped at the time limit: neither success nor failure
    client_cpu_share: float = 0.0  # of one core, the busiest client process


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks; 0.0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def median(values: Sequence[float]) -> float:
    """The 50th percentile; 0.0 without values."""
    return percentile(values, 50)


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """Mean, median, standard deviation and P99 of seconds, as `mean_<name>_ms` and so on."""
    mean = sum(values) / len(values) if values else 0.0
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) if values else 0.0
    return {
        f"mean_{name}_ms": mean * 1e3,
        f"median_{name}_ms": median(values) * 1e3,
        f"std_{name}_ms": std * 1e3,
        f"p99_{name}_ms": percentile(values, 99) * 1e3,
    }


def parse_goodput(words: Iterable[str]) -> dict[str, float]:
    """Reads `ttft:200 itl:50` into milliseconds by name. Raises ValueError."""
    limits: dict[str, float] = {}
    for word in words:
        name, colon, value = word.partition(":")
        if name not in ("ttft", "tpot", "itl", "e2el") or not colon:
            raise ValueError(f"{word!r}: a limit is ttft, tpot, itl or e2el, then :MILLISECONDS")
        limits[name] = float(value)
    return limits


def meets(row: Row, limits_ms: dict[str, float]) -> bool:
    """Whether the answer kept all limits; `itl` bounds the P99 of the answer's own gaps."""
    found = {
        "ttft": row.ttft_s,
        "tpot": row.tpot_s or 0.0,
        "itl": percentile(row.itl_s, 99),
        "e2el": row.latency_s,
    }
    return all(found[name] * 1e3 <= limit for name, limit in limits_ms.items())


def peak_output_rate(rows: Iterable[Row]) -> float:
    """The most tokens in one second of the run, an answer's tokens shared out to its events."""
    seconds: dict[int, float] = {}
    for row in rows:
        if row.text_events:
            share = row.output_tokens / row.text_events
            for at in row.chunk_times_s:
                seconds[int(at)] = seconds.get(int(at), 0.0) + share
    return max(seconds.values(), default=0.0)


def peak_concurrency(rows: Iterable[Row]) -> int:
    """The most requests that were open at the same time."""
    edges = sorted(
        edge for row in rows for edge in ((row.start_s, 1), (row.start_s + row.latency_s, -1))
    )
    open_now = peak = 0
    for _, step in edges:
        open_now += step
        peak = max(peak, open_now)
    return peak


def summarize(run: Run, goodput_ms: dict[str, float] | None = None) -> dict[str, Any]:
    """The figures under the JSON keys of `vllm bench serve`, and a few more after them."""
    good = [row for row in run.rows if not row.error]
    bad = [row for row in run.rows if row.error]
    seconds = max(run.duration_s, 1e-9)
    inputs = sum(row.input_tokens for row in good)
    outputs = sum(row.output_tokens for row in good)
    events = sum(row.text_events for row in good)
    kept = sum(meets(row, goodput_ms) for row in good) / seconds if goodput_ms else None
    first_of_kind = {row.error: row.detail for row in reversed(bad)}
    return {
        "duration": run.duration_s,
        "completed": len(good),
        "failed": len(bad),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "request_goodput": kept,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_output_tokens_per_s": peak_output_rate(good),
        "max_concurrent_requests": peak_concurrency(good),
        **spread([row.ttft_s for row in good], "ttft"),
        **spread([tpot for row in good if (tpot := row.tpot_s) is not None], "tpot"),
        **spread([gap for row in good for gap in row.itl_s], "itl"),
        **spread([row.latency_s for row in good], "e2el"),
        "unfinished": run.unfinished,
        "total_cached_tokens": sum(row.cached_tokens for row in good),
        "tokens_per_chunk": outputs / events if events else 0.0,
        "p99_late_ms": percentile([row.late_s for row in run.rows], 99) * 1e3,
        "client_cpu_share": run.client_cpu_share,
        "errors": dict(Counter(row.error for row in bad)),
        "first_errors": first_of_kind,
    }


def detailed(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """The per-request lists of `vllm bench serve --save-detailed`, of requests that succeeded."""
    good = [row for row in rows if not row.error]
    return {
        "input_lens": [row.input_tokens for row in good],
        "output_lens": [row.output_tokens for row in good],
        "start_times": [row.start_s for row in good],
        "ttfts": [row.ttft_s for row in good],
        "itls": [row.itl_s for row in good],
        "latencies": [row.latency_s for row in good],
    }


_SECTIONS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)


def render(summary: dict[str, Any], max_concurrency: int | None, rate: float | None) -> str:
    """The table of `vllm bench serve`, its labels word for word."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]

    def add(label: str, value: float, digits: int | None = 2) -> None:
        shown = f"{value:d}" if digits is None else f"{value:.{digits}f}"
        lines.append(f"{label:<40} {shown:<10}".rstrip())

    add("Successful requests:", summary["completed"], None)
    add("Failed requests:", summary["failed"], None)
    if summary["unfinished"]:
        add("Unfinished requests (time limit):", summary["unfinished"], None)
    if max_concurrency is not None:
        add("Maximum request concurrency:", max_concurrency, None)
    if rate is not None:
        add("Request rate configured (RPS):", rate)
    add("Benchmark duration (s):", summary["duration"])
    add("Total input tokens:", summary["total_input_tokens"], None)
    if summary["total_cached_tokens"]:
        add("Cached input tokens:", summary["total_cached_tokens"], None)
    add("Total generated tokens:", summary["total_output_tokens"], None)
    add("Request throughput (req/s):", summary["request_throughput"])
    if summary["request_goodput"] is not None:
        add("Request goodput (req/s):", summary["request_goodput"])
    add("Output token throughput (tok/s):", summary["output_throughput"])
    add("Peak output token throughput (tok/s):", summary["max_output_tokens_per_s"])
    add("Peak concurrent requests:", summary["max_concurrent_requests"], None)
    add("Total token throughput (tok/s):", summary["total_token_throughput"])
    for key, short, title in _SECTIONS:
        lines.append(f"{title:-^50}")
        for label, part in (("Mean", "mean"), ("Median", "median"), ("P99", "p99")):
            add(f"{label} {short} (ms):", summary[f"{part}_{key}_ms"])
    lines.append(f"{'This client':-^50}")
    add("Tokens per chunk:", summary["tokens_per_chunk"])
    if rate is not None:
        add("P99 lateness of sending (ms):", summary["p99_late_ms"])
    add("Busiest client process (% of a core):", summary["client_cpu_share"] * 100, 0)
    lines += ["=" * 50, *_error_lines(summary)]
    return "\n".join(lines)


def _error_lines(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"failed, {kind}: {count} (the first one: {summary['first_errors'][kind]})"
        for kind, count in summary["errors"].items()
    ]
    if summary["client_cpu_share"] > 0.8 and summary["duration"] > 1:
        lines.append("warning: the client may be the bottleneck, use more --procs")
    return lines


def host_facts() -> dict[str, Any]:
    """Date, commit of this checkout and the machine: what a figure is worth nothing without."""
    now = datetime.now().astimezone()
    return {
        "date": now.strftime("%Y%m%d-%H%M%S"),
        "commit": _commit(),
        "host": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load_average": list(os.getloadavg()),
        },
    }


def _commit() -> str:
    """The checkout's commit, with `+` if files differ from it; "unknown" outside of one."""
    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+" if _git(root, "status", "--porcelain", "-uno") else "")


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save_json(path: Path, result: dict[str, Any]) -> None:
    """Writes `result`, making the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes one JSON line per request, making the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
