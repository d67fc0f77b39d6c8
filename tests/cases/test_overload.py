"""Cases of the kind overload: too many requests, dead engines, loading models."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from router.flow import FlowSettings
from tests.cases.asking import CHAT, Scripted, assert_alive, content, error, error_object, user
from tests.router_parts import Answer, Play, call, chat, text_play
from tests.router_process import RouterProcess, Start, until
from tests.serving import wait_for

DIGITS = "0123456789"


def asked(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [user(text)], **fields}


def overloaded(answer: httpx.Response) -> None:
    """503 in the usual form, with the seconds to wait."""
    assert answer.status_code == 503, answer.text
    assert error_object(answer.content)["code"] == "server_is_overloaded"
    assert int(answer.headers["retry-after"]) >= 1


def get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False, timeout=60)


def chat_with(router: RouterProcess, text: str = "hi", **fields: Any) -> httpx.Response:
    body = asked(text, **fields)
    return httpx.post(router.url + CHAT, json=body, trust_env=False, timeout=60)


async def test_case_176_a_full_queue_is_told_at_once(engine: Scripted) -> None:
    settings = FlowSettings(max_concurrency=2)
    gate = asyncio.Event()
    async with engine(
        Play(text_play("ok").steps, gate=gate), settings=settings, max_queue=3
    ) as router:
        accepted = [asyncio.ensure_future(chat(router.app)) for _ in range(5)]
        await until(lambda: router.admission.active == 5)
        for stream in (False, True):
            refused = await chat(router.app, stream=stream)
            told = error(refused, 503)
            assert (told["code"], told["type"]) == ("server_is_overloaded", "server_error")
            assert int(refused.headers["retry-after"]) >= 1
        gate.set()
        assert [content(answer) for answer in await asyncio.gather(*accepted)] == ["ok"] * 5
        await assert_alive(router.app)


async def test_case_176_a_key_with_more_than_its_share_is_slowed_down(engine: Scripted) -> None:
    settings = FlowSettings(max_concurrency=1)
    gate = asyncio.Event()
    keys = tuple(hashlib.sha256(key.encode()).digest() for key in ("greedy", "modest"))
    play = Play(text_play("ok").steps, gate=gate)
    async with engine(play, settings=settings, max_queue=3, keys=keys) as router:

        def ask(key: str) -> asyncio.Future[Answer]:
            headers = {"authorization": f"Bearer {key}"}
            return asyncio.ensure_future(
                call(router.app, "POST", CHAT, asked(max_tokens=10), headers=headers)
            )

        many = [ask("greedy") for _ in range(4)]  # one runs, three fill the queue
        await until(lambda: router.admission.active == 4)
        one = ask("modest")
        done, _ = await asyncio.wait(many, return_when="FIRST_COMPLETED")
        (slowed,) = (task.result() for task in done)
        assert error(slowed, 429)["code"] == "slow_down"
        assert int(slowed.headers["retry-after"]) >= 1
        gate.set()
        assert content(await one) == "ok"
        answers = await asyncio.gather(*many)
        assert sorted(answer.status for answer in answers) == [200, 200, 200, 429]


@pytest.mark.slow
def test_case_178_health_tells_of_a_dead_engine(start: Start) -> None:
    never = [{"kind": "never_ready", "when": "load", "epoch": 2}]
    router = start(script={"start_faults": never})
    assert get(f"{router.url}/health").status_code == 200
    os.kill(router.engine_pid(0), signal.SIGKILL)
    wait_for(lambda: get(f"{router.url}/health").status_code != 200, 60)
    overloaded(get(f"{router.url}/health"))
    assert get(f"{router.url}/health/live").status_code == 200


@pytest.mark.slow
def test_case_179_no_stream_hangs_when_an_engine_dies(start: Start) -> None:
    """Better than an error event: the stream goes on, on the engine that is started again."""
    rule = {"match": {"contains": "count"}, "reply": DIGITS * 4, "tokens_per_s": 20}
    router = start(script={"rules": [rule, {"match": "*", "reply": DIGITS}]})
    texts: list[str] = []
    with httpx.stream(
        "POST", router.url + CHAT, json=asked("count", stream=True), trust_env=False, timeout=30
    ) as answer:
        for line in answer.iter_lines():
            texts.append(line.removeprefix("data: "))
            if len([text for text in texts if text]) == 5:
                os.kill(router.engine_pid(0), signal.SIGKILL)
    events = [text for text in texts if text.startswith("{")]
    assert [text for text in texts if text][-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == DIGITS * 4
    assert chat_with(router).status_code == 200


@pytest.mark.slow
def test_case_179_nor_when_it_stays_dead(start: Start, folder: Path) -> None:
    """Beside a model that lives: without any the router would end, see case 181."""
    fault = {"kind": "crash", "when": "load", "replica": 1}
    gone = [{**fault, "epoch": number} for number in range(2, 8)]
    rule = {"match": {"contains": "endless"}, "reply": DIGITS, "repeat": True, "tokens_per_s": 20}
    models = ("--models", f"good={folder},tiny={folder}", "--on-fatal", "wait")
    script = {"rules": [rule, {"match": "*", "reply": DIGITS}], "start_faults": gone}
    router = start(*models, script=script, gpus="cpu,cpu")
    assert router.url
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = pool.submit(chat_with, router, "endless", stream=True)
        wait_for(lambda: router.metric("router_requests_running") == 1)
        os.kill(router.engine_pid(1), signal.SIGKILL)
        router.wait_for("engine_died", 5, limit_s=100)
        text = stream.result(20).text
    *_, event, done, _ = text.split("\n\n")
    assert error_object(event.removeprefix("data: ").encode())["code"] == "server_is_overloaded"
    assert done == "data: [DONE]"
    overloaded(chat_with(router))
    assert chat_with(router, model="good").status_code == 200


@pytest.mark.slow
def test_case_181_the_exit_code_tells(start: Start) -> None:
    router = start(script={"start_faults": [{"kind": "crash", "when": "ready"}]})
    assert router.wait(60) == 70
    assert router.leftovers() == []


@pytest.mark.slow
def test_case_182_while_the_model_loads(start: Start) -> None:
    router = start(script={"load_s": 2.0, "rules": [{"match": "*", "reply": DIGITS}]})
    router.wait_for("engine_loading")
    sockets = psutil.Process(router.popen.pid).net_connections("tcp")
    (port,) = {each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN}
    url = f"http://127.0.0.1:{port}"
    overloaded(get(f"{url}/health"))
    overloaded(httpx.post(url + CHAT, json=asked(), trust_env=False))
    overloaded(httpx.post(url + CHAT, json=asked(stream=True), trust_env=False))
    assert chat_with(router).status_code == 200  # once it says that it is ready
