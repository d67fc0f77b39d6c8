"""What grammars cost: decode throughput of one engine with and without a JSON schema, on a CPU.

    python -m bench.structured [--streams 16] [--tokens 64] [--rounds 5] [--profile]

Owns the measurement without router and sockets: the true scheduler and device with the demo model,
and all streams in one batch. Rounds with and without the schema alternate in one run; what counts
is the median of their ratios, as a round on a shared machine says little. A round's time begins
when all streams have their first token. Compiling the grammar is told apart.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from pathlib import Path
from statistics import median

import msgspec

from bench import report
from bench.cpu import ROOT, demo_model
from engine.config import EngineConfig
from engine.device.build import Device, build_device
from engine.grammar import Grammars
from engine.main import build_scheduler
from engine.plan import StepPlan
from engine.protocol import Sampling, Submit, pack_tokens
from router.text.model import load_text
from router.text.tokenizer import Tokenizer
from router.text.wire_vocabulary import wire_vocabulary

TARGET = 0.10  # of the time that decoding takes without a grammar
PROMPT = "A list of people, with their names, ages and friends, as JSON:\n"
# Without an end, so that every stream of a round has as many tokens.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.(org|net)$"},
            "friends": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "email", "friends"],
        "additionalProperties": False,
    },
}


class Round(msgspec.Struct, frozen=True):
    """Seconds of the decode steps of a round, and the tokens that they gave."""

    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Bench:
    """One engine, unwired."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._device: Device = build_device(config)
        vocabulary = wire_vocabulary(tokenizer, self._device.limits.vocab_size, 0)
        began_s = time.perf_counter()
        self._grammars = Grammars(vocabulary, self._device.limits.vocab_size)
        self.vocabulary_s = time.perf_counter() - began_s
        self._prompt = tokenizer.encode(PROMPT, add_special=True, parse_special=False)
        self.grammar = json.dumps({"grammars": [{"json_schema": SCHEMA}]})
        began_s = time.perf_counter()
        self._grammars.matcher(self.grammar, [], (), 0)
        self.compile_s = time.perf_counter() - began_s

    def run(self, streams: int, tokens: int, grammar: str) -> Round:
        """One round. Raises RuntimeError if a stream ends early."""
        scheduler = build_scheduler(self._config, self._device.limits)
        for number in range(streams):
            sampling = Sampling(temperature=1.0, seed=number)
            prompt = pack_tokens(self._prompt)
            submit = Submit(0, number, prompt, sampling, tokens, grammar=grammar)
            matcher = self._grammars.matcher(grammar, [], (), 0) if grammar else None
            scheduler.add(submit, matcher)
        seconds, count = 0.0, 0
        while scheduler.busy:
            began_s = time.perf_counter()
            plan = scheduler.plan()
            if plan is None:
                raise RuntimeError("nothing to do")
            scheduler.commit(plan, self._device.runner.launch(plan).result())
            output = scheduler.take_output()
            if _is_decode(plan, streams):
                seconds += time.perf_counter() - began_s
                count += len(plan.rows)
            if output is not None and any(end.reason != "length" for end in output.finished):
                raise RuntimeError(f"a stream has ended: {output.finished}")
        return Round(seconds, count)


def _is_decode(plan: StepPlan, streams: int) -> bool:
    return len(plan.rows) == streams and all(row.count == 1 for row in plan.rows)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, writes the samples; returns the exit code: 1 if the target is missed."""
    parser = argparse.ArgumentParser(
        "bench.structured", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--profile", action="store_true", help="one more round, function by function"
    )
    parser.add_argument("--save", type=Path, help="default: bench/results/structured-<date>.json")
    args = parser.parse_args(argv)
    model = demo_model()
    config = EngineConfig(
        endpoint="ipc://none", replica=0, epoch=0, model=str(model), threads=args.threads,
        max_len=512, max_batch=args.streams, num_blocks=16 * args.streams,
    )  # fmt: skip
    bench = Bench(config, load_text(model).tokenizer)
    bench.run(args.streams, 8, bench.grammar)  # warm
    free: list[Round] = []
    bound: list[Round] = []
    for _ in range(args.rounds):
        free.append(bench.run(args.streams, args.tokens, ""))
        bound.append(bench.run(args.streams, args.tokens, bench.grammar))
    costs = [b.seconds / f.seconds - 1 for f, b in zip(free, bound, strict=True)]
    cost = median(costs)
    print(f"vocabulary {bench.vocabulary_s * 1e3:.0f} ms, grammar {bench.compile_s * 1e3:.1f} ms")
    print(f"{args.streams} streams without a grammar: {median(r.rate for r in free):.1f} tok/s")
    print(f"{args.streams} streams with the schema:   {median(r.rate for r in bound):.1f} tok/s")
    print(
        f"cost {cost:+.1%} (target < {TARGET:.0%}); rounds: {' '.join(f'{c:+.1%}' for c in costs)}"
    )
    facts = report.host_facts()
    path: Path = args.save or ROOT / "bench" / "results" / f"structured-{facts['date']}.json"
    samples = {"free": free, "bound": bound, "cost": cost, "compile_s": bench.compile_s}
    settings = {key: getattr(args, key) for key in ("streams", "tokens", "rounds", "threads")}
    report.save_json(path, facts | settings | msgspec.to_builtins(samples))
    if args.profile:
        with cProfile.Profile() as profile:
            bench.run(args.streams, args.tokens, bench.grammar)
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(18)
    return 0 if cost < TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
