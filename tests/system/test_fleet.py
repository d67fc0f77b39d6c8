"""Engines that die, hang and babble, behind a router that goes on; see also test_continuation."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.lifelines import measured
from tests.router_process import RouterProcess, Start, free_port, text_of, tiny_model

pytestmark = pytest.mark.slow

TEXT = "The quick brown fox jumps over the lazy dog. " * 3


def script(*rules: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"rules": [*rules, {"match": "*", "reply": TEXT}], "tokens_per_s": 100, **fields}


def streamed(router: RouterProcess, prompt: str = "go", **fields: Any) -> list[Any]:
    with router.stream(prompt, max_tokens=500, **fields) as events:
        return list(events)


def wait_streaming(router: RouterProcess, number: int) -> None:
    end_s = time.monotonic() + 60
    while router.metric("router_requests_running") < number:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def served(router: RouterProcess) -> list[float]:
    """Generated tokens by replica."""
    text = httpx.get(f"{router.url}/metrics", trust_env=False).text
    found = re.findall(r"router_engine_generated_tokens_total\{.*replica=\"(\d)\"} (\S+)", text)
    return [float(value) for _, value in sorted(found)]


def test_equal_requests_alternate(start: Start) -> None:
    router = start(script={}, gpus="cpu,cpu")
    for _ in range(20):
        assert router.complete("x" * 60, max_tokens=3).status_code == 200
    counts = served(router)
    assert len(counts) == 2
    assert abs(counts[0] - counts[1]) <= 4  # tokens: at most one request apart


def test_kill_9_of_an_engine_costs_nobody_anything(start: Start) -> None:
    router = start(script=script(), gpus="cpu,cpu")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(streamed, router) for _ in range(8)]
        wait_streaming(router, 8)
        time.sleep(0.3)
        os.kill(router.engine_pid(0), signal.SIGKILL)
        for future in running:
            events = future.result(100)
            assert events[-1] == "[DONE]"
            assert text_of(events) == TEXT
            assert "error" not in str(events)
    router.wait_for("engine_ready", 3)  # back without help
    report = router.events("engine_died")
    assert [(r["cause"], r["next"]) for r in report] == [("signal", "restart")]
    assert report[0]["steps"] > 0
    assert min(report[0][f"{name}_bytes"] for name in ("rss", "peak_rss", "free")) > 0
    assert report[0]["suspects"] == ""  # each had tokens from it
    moved = report[0]["in_flight"]
    assert 3 <= moved <= 5
    assert len(report[0]["requests"].split()) == moved
    assert router.metric("router_requests_migrated_total") == moved
    assert router.metric("router_engine_restarts_total") == 1
    assert router.complete("after").json()["choices"][0]["text"] == TEXT[:16]


def test_a_frozen_idle_engine_is_replaced(start: Start) -> None:
    router = start("--hang-timeout", "1", script=script(), gpus="cpu,cpu")
    assert router.url
    os.kill(router.engine_pid(1), signal.SIGSTOP)
    assert router.wait_for("engine_died", limit_s=60)[0]["replica"] == 1
    router.wait_for("engine_ready", 3)


def test_a7_a_loop_that_stands_still_while_it_answers_pings(start: Start) -> None:
    """Our own engine cannot do that: one thread answers pings and computes. Others may."""
    rule = {
        "match": {"contains": "freeze"},
        "reply": TEXT,
        "faults": [{"kind": "frozen", "at_token": 5, "epoch": 1}],
    }
    router = start("--hang-timeout", "1", script=script(rule))
    assert text_of(streamed(router, "freeze")) == TEXT
    assert router.wait_for("engine_died")[0]["cause"] == "hang"


def test_r7_long_loads_and_long_steps_are_no_hangs(start: Start) -> None:
    """Both last longer than the hang timeout, and the server says that it lives all the while."""
    fault = {"kind": "slow_step", "seconds": 2.5, "announce": True}
    rule = {"match": {"contains": "slow"}, "reply": TEXT, "faults": [fault]}
    port = free_port()
    words = ("--hang-timeout", "1", "--port", str(port))
    router = start(*words, script=script(rule, load_s=2.5), gpus="cpu,cpu")
    router.wait_for("engine_loading", 2)
    live: list[int] = []

    def probe() -> None:
        while not stopping.is_set():
            with contextlib.suppress(httpx.ConnectError):  # not yet
                url = f"http://127.0.0.1:{port}/health/live"
                live.append(httpx.get(url, timeout=60, trust_env=False).status_code)
            stopping.wait(0.05)

    stopping = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        probing = pool.submit(probe)
        try:
            slow = [pool.submit(streamed, router, "slow") for _ in range(2)]
            assert [text_of(future.result(60)) for future in slow] == [TEXT] * 2
        finally:
            stopping.set()
        probing.result(60)
    assert set(live) == {200}
    assert len(live) > 10
    assert router.events("engine_died") == []
    assert len(router.events("engine_ready")) == 2


@pytest.mark.parametrize(
    "kind", ["garbage", "truncated", "stale", "unknown_id", "duplicate_finish"]
)
def test_nonsense_from_an_engine_changes_nothing(start: Start, kind: str) -> None:
    rule = {
        "match": {"contains": "noise"},
        "reply": TEXT,
        "faults": [{"kind": kind, "at_token": 5}],
    }
    router = start(script=script(rule))
    assert text_of(streamed(router, "noise")) == TEXT
    assert text_of(streamed(router, "quiet")) == TEXT
    assert router.events("engine_died") == []


def test_an_id_out_of_range_costs_that_request_only(start: Start) -> None:
    rule = {"match": {"contains": "bad"}, "faults": [{"kind": "bad_id", "at_token": 3}]}
    router = start(script=script({**rule, "reply": TEXT}))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        good = pool.submit(streamed, router, "good")
        wait_streaming(router, 1)
        *_, error, done = streamed(router, "bad")
        assert error["error"]["code"] == "internal_error"
        assert done == "[DONE]"
        assert text_of(good.result(100)) == TEXT
    plain = router.complete("bad", max_tokens=50)
    assert plain.status_code == 500
    assert plain.json()["error"]["code"] == "internal_error"
    assert router.events("engine_died") == []


@pytest.mark.slow
def test_r9_a_crash_loop_beside_a_good_model(start: Start, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    faults = [{"kind": "crash", "how": "exit", "code": 9, "replica": 1}]
    models = ("--models", f"tiny={model},bad={model}")
    router = start(
        "--on-fatal", "wait", *models, script=script(start_faults=faults), gpus="cpu,cpu"
    )
    router.wait_for("engine_died")
    process = psutil.Process(router.popen.pid)
    begin_s, busy_s = time.monotonic(), sum(process.cpu_times()[:2])
    reports = router.wait_for("engine_died", 5, limit_s=100)
    busy_s, passed_s = sum(process.cpu_times()[:2]) - busy_s, time.monotonic() - begin_s
    measured(f"R9: five crashes take {busy_s / passed_s:.1%} of a core of the router")
    assert [report["next"] for report in reports] == ["restart"] * 4 + ["park"]
    delays = [report["delay_s"] for report in reports[:4]]
    for k, delay in enumerate(delays):
        assert 0.8 * 0.5 * 2**k <= delay <= 1.2 * 0.5 * 2**k + 0.01
    assert router.complete("good", max_tokens=5).status_code == 200
    bad = router.complete(model="bad")
    assert bad.status_code == 503
    assert "parked" in bad.json()["error"]["message"]
    good, parked = httpx.get(f"{router.url}/admin/replicas", trust_env=False).json()["data"]
    assert (good["state"], good["restarts"], good["crashes"]) == ("serving", 0, [])
    assert (parked["state"], parked["pid"], parked["crashes_in_a_row"]) == ("parked", None, 5)
    assert [crash["exit_code"] for crash in parked["crashes"]] == [9] * 5
    httpx.post(f"{router.url}/admin/replicas/1/restart", trust_env=False).raise_for_status()
    again = router.wait_for("engine_died", 6)[5]
    assert (again["next"], again["cause"]) == ("restart", "exit")  # earlier crashes are forgiven
    router.wait_for("engine_died", 7)
    assert router.popen.poll() is None


@pytest.mark.slow
def test_a_crash_loop_of_everything_ends_the_router(start: Start) -> None:
    faults = [{"kind": "crash", "when": "ready"}]
    router = start(script=script(start_faults=faults))
    assert router.wait(60) == 70
    assert len(router.events("engine_died")) == 5
    assert "SIGKILL" in router.log.splitlines()[-1]
    assert router.leftovers() == []


def test_two_routers_do_not_know_each_other(start: Start) -> None:
    one, two = start(script=script()), start(script=script())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(streamed, two)
        wait_streaming(two, 1)
        assert one.url
        one.signal(signal.SIGTERM)
        assert one.wait() == 0
        assert text_of(running.result(100)) == TEXT


@pytest.mark.slow
def test_a_real_engine_dies_and_its_streams_go_on_exactly(start: Start, tmp_path: Path) -> None:
    """Seeded sampling: the continuation on another engine must equal the undisturbed answer."""
    models = ("--models", f"tiny={tiny_model(tmp_path)}")
    router = start(*models, "--max-len", "1024", gpus="cpu,cpu")
    fields = {"max_tokens": 600, "temperature": 1.0, "ignore_eos": True}

    def answer(seed: int) -> list[int]:
        with router.stream("Once", seed=seed, return_token_ids=True, **fields) as events:
            chunks = [event for event in events if isinstance(event, dict)]
        assert "error" not in str(chunks)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        return [token for choice in choices for token in choice.get("token_ids") or []]

    alone = [answer(seed) for seed in range(3)]
    assert [len(tokens) for tokens in alone] == [600] * 3
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        running = [pool.submit(answer, seed % 3) for seed in range(6)]
        wait_streaming(router, 6)
        time.sleep(0.2)
        os.kill(router.engine_pid(0), signal.SIGKILL)
        together = [future.result(100) for future in running]
    assert router.wait_for("engine_died")[0]["in_flight"] > 0
    assert together == alone + alone
    router.signal(signal.SIGTERM)
    assert router.wait() == 0
    assert router.leftovers() == []
