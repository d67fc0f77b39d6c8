"""No descriptors, no memory, no room for the log, a clock that jumps: what requests feel of it."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.lifelines import measured
from tests.router_process import ROOT, Start, free_port, text_of, tiny_model, wait_gone
from tests.serving import wait_for

pytestmark = pytest.mark.slow

CLIENTS = 400
CGROUPS = Path("/sys/fs/cgroup")
GROUP_BYTES = 64 << 20  # R26
ROOM_BYTES = 5 << 20  # R25: beyond what the engine has once it serves
SLOW = {"tokens_per_s": 20, "rules": [{"match": "*", "reply": "abc ", "repeat": True}]}


async def one_client(port: int, tokens: int) -> str:
    """How a client fares that streams one completion: "served", "refused", or what went wrong."""
    body = {"model": "tiny", "prompt": "go", "stream": True, "max_tokens": tokens}
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + data)
        answer = await reader.read()
        writer.close()
    except OSError as error:
        return type(error).__name__
    if answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in answer.lower():
        return "refused"
    return "served" if answer.rstrip().endswith(b"0") and b"[DONE]" in answer else "cut"


async def test_r24_a23_too_many_clients_for_the_descriptors(start: Start) -> None:
    router = start(script=SLOW, shell="ulimit -n 256")
    port = int(router.url.rpartition(":")[2])
    limits = router.events("descriptors")[0]
    assert limits["limit"] == 256
    async with asyncio.timeout(120):
        ends = Counter(await asyncio.gather(*[one_client(port, 40) for _ in range(CLIENTS)]))
    measured(f"R24: {CLIENTS} clients, 256 descriptors: {dict(ends)}")
    assert ends["served"] >= limits["connections"]
    assert ends["refused"] > 0
    assert ends["served"] + ends["refused"] == CLIENTS
    lines = [line for line in router.log.splitlines() if '"event": "request"' not in line]
    assert len(lines) < 100
    assert router.metric("router_connections_refused") == ends["refused"]
    assert await one_client(port, 2) == "served"
    router.signal(signal.SIGTERM)
    assert await asyncio.to_thread(router.wait) == 0


@pytest.mark.parametrize(
    "shell", ["exec 2>/dev/full 1>/dev/full", "exec 2>&- 1>&- 0>&-"], ids=["full", "closed"]
)
def test_r23_a_log_without_room_costs_no_request(start: Start, shell: str) -> None:
    port = free_port()
    router = start("--port", str(port), script={}, shell=shell)
    url = f"http://127.0.0.1:{port}"
    answers = ask_until_ready(url, 20)
    assert [answer.status_code for answer in answers] == [200] * 20
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {"hello"}
    lost = re.search(
        r"^router_log_lines_lost (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE
    )
    assert lost
    assert (float(lost[1]) > 20) is ("full" in shell)
    router.signal(signal.SIGTERM)
    assert router.wait() == 0


def ask_until_ready(url: str, number: int) -> list[httpx.Response]:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 5}
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        deadline_s = time.monotonic() + 60
        while True:
            try:
                if client.get("/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        return [client.post("/v1/completions", json=body) for _ in range(number)]


def test_the_log_file_is_opened_anew_on_sigusr2(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "router.jsonl"
    router = start(script={}, log=log)
    assert router.url
    moved = log.rename(tmp_path / "router.jsonl.1")
    assert router.complete("hello", max_tokens=5).status_code == 200
    wait_for(lambda: '"request"' in moved.read_text())
    router.signal(signal.SIGUSR2)
    wait_for(log.exists)
    router.signal(signal.SIGUSR1)
    router.wait_for("state")
    assert log.stat().st_mode & 0o137 == 0
    router.signal(signal.SIGTERM)
    assert router.wait() == 0
    assert router.output_path.read_text() == ""


# What the time of day is for: log lines, what clients are shown, templates that print the date.
SHOWN = {
    "router/logs.py",
    "router/planning.py",
    "router/api/admin.py",
    "router/api/boundary.py",
    "router/api/responses_answer.py",
    "router/text/sandbox.py",
}


def test_r22_no_decision_reads_the_time_of_day() -> None:
    """Every mention of it is in a file that only shows it."""
    found: set[str] = set()
    for package in ("router", "engine"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
                if re.search(r"\btime\.(time|time_ns|localtime|gmtime|ctime)$", text) or re.search(
                    r"\b(datetime|date)\.(now|utcnow|today)$", text
                ):
                    found.add(path.relative_to(ROOT).as_posix())
                if isinstance(node, ast.ImportFrom) and node.module == "time":
                    assert not {"time", "time_ns"} & {name.name for name in node.names}, path
    assert found <= SHOWN
    assert {"router/logs.py", "router/planning.py"} <= found  # this test would see one


JUMPING_CLOCK = """
import itertools, time
_steps = itertools.cycle((3600.0, -3600.0, 0.0))
_true, _true_ns = time.time, time.time_ns
time.time = lambda: _true() + next(_steps)
time.time_ns = lambda: _true_ns() + int(next(_steps) * 1e9)
"""


def test_r22_a_clock_that_jumps_an_hour_is_not_felt(start: Start, tmp_path: Path) -> None:
    """Every look at the time of day differs by an hour or two, in the router and its engines."""
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(JUMPING_CLOCK)
    limits = ("--request-timeout", "60", "--queue-timeout", "30", "--first-token-timeout", "30")
    script = {**SLOW, "tokens_per_s": 100}
    env = {"PYTHONPATH": f"{folder}:{ROOT}"}
    router = start(*limits, "--hang-timeout", "30", script=script, gpus="cpu,cpu", env=env)
    assert router.url
    for _ in range(5):
        assert router.complete("go", max_tokens=20).json()["choices"][0]["text"] == "abc " * 5
    assert router.events("engine_died") == []
    with router.stream("go", max_tokens=200) as events:
        next(events)
        router.signal(signal.SIGTERM)  # the drain has a deadline, too
        assert list(events)[-1] == "[DONE]"
    assert router.wait() == 0
    assert router.events("streams_cut") == []
    assert wait_gone(router.engine_pids, 5) == []
    times = [event["time"] for event in router.events("request")]
    assert len(times) > 1  # the clock did jump: times of lines are not in order
    assert times != sorted(times)


def test_r25_an_engine_at_the_end_of_its_memory(start: Start, tmp_path: Path) -> None:
    """A real one, under a real limit. A large request fails by itself; what its step leaves behind
    may cost a few small ones, and then the engine makes place for one that has memory again.

    What a native library makes of a failed malloc is its own affair: if that ends the engine, the
    large request goes on with another one, which is not limited.
    """
    sizes = ("--max-len", "2048", "--step-tokens", "8192", "--kv-memory", "64M", "--threads", "1")
    router = start("--models", f"tiny={tiny_model(tmp_path)}", *sizes)
    assert router.url
    assert router.complete("hello", max_tokens=5).status_code == 200
    engine = router.engine_pid(0)
    limit = psutil.Process(engine).memory_info().vms + ROOM_BYTES
    resource.prlimit(engine, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    large = {"prompt": [f"{'y' * 2000}{k}" for k in range(8)], "max_tokens": 5}
    answer = router.complete(**large)
    assert answer.status_code == 503 or router.events("engine_died")
    ends = [router.complete(f"hello {k}", max_tokens=5) for k in range(100)]
    refused = [end.json()["error"]["code"] for end in [answer, *ends] if end.status_code != 200]
    measured(f"R25: {len(refused)} of 101 requests refused")
    assert set(refused) <= {"insufficient_memory"}
    assert len(refused) <= 5
    assert {end.status_code for end in ends[10:]} == {200}
    assert len(router.events("engine_died")) <= 2


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group whose processes together get no more; skips where none can be made."""
    is_v1 = (CGROUPS / "memory").is_dir()
    group = (CGROUPS / "memory" if is_v1 else CGROUPS) / f"router-test-{os.getpid()}"
    names = ["memory.limit_in_bytes"] if is_v1 else ["memory.max", "memory.swap.max"]
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"R26 needs a memory control group, which only root can make: {error}")
    try:
        try:
            for name, value in zip(names, (limit_bytes, 0), strict=False):
                (group / name).write_text(str(value))
        except OSError as error:
            pytest.skip(f"R26 needs a control group with a memory limit: {error}")
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_r26_the_kernel_ends_an_engine_that_takes_too_much_memory(
    start: Start, tmp_path: Path
) -> None:
    fault = {"kind": "crash", "how": "grow", "at_token": 3, "once_file": str(tmp_path / "grew")}
    hungry = {"match": {"contains": "hungry"}, "reply": "abc ", "repeat": True, "faults": [fault]}
    script = {**SLOW, "rules": [hungry, *SLOW["rules"]]}
    with memory_group(GROUP_BYTES) as group, contextlib.ExitStack() as stack:
        router = start(script=script, gpus="cpu,cpu")
        stack.callback(router.popen.wait, 60)
        stack.callback(router.signal, signal.SIGTERM)
        assert router.url
        for pid in router.engine_pids:
            (group / "cgroup.procs").write_text(str(pid))
        others = [stack.enter_context(router.stream("go", max_tokens=60)) for _ in range(6)]
        answer = router.complete("hungry", max_tokens=20)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"] == "abc " * 5
        assert answer.json()["usage"]["completion_tokens"] == 20
        for events in others:
            assert text_of(list(events)) == "abc " * 15
        (report,) = router.wait_for("engine_died")
        assert report["cause"] == "out_of_memory"
        assert report["reason"] == "killed by the kernel, out of memory"
        assert report["in_flight"] > 0
        assert router.metric("router_requests_quarantined_total") == 0
