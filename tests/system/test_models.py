"""Models that come, go, change, rest and return while clients are served."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.router_process import RouterProcess, Start, starting, tiny_model, wait_gone

ROUNDS = 8  # of the race between rest and arrival
LIMIT_S = 60.0  # against hangs
SCRIPT: dict[str, Any] = {
    "tokens_per_s": 200,
    "rules": [
        {"match": {"contains": "long"}, "reply": "ab", "repeat": True, "tokens_per_s": 50},
        {"match": {"contains": "die"}, "faults": [{"kind": "crash", "at_token": 0}]},
        {"match": "*", "reply": "0123456789"},
    ],
}
ANSWER = "0123456789"


class Configured:
    """A router whose router.toml a test rewrites."""

    def __init__(
        self,
        start: Start,
        folder: Path,
        *,
        gpus: str = "cpu",
        script: dict[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        self._path = folder / "router.toml"
        self.write(**keys)
        self.router: RouterProcess = start(
            "--config", str(self._path), script=script or SCRIPT, gpus=gpus
        )
        self.client = httpx.Client(base_url=self.router.url, timeout=LIMIT_S, trust_env=False)

    def write(self, **keys: Any) -> None:
        """The whole file anew."""
        lines = [
            f"{key.replace('_', '-')} = {value if isinstance(value, int | float) else repr(value)}"
            for key, value in keys.items()
        ]
        self._path.write_text("\n".join(lines), encoding="utf-8")

    def reload(self, **keys: Any) -> httpx.Response:
        """Rewrites the file and has it read."""
        self.write(**keys)
        return self.client.post("/admin/reload")

    def ask(self, model: str, prompt: str = "hello", **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, **fields}
        return self.client.post("/v1/completions", json=body)

    def text(self, model: str) -> str:
        answer = self.ask(model)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    @property
    def names(self) -> list[str]:
        return [entry["id"] for entry in self.client.get("/v1/models").json()["data"]]

    def state(self, model: str) -> str:
        """As /v1/models and /admin/models both tell it."""
        told = self.client.get("/admin/models").json()["data"]
        (operated,) = [entry for entry in told if model in entry["names"]]
        return str(operated["state"])

    def wait_for_state(self, model: str, state: str) -> None:
        until(lambda: self.state(model) == state, self.router)

    def operate(self, model: str, verb: str) -> httpx.Response:
        return self.client.post(f"/admin/models/{model}/{verb}")


def running(folder: Path) -> Iterator[Make]:
    """For a fixture: starts such routers, and ends them."""
    starts = starting(folder)
    start = next(starts)
    with contextlib.ExitStack() as stack:
        stack.callback(next, starts, None)

        def make(**options: Any) -> Configured:
            made = Configured(start, folder, **options)
            stack.callback(made.client.close)
            return made

        yield make


Make = Callable[..., Configured]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    yield from running(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Configured]:
    folder = tmp_path_factory.mktemp("shared")
    for make in running(folder):
        yield make(models=f"a={tiny_model(folder)}")


def until(condition: Callable[[], bool], router: RouterProcess) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, router.log
        time.sleep(0.02)


class Clients:
    """Threads that ask for one model again and again until the block ends; no failure is let by."""

    def __init__(self, url: str, model: str, num: int = 4, **fields: Any) -> None:
        self.answers: list[str] = []
        self.failures: list[str] = []
        self._body = {"model": model, "prompt": "hello", **fields}
        self._url = f"{url}/v1/completions"
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(num)]

    def _run(self) -> None:
        with httpx.Client(timeout=LIMIT_S, trust_env=False) as client:
            while not self._over.is_set():
                try:
                    answer = client.post(self._url, json=self._body)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code == 200:
                    self.answers.append(answer.json()["choices"][0]["text"])
                else:
                    self.failures.append(answer.text)

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(LIMIT_S)


def test_models_come_and_go_under_load(make: Make, tmp_path: Path) -> None:
    a, b = tiny_model(tmp_path), tiny_model_at(tmp_path / "b")
    c = make(models=f"a={a}")
    pids = list(c.router.engine_pids)
    with Clients(c.router.url, "a") as clients:
        done = c.reload(models=f"a|second={a},b={b}")
        assert done.status_code == 200, done.text
        changes = [(change["model"], change["change"]) for change in done.json()["models"]]
        assert changes == [("b", "add"), ("a", "rename")]
        assert c.names == ["a", "second", "b"]
        assert (c.text("second"), c.text("b")) == (ANSWER, ANSWER)
        assert 'router_engine_state{model="b",replica="1",state="serving"} 1.0' in metrics(c)
        c.write(models=f"a={a}", max_queue=9)
        c.router.signal(signal.SIGHUP)
        (_, second) = c.router.wait_for("reloaded", 2)
        assert second["changes"] == (
            "a: renamed (other names: none); b: removed; max-queue: 512 -> 9"
        )
    assert clients.failures == []
    assert set(clients.answers) == {ANSWER}
    assert c.names == ["a"]
    assert c.ask("b").status_code == 404
    assert 'model="b",replica' not in metrics(c)
    assert c.router.engine_pids[:1] == pids  # it was never touched
    assert wait_gone(c.router.engine_pids[1:], LIMIT_S) == []
    assert c.client.get("/health/ready").status_code == 200


def test_r17_a_model_is_exchanged_under_load(
    make: Make, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Streams of the old one end as they began; newcomers get the new one; nobody fails."""
    a, b = tiny_model(tmp_path), tiny_model_at(tmp_path / "b")
    fresh = [{"match": "*", "replica": index, "reply": "new"} for index in (2, 3)]
    script = {**SCRIPT, "rules": [*SCRIPT["rules"][:1], *fresh, *SCRIPT["rules"][1:]]}
    c = make(gpus="cpu,cpu", script=script, models=f"a={a}")
    old_pids = list(c.router.engine_pids)
    with Clients(c.router.url, "a") as clients:
        with c.router.stream("long", model="a", max_tokens=60) as events:
            next(events)
            began_s = time.monotonic()
            done = c.reload(models=f"a={b}")
            record_property("exchange_of_two_replicas_s", time.monotonic() - began_s)
            assert done.status_code == 200, done.text
            assert [(m["model"], m["change"], m["detail"]) for m in done.json()["models"]] == [
                ("a", "replace", "another source")
            ]
            rest = list(events)
        assert rest[-1] == "[DONE]"
        pieces = [e["choices"][0]["text"] for e in rest[:-1] if e["choices"]]
        assert set("".join(pieces)) == {"a", "b"}
        assert c.text("a") == "new"
    assert clients.failures == []
    assert set(clients.answers) == {ANSWER, "new"}
    assert wait_gone(old_pids, LIMIT_S) == []
    assert sorted(labels(c, "router_permits")) == ['model="a"']


def test_replicas_become_more_and_fewer_under_load(make: Make, tmp_path: Path) -> None:
    a, b = tiny_model(tmp_path), tiny_model_at(tmp_path / "b")
    c = make(gpus="cpu,cpu", models=f"a={a}")
    with Clients(c.router.url, "a", prompt="long", max_tokens=20) as clients:
        assert c.reload(models=f"a={a},b={b}").status_code == 200  # pairwise: one each
        assert len(states(c, "a")) == 1
        assert c.reload(models=f"a={a}").status_code == 200
        assert len(states(c, "a")) == 2
    assert clients.failures == []
    assert set(clients.answers) == {"ab" * 10}


def test_a_refused_reload_changes_nothing(make: Make, tmp_path: Path) -> None:
    a = tiny_model(tmp_path)
    c = make(models=f"a={a}", max_queue=7)
    pids = c.router.engine_pids
    for keys, named in (
        ({"models": f"a={a}", "max-quue": 3}, "max-quue"),
        ({"models": f"a={a}", "max-queue": "many"}, "max-queue"),
        ({"models": f"a={a},b={tmp_path / 'none'}"}, "none"),
        ({"models": f"a={a},a={tiny_model_at(tmp_path / 'b')}"}, "'a' would name two models"),
        ({"models": f"a={a},b={a}", "kv-memory": "9000G"}, "free"),
    ):
        answer = c.reload(**keys)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert named in error["message"], error
        assert error["code"] == "invalid_configuration"
        assert "router.toml" not in error["message"]
    answer = c.reload(models=f"a={a}", hang_timeout=5, log_level="debug")
    assert answer.status_code == 400
    assert "hang-timeout, log-level: cannot change" in answer.json()["error"]["message"]
    assert (c.names, c.text("a"), c.router.engine_pids) == (["a"], ANSWER, pids)
    assert c.client.get("/health/ready").status_code == 200
    assert len(c.router.events("reload_refused")) == 6


def test_a_newcomer_that_does_not_load_is_not_there(make: Make, tmp_path: Path) -> None:
    a, b = tiny_model(tmp_path), tiny_model_at(tmp_path / "b")
    faults = [{"kind": "fatal", "reason": "no such layer", "code": 78, "replica": 1}]
    c = make(script={**SCRIPT, "start_faults": faults}, models=f"a={a}")
    answer = c.reload(models=f"a={a},b={b}")
    assert answer.status_code == 400
    assert "'b' does not load: no such layer" in answer.json()["error"]["message"]
    assert (c.names, c.text("a")) == (["a"], ANSWER)
    assert c.reload(models=f"a={a},b={b}").status_code == 200  # replica 2 has no such fault


def test_load_and_unload(make: Make, tmp_path: Path) -> None:
    a, b = tiny_model(tmp_path), tiny_model_at(tmp_path / "b")
    c = make(models=f"a={a},x/b={b}")
    with c.router.stream("long", model="x/b", max_tokens=40) as events:
        next(events)
        answer = c.operate("x/b", "unload")
        assert (answer.status_code, answer.json()["state"]) == (200, "unloaded")
        assert list(events)[-1] == "[DONE]"  # who ran has ended by itself
    assert c.names == ["a", "x/b"]
    assert c.state("x/b") == "unloaded"
    refused = c.ask("x/b")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_unloaded"
    assert "/admin/models/x/b/load" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert wait_gone(c.router.engine_pids[1:], LIMIT_S) == []
    assert 'router_engine_state{model="x/b",replica="1",state="asleep"} 1.0' in metrics(c)
    assert c.text("a") == ANSWER
    assert c.client.get("/health/ready").status_code == 200
    assert c.operate("a", "unload").status_code == 200
    assert c.client.get("/health/ready").status_code == 503
    answer = c.operate("x/b", "load")
    assert (answer.status_code, answer.json()["state"]) == (200, "ready")
    assert c.text("x/b") == ANSWER
    assert c.operate("x/b", "load").status_code == 200  # it is already


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "file:a", "none", "x" * 10_000, "a%00"])
def test_s11_only_configured_names_are_loaded(
    shared: Configured, name: str, tmp_path: Path
) -> None:
    for verb in ("load", "unload"):
        answer = shared.operate(name, verb)
        assert answer.status_code in (404, 431)
        assert name not in answer.text
    assert shared.state("a") == "ready"


def test_an_idle_model_sleeps_and_a_request_wakes_it(
    make: Make, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    a, b = tiny_model(tmp_path), tiny_model_at(tmp_path / "b")
    script = {**SCRIPT, "load_s": 0.3}
    c = make(script=script, models=f"a={a},b={b}", idle_unload=3.0)
    with Clients(c.router.url, "a", num=1) as clients:
        c.wait_for_state("b", "asleep")
        assert c.client.get("/health/ready").status_code == 200
        assert wait_gone(c.router.engine_pids[1:2], LIMIT_S) == []
        began_s = time.monotonic()
        assert c.text("b") == ANSWER
        record_property("answer_of_a_sleeper_s", time.monotonic() - began_s)
    assert clients.failures == []
    assert c.router.engine_pids[0] == c.router.engine_pid(0)  # in use, so it never slept
    c.wait_for_state("a", "asleep")
    with c.router.stream("hello", model="a") as events:
        assert list(events)[-1] == "[DONE]"
    assert c.client.post("/v1/embeddings", json={"model": "b", "input": "x"}).status_code == 200


def test_a13_a_request_that_arrives_as_its_model_goes_to_sleep(
    make: Make, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Each round waits about as long as the limit; nobody may wait for ever, nobody may fail."""
    c = make(models=f"a={tiny_model(tmp_path)}", idle_unload=0.2)
    for at in range(ROUNDS):
        time.sleep(0.2 * (0.9 + 0.5 * at / ROUNDS))
        assert c.text("a") == ANSWER
    slept = len(c.router.events("model_sleeps"))
    record_property("slept", slept)
    assert slept > 0


def test_a13_crash_reload_and_unload_in_the_moment_of_arrival(make: Make, tmp_path: Path) -> None:
    """Whatever happens to a sleeping model while its waiters come: each of them is answered."""
    a, b = tiny_model(tmp_path), tiny_model_at(tmp_path / "b")
    faults = [{"kind": "crash", "when": "load", "replica": 0, "epoch": 2}]
    script = {**SCRIPT, "start_faults": faults}
    c = make(script=script, models=f"a={a},b={b}", idle_unload=0.3)
    c.wait_for_state("a", "asleep")
    assert c.text("a") == ANSWER  # its second start crashed
    statuses: list[int] = []

    def ask() -> None:
        answer = httpx.post(
            f"{c.router.url}/v1/completions",
            json={"model": "b", "prompt": "hello"},
            timeout=LIMIT_S,
            trust_env=False,
        )
        statuses.append(answer.status_code)

    def crowd(meanwhile: Callable[[], object]) -> list[int]:
        c.wait_for_state("b", "asleep")
        statuses.clear()
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        meanwhile()
        for thread in threads:
            thread.join(LIMIT_S)
        return list(statuses)

    unloaded = crowd(lambda: c.operate("b", "unload"))
    assert len(unloaded) == 4
    assert set(unloaded) <= {200, 503}
    assert c.operate("b", "load").status_code == 200
    reloaded = crowd(lambda: c.reload(models=f"a={a},b={a}", idle_unload=0.3))
    assert reloaded == [200] * 4
    removed = crowd(lambda: c.reload(models=f"a={a}", idle_unload=0.3))
    assert len(removed) == 4
    assert set(removed) <= {200, 404, 503}
    assert c.text("a") == ANSWER


def tiny_model_at(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return tiny_model(folder)


def metrics(c: Configured) -> str:
    return c.client.get("/metrics").text


def labels(c: Configured, name: str) -> list[str]:
    lines = [line for line in metrics(c).splitlines() if line.startswith(f"{name}{{")]
    return [line.partition("{")[2].partition("}")[0] for line in lines]


def states(c: Configured, model: str) -> list[str]:
    told = c.client.get("/admin/models").json()["data"]
    (entry,) = [entry for entry in told if entry["id"] == model]
    return [replica["state"] for replica in entry["replicas"]]
