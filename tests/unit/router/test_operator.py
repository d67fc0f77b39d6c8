"""The operator's routes: who may call them, what they show, and that nobody's answer is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from router.app import Access
from router.arguments import parse
from router.config import Options, key_digests, resolve
from tests.router_parts import Answer, Play, Router, call, complete, router_parts
from tests.router_process import until
from tools.tiny_model import encode_text, write_tiny_model

API, ADMIN = key_digests("client"), key_digests("operator")
OPEN = Access(admin_open=True)
ACTIONS = ("/admin/replicas/0/drain", "/admin/replicas/0/restart")

Make = Callable[..., AbstractAsyncContextManager[Router]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    folder = write_tiny_model(tmp_path / "tiny")

    @asynccontextmanager
    async def start(access: Access, **options: Any) -> AsyncIterator[Router]:
        gate: asyncio.Event | None = options.pop("gate", None)

        def plays(prompt: str) -> Play:
            return Play([encode_text("a"), encode_text("b")], gate=gate)

        async with router_parts(folder, plays, access=access, **options) as router:
            yield router

    return start


async def ask(router: Router, method: str, path: str, **headers: str) -> Answer:
    return await call(router.app, method, path, headers=headers)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("access", "headers", "status", "code"),
    [
        (OPEN, {}, 200, None),
        (OPEN, {"origin": "https://evil.example"}, 403, "admin_key_required"),
        (OPEN, {"origin": "http://localhost:8000", "host": "localhost:8000"}, 200, None),
        (Access(), {}, 403, "admin_key_required"),  # an open server that is not alone
        (Access(API, admin_open=True), {}, 401, "invalid_api_key"),
        (Access(API), bearer("client"), 403, "admin_key_required"),
        (Access(API), bearer("wrong"), 401, "invalid_api_key"),
        (Access(API, admin_keys=ADMIN), bearer("operator"), 200, None),
        (Access(API, admin_keys=ADMIN), {"x-api-key": "operator"}, 200, None),
        (Access(API, admin_keys=ADMIN), bearer("client"), 403, "admin_key_required"),
        (Access(API, admin_keys=ADMIN), bearer("wrong"), 401, "invalid_api_key"),
        (Access(API, admin_keys=ADMIN), {}, 401, "invalid_api_key"),
        (
            Access(API, admin_keys=ADMIN),
            {**bearer("operator"), "x-api-key": "client"},
            401,
            "invalid_api_key",
        ),
        (Access(admin_keys=ADMIN, admin_open=True), {}, 401, "invalid_api_key"),
        (Access(admin_keys=ADMIN), bearer("operator"), 200, None),
        (Access(hosts=("localhost",), admin_open=True), {"host": "evil.example"}, 403, None),
        (
            Access(admin_keys=ADMIN, hosts=("localhost",)),
            {**bearer("operator"), "host": "evil.example"},
            403,
            "host_not_allowed",
        ),
    ],
)
async def test_s5_s20_who_may_operate(
    make: Make, access: Access, headers: dict[str, str], status: int, code: str | None
) -> None:
    async with make(access, replicas=2) as router:
        for method, path in [("GET", "/admin/replicas"), *(("POST", path) for path in ACTIONS)]:
            answer = await ask(router, method, path, **headers)
            assert answer.status == status, path
            if code is not None:
                assert answer.json()["error"]["code"] == code
            if code == "admin_key_required":
                assert "--admin-key-file" in answer.json()["error"]["message"]
            if status != 200:
                assert router.fleet.replica(0).state == "serving"


async def test_s20_an_admin_key_opens_nothing_else(make: Make) -> None:
    async with make(Access(API, admin_keys=ADMIN)) as router:
        assert (await ask(router, "GET", "/v1/models", **bearer("operator"))).status == 401
        assert (await ask(router, "GET", "/v1/models", **bearer("client"))).status == 200


async def test_s20_actions_are_posts_and_leave_one_line(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "router")
    async with make(OPEN, replicas=2) as router:
        for path in ACTIONS:
            assert (await ask(router, "GET", path)).status == 405
        assert not [r for r in caplog.records if r.message == "operator"]
        assert (await ask(router, "POST", ACTIONS[1])).status == 200
        (line,) = [r for r in caplog.records if r.message == "operator"]
        fields: dict[str, Any] = vars(line)["fields"]
        assert (fields["action"], fields["replica"], fields["state"]) == ("restart", 0, "serving")


async def test_the_table_of_replicas(make: Make) -> None:
    async with make(OPEN, replicas=2) as router:
        told = (await ask(router, "GET", "/admin/replicas")).json()
        assert [row["id"] for row in told["data"]] == [0, 1]
        row = told["data"][1]
        assert (row["model"], row["names"], row["state"]) == ("tiny", ["tiny", "a/b"], "serving")
        assert (row["epoch"], row["restarts"], row["crashes"]) == (1, 0, [])


@pytest.mark.parametrize("index", ["7", "-1", "x", "9" * 400, "%00"])
async def test_a_replica_that_is_not_there(make: Make, index: str) -> None:
    async with make(OPEN) as router:
        for action in ("drain", "restart"):
            answer = await ask(router, "POST", f"/admin/replicas/{index}/{action}")
            assert (answer.status, answer.json()["error"]["code"]) == (404, "replica_not_found")


async def test_r17_what_a_drained_replica_worked_on_goes_on_elsewhere(make: Make) -> None:
    gate = asyncio.Event()
    async with make(OPEN, replicas=2, gate=gate) as router:
        asked = [asyncio.ensure_future(complete(router.app, "go")) for _ in range(4)]
        await until(lambda: len(router.engines.running) == 4)
        row = (await ask(router, "POST", ACTIONS[0])).json()
        assert (row["state"], row["running"], row["reason"]) == (
            "draining",
            0,
            "drained by the operator",
        )
        gate.set()
        answers = [await answer for answer in asked]
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {"ab"}
        metric = router.metrics.migrated.labels("handed_over")
        assert metric._value.get() == 2


async def test_the_last_replica_that_serves_is_not_drained(make: Make) -> None:
    async with make(OPEN, replicas=2) as router:
        assert (await ask(router, "POST", ACTIONS[0])).status == 200
        answer = await ask(router, "POST", "/admin/replicas/1/drain")
        assert (answer.status, answer.json()["error"]["code"]) == (409, "conflict")
        assert router.fleet.replica(1).state == "serving"


def test_s5_admin_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n# a comment\ntwo\n")
    http = parse(["--admin-key-file", str(path)], {"ROUTER_ADMIN_KEY": "three"}).config.http
    assert set(http.admin_keys) == set(key_digests("one\ntwo\nthree"))
    assert (http.api_keys, http.admin_open) == ((), False)


def test_only_a_server_of_this_machine_alone_is_open_to_operate() -> None:
    assert resolve(Options()).http.admin_open
    assert not resolve(Options(), api_keys=API).http.admin_open
    assert not resolve(Options(host="::", insecure_no_auth=True)).http.admin_open
    assert not resolve(Options(allowed_hosts="proxy.example")).http.admin_open
