"""router-bench: the load generator for any server that speaks the OpenAI API.

Owns the command line: arguments to sessions and orders, the warm-up, the output, the exit code.
It prints the fields of `vllm bench serve` under the same names.

    router-bench                                         # 100 requests, one at a time, to port 8000
    router-bench -c 16 -n 200 -i 512 -o 128 --procs 2    # closed loop: 16 requests always open
    router-bench --rate 4 -n 400 --burstiness 0.5        # open loop: arrivals in bursts
    router-bench --workload shared-prefix --prefixes 8 --prefix-len 1024 -i 64
    router-bench --workload multi-turn --turns 6 -c 4 -i 40
    router-bench --workload file --file requests.jsonl --goodput ttft:500 tpot:50

Exit codes: 0 all requests succeeded, 1 one failed or none succeeded, 64 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from bench import report, workloads
from bench.client import ClientError, Target, error_message, parse_target
from bench.drive import Orders, ask_once, drive, run_async
from bench.workloads import Endpoint, Session, Shape, parse_lengths

USAGE = 64

Add = Callable[..., argparse.Action]  # add_argument of one group of options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """All options with their defaults."""
    parser = _Parser(
        "router-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_server(parser.add_argument_group("server").add_argument)
    _add_workload(parser.add_argument_group("workload").add_argument)
    _add_load(parser.add_argument_group("load").add_argument)
    _add_output(parser.add_argument_group("output").add_argument)
    return parser


def _add_server(add: Add) -> None:
    add("--url", default="http://127.0.0.1:8000", help="where the server is (default: %(default)s)")
    add("--model", help="model to ask (default: the first that the server lists)")
    add("--endpoint", choices=("completions", "chat"), help="default: by the workload")
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="sent along")
    add("--temperature", type=float, default=0.0, help="default: %(default)s")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="ask for exactly the output length; other lengths then are failures "
        "(default: for random and shared-prefix)",
    )
    add("--extra-body", default="{}", metavar="JSON", help="fields for every request body")
    add("--i-mean-it", action="store_true", help="allow a server that is not on this machine")


def _add_workload(add: Add) -> None:
    kinds = ("random", "shared-prefix", "multi-turn", "file")
    add("--workload", choices=kinds, default="random", help="default: %(default)s")
    add("-n", "--requests", type=int, help="default: 100, for a file its lines")
    add(
        "-i",
        "--input-len",
        default="512",
        metavar="N[:M]",
        help="tokens of new input (default: %(default)s)",
    )
    add(
        "-o",
        "--output-len",
        default="128",
        metavar="N[:M]",
        help="tokens of output (default: %(default)s)",
    )
    add("--prompt", choices=("ids", "words"), help="default: ids, for chat words")
    add("--vocab", type=int, default=30_000, help="ids are below this (default: %(default)s)")
    add("--prefixes", type=int, default=8, help="shared-prefix: how many (default: %(default)s)")
    add("--prefix-len", type=int, help="shared-prefix: tokens of each (default: 256); "
        "multi-turn: words before every session (default: 0)")  # fmt: skip
    add("--turns", type=int, default=4, help="multi-turn: per session (default: %(default)s)")
    add("--file", type=Path, help="file: JSON lines with prompt or messages, and max_tokens")
    add("--seed", type=int, help="default: a new one, so that no prompt was seen before")


def _add_load(add: Add) -> None:
    add("-c", "--concurrency", type=int, help="requests kept open (default: 1); with --rate at "
        "most that many (default: no bound)")  # fmt: skip
    add("--rate", type=float, help="open loop: sessions that arrive in a second")
    add("--arrival", choices=("poisson", "constant"), default="poisson", help="with --rate")
    add("--burstiness", type=float, default=1.0, help="with --rate: shape of the gamma "
        "distribution of the gaps, 1 is Poisson, less is burstier")  # fmt: skip
    add("--procs", type=int, default=1, help="client processes (default: %(default)s)")
    add("--warmup", type=int, default=1, help="requests before, not counted (default: %(default)s)")
    add(
        "--max-seconds",
        type=float,
        default=3600.0,
        help="then drop what is open (default: %(default)s)",
    )
    add("--timeout", type=float, default=600.0, help="seconds per request (default: %(default)s)")


def _add_output(add: Add) -> None:
    add("--goodput", nargs="+", default=[], metavar="NAME:MS",
        help="count the requests within limits, such as ttft:200 itl:50")  # fmt: skip
    add("--save", type=Path, help="write the figures there as JSON")
    add("--save-detailed", action="store_true", help="with the lists per request")
    add("--rows", type=Path, help="write one JSON line per request there")
    add("--label", default="", help="a name for this run, kept in the JSON")


class UsageError(Exception):
    """A command line that asks for something impossible; the message says what to do."""


def make_sessions(args: argparse.Namespace, endpoint: Endpoint, seed: int) -> list[Session]:
    """The sessions of the command line, with arrival times if there is a rate.

    Raises ValueError on a bad length or workload file, OSError if the file cannot be read.
    """
    shape = Shape(
        requests=_default(args.requests, 0 if args.workload == "file" else 100),
        input=parse_lengths(args.input_len),
        output=parse_lengths(args.output_len),
        kind="words" if endpoint == "chat" else args.prompt or "ids",
        vocab=args.vocab,
        prefixes=args.prefixes,
        prefix_len=_default(args.prefix_len, 256 if args.workload == "shared-prefix" else 0),
        turns=args.turns,
    )
    match args.workload:
        case "file":
            lines = args.file.read_bytes().splitlines()
            sessions = workloads.file_sessions(lines, shape, endpoint)
        case "multi-turn":
            sessions = workloads.multi_turn_sessions(shape, seed)
        case "shared-prefix":
            sessions = workloads.shared_prefix_sessions(shape, seed)
        case _:
            sessions = workloads.random_sessions(shape, seed)
    if args.rate is None:
        return sessions
    burstiness = math.inf if args.arrival == "constant" else args.burstiness
    return workloads.arrivals(sessions, args.rate, burstiness, seed)


def _default(value: int | None, default: int) -> int:
    return default if value is None else value


def check(args: argparse.Namespace, target: Target) -> None:
    """Raises UsageError for what argparse cannot see."""
    at_least_one = ("requests", "concurrency", "procs", "turns", "prefixes", "vocab")
    for name in at_least_one:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1")
    for name in ("rate", "burstiness", "max_seconds", "timeout"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be more than 0")
    if (args.workload == "file") != (args.file is not None):
        raise UsageError("--workload file and --file PATH belong together")
    if args.prompt == "ids" and args.endpoint == "chat":
        raise UsageError("the chat endpoint takes no token ids: --prompt words")
    if not target.is_local and not args.i_mean_it:
        raise UsageError(
            f"{target.host} is not this machine: add --i-mean-it if its owner knows about the load"
        )


def choose_endpoint(args: argparse.Namespace) -> Endpoint:
    """The endpoint asked for, else the one that suits the workload. Raises OSError."""
    if args.endpoint is not None:
        return "chat" if args.endpoint == "chat" else "completions"
    if args.workload == "multi-turn":
        return "chat"
    if args.workload == "file" and b'"messages"' in args.file.read_bytes():
        return "chat"
    return "completions"


def make_orders(args: argparse.Namespace, target: Target, endpoint: Endpoint) -> Orders:
    """What the driver needs. Raises ValueError if `--extra-body` is no JSON object."""
    exact = args.ignore_eos
    if exact is None:
        exact = args.workload in ("random", "shared-prefix")
    try:
        extra = msgspec.json.decode(args.extra_body, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ValueError(f"--extra-body: {error}") from error
    return Orders(
        target=target,
        endpoint=endpoint,
        body=workloads.stream_body(args.model, args.temperature, exact) | extra,
        open_loop=args.rate is not None,
        concurrency=args.concurrency if args.rate is not None else args.concurrency or 1,
        timeout_s=args.timeout,
        max_s=args.max_seconds,
        exact_output=exact,
    )


def first_model(target: Target) -> str:
    """The first model the server lists. Raises `ClientError`."""
    status, body = run_async(ask_once(target, "GET", "/v1/models"))
    if status != 200:
        raise ClientError(f"/v1/models answered {status}: {error_message(body)}")
    listed = msgspec.json.decode(body)
    if not listed.get("data"):
        raise ClientError("the server lists no model: name one with --model")
    return str(listed["data"][0]["id"])


def warm_up(args: argparse.Namespace, orders: Orders, seed: int) -> str | None:
    """Sends `--warmup` requests of the same workload; returns the first failure's sentence."""
    if args.warmup < 1:
        return None
    few = argparse.Namespace(**{**vars(args), "requests": args.warmup, "rate": None})
    concurrency = min(args.warmup, args.concurrency or 1)
    closed = msgspec.structs.replace(orders, open_loop=False, concurrency=concurrency)
    run = drive(closed, make_sessions(few, orders.endpoint, seed))
    for row in run.rows:
        if row.error:
            return f"the warm-up failed, {row.error}: {row.detail}"
    return None if run.rows else "the warm-up did not end in time"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except (UsageError, ValueError, OSError) as error:
        print(f"router-bench: {error}", file=sys.stderr)
        return USAGE
    except (ClientError, RuntimeError) as error:
        print(f"router-bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    target = parse_target(args.url, tuple(_header(line) for line in args.header))
    check(args, target)
    goodput_ms = report.parse_goodput(args.goodput)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    endpoint = choose_endpoint(args)
    sessions = make_sessions(args, endpoint, seed)
    args.model = args.model or first_model(target)
    orders = make_orders(args, target, endpoint)
    facts = report.host_facts()  # before the load, so that the load average is the others'
    failure = warm_up(args, orders, seed + 1)
    if failure is not None:
        print(f"router-bench: {failure}", file=sys.stderr)
        return 1
    run = drive(orders, sessions, args.procs)
    summary = report.summarize(run, goodput_ms)
    print(report.render(summary, orders.concurrency, args.rate))
    if args.save is not None:
        result = facts | _settings(args, orders, seed, len(sessions)) | summary
        if args.save_detailed:
            result |= report.detailed(run.rows)
        report.save_json(args.save, result)
    if args.rows is not None:
        report.save_rows(args.rows, run.rows)
    return 0 if summary["completed"] and not summary["failed"] else 1


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or "\n" in line or "\r" in line:
        raise UsageError(f"--header {line!r}: write 'NAME: VALUE'")
    return name.strip(), value.strip()


def _settings(
    args: argparse.Namespace, orders: Orders, seed: int, num_sessions: int
) -> dict[str, Any]:
    """What was asked for, under the keys of `vllm bench serve` where it has one."""
    return {
        "label": args.label,
        "backend": "openai-chat" if orders.endpoint == "chat" else "openai",
        "model_id": args.model,
        "num_prompts": num_sessions,
        "request_rate": args.rate or "inf",
        "burstiness": args.burstiness,
        "arrival": args.arrival,
        "max_concurrency": orders.concurrency,
        "workload": args.workload,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "prefixes": args.prefixes,
        "prefix_len": args.prefix_len,
        "turns": args.turns,
        "procs": args.procs,
        "seed": seed,
        "ignore_eos": orders.exact_output,
        "temperature": args.temperature,
        "goodput": args.goodput,
    }


if __name__ == "__main__":
    sys.exit(main())
