"""router-bench as a real process against a small server of known behaviour."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import cpu
from bench.client import parse_target
from tests.serving import runs, wait_for
from tests.stub_openai import StubServer, stub_server


def bench(stub: StubServer, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.serve", "--url", stub.url, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_closed_loop_from_two_processes(tmp_path: Path) -> None:
    figures, rows = tmp_path / "new" / "figures.json", tmp_path / "rows.jsonl"
    with stub_server(token_gap_s=0.002) as stub:
        done = bench(
            stub, "-n", "40", "-c", "6", "-i", "5:9", "-o", "12", "--procs", "2", "--seed", "5",
            "--save", str(figures), "--save-detailed", "--rows", str(rows), "--label", "x",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(stub.bodies) == 41  # and a warm-up that is not counted
        assert stub.connections <= 8  # the list of models, the warm-up, six clients
        prompts = {tuple(body["prompt"]) for body in stub.bodies}
        assert len(prompts) == 41
    found = load(figures)
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (40, 0, 480)
    assert found["total_input_tokens"] == sum(found["input_lens"])
    assert found["max_concurrent_requests"] <= 6
    assert (found["model_id"], found["seed"], found["label"]) == ("stub", 5, "x")
    assert {"date", "commit", "host", "backend", "request_rate"} <= set(found)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(lines) == 40
    assert all(len(line["itl_s"]) == 11 and line["ttft_s"] > 0 for line in lines)
    assert "Successful requests:                     40\n" in done.stdout
    assert "Output token throughput (tok/s):" in done.stdout


def test_open_loop_keeps_its_times(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with stub_server() as stub:
        done = bench(
            stub, "-n", "20", "--rate", "40", "--arrival", "constant", "-i", "4", "-o", "3",
            "--goodput", "e2el:60000", "--rows", str(rows),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Request rate configured (RPS):           40.00\n" in done.stdout
    assert "Request goodput (req/s):" in done.stdout
    starts = [json.loads(line)["start_s"] for line in rows.read_text().splitlines()]
    # Sent at its time or later, never before: 20 requests, 25 ms apart.
    assert all(start >= 0.025 * i - 0.002 for i, start in enumerate(starts))


def test_multi_turn_sends_the_real_answers() -> None:
    with stub_server() as stub:
        done = bench(
            stub, "--workload", "multi-turn", "-n", "6", "--turns", "3", "-i", "4", "-o", "2",
            "--warmup", "0",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        last = stub.bodies[2]["messages"]
        assert [message["role"] for message in last] == [
            "user", "assistant", "user", "assistant", "user",
        ]  # fmt: skip
        assert last[1]["content"] == "a0 a1 "
        assert last[:3] == stub.bodies[1]["messages"]
        assert "ignore_eos" not in stub.bodies[0]


def test_shared_prefix_in_words_over_chat() -> None:
    with stub_server() as stub:
        done = bench(
            stub, "--workload", "shared-prefix", "--endpoint", "chat", "-n", "4", "--prefixes",
            "2", "--prefix-len", "10", "-i", "3", "-o", "2", "--warmup", "0",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        texts = [body["messages"][0]["content"].split() for body in stub.bodies]
    assert [len(words) for words in texts] == [13] * 4
    assert texts[0][:10] == texts[2][:10]
    assert texts[0][:10] != texts[1][:10]


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt":"one two","max_tokens":3}\n{"prompt":[4,5,6],"max_tokens":1}\n')
    with stub_server() as stub:
        words = ("--workload", "file", "--file", str(path), "--warmup", "0")
        done = bench(stub, *words, "--header", "X-A: b", "--extra-body", '{"seed":7}')
        assert done.returncode == 0, done.stderr
        assert [body["prompt"] for body in stub.bodies] == ["one two", [4, 5, 6]]
        assert [body["max_tokens"] for body in stub.bodies] == [3, 1]
        assert stub.bodies[0]["seed"] == 7
    assert "Total generated tokens:                  4\n" in done.stdout


@pytest.mark.parametrize(
    ("model", "kind", "detail"),
    [
        ("stub-busy", "http_503", "come back later"),
        ("stub-error", "stream_error", "the engine died"),
        ("stub-cut", "disconnected", "ended before the answer did"),
        ("stub-truncated", "truncated", "without its last events"),
        ("stub-short", "wrong_length", "asked for 5 tokens, got 4"),
        ("stub-no-usage", "no_usage", "no token counts"),
    ],
)
def test_failures_are_counted_by_kind(model: str, kind: str, detail: str) -> None:
    with stub_server() as stub:
        done = bench(stub, "--model", model, "-n", "3", "-i", "4", "-o", "5", "--warmup", "0")
    assert done.returncode == 1
    assert f"failed, {kind}: 3 " in done.stdout
    assert detail in done.stdout
    assert "Failed requests:                         3\n" in done.stdout


def test_a_failed_warm_up_ends_the_run() -> None:
    with stub_server() as stub:
        done = bench(stub, "--model", "stub-busy", "-n", "3", "-i", "4", "-o", "5")
        assert len(stub.bodies) == 1
    assert done.returncode == 1
    assert done.stderr == "router-bench: the warm-up failed, http_503: come back later\n"


def test_one_failure_among_successes_is_exit_1() -> None:
    with stub_server() as stub:
        done = bench(
            stub, "--model", "stub-first-only", "-n", "3", "-i", "4", "-o", "5", "--warmup", "0"
        )
    assert done.returncode == 1
    assert "Successful requests:                     1\n" in done.stdout


def test_connections_that_the_server_closes_are_made_anew() -> None:
    with stub_server() as stub:
        done = bench(stub, "--model", "stub-once", "-n", "5", "-i", "4", "-o", "5")
        assert done.returncode == 0, done.stdout + done.stderr
        assert stub.connections >= 6


def test_time_limits() -> None:
    hang = ("--model", "stub-hang", "-n", "4", "-c", "2", "-i", "4", "-o", "5", "--warmup", "0")
    with stub_server() as stub:
        per_request = bench(stub, *hang, "--timeout", "0.2")
        whole = bench(stub, *hang, "--max-seconds", "0.4")
    assert "failed, timeout: 4 " in per_request.stdout
    assert "Unfinished requests (time limit):        2\n" in whole.stdout
    assert (per_request.returncode, whole.returncode) == (1, 1)


def test_clients_do_not_outlive_a_killed_parent() -> None:
    with stub_server() as stub:
        command = [
            sys.executable, "-m", "bench.serve", "--url", stub.url, "--model", "stub-hang", "-c",
            "4", "-n", "4", "-i", "4", "-o", "5", "--procs", "2", "--warmup", "0",
        ]  # fmt: skip
        parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 30
            while len(stub.bodies) < 4 and time.monotonic() < deadline:
                time.sleep(0.05)
            children = psutil.Process(parent.pid).children(recursive=True)
            assert len(stub.bodies) == 4
            assert len(children) >= 2
        finally:
            parent.kill()
            parent.wait()
        wait_for(lambda: not any(runs(child) for child in children))


def test_the_cpu_table_takes_its_samples_over_http() -> None:
    samples = cpu.RouterSamples()
    with stub_server(token_gap_s=0.0005) as stub:
        cpu.measure_router(parse_target(stub.url), random.Random(1), samples)
        sizes = [len(body["prompt"]) for body in stub.bodies]
    for values in (
        samples.decode_tok_s,
        samples.prefill_s,
        samples.batch_tok_s,
        samples.first_ttft_s,
        samples.second_ttft_s,
    ):
        assert len(values) == cpu.REPEATS
        assert all(value > 0 for value in values)
    assert sizes.count(512) == 1 + cpu.REPEATS
    assert sizes.count(1000) == 2 * cpu.REPEATS
    assert sizes.count(37) == 16 + 1 + 17 * cpu.REPEATS


def test_a_router_that_does_not_start_is_explained() -> None:
    with (
        pytest.raises(RuntimeError, match="the router ended with"),
        cpu.running_router(["--no-such-option"]),
    ):
        pass
