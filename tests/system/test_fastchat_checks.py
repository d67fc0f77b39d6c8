"""What went wrong in the system that this one replaces, as checks with its numbers.

The list is in the project's FastChat notes; those that need a GPU (1, 2 on cards, 20 as a figure)
or embeddings (10, 11) are elsewhere or to come. Scripted engines where only the router is asked,
the real engine with the demo model or with a tiny random one where the answer is the point.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from langchain_openai import ChatOpenAI

from tests.demo_model import demo_model
from tests.serving import ROOT, Server, serve, wait_for
from tools.tiny_model import write_tiny_model

MODEL = "tiny"
DIGITS = "0123456789"
WORLD = "é😊你好🇫🇷 ünï"  # many bytes to a character


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


def script(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    common = [
        {"match": {"contains": "slow"}, "reply": "x", "repeat": True, "tokens_per_s": 20},
        {"match": {"contains": "count"}, "reply": DIGITS, "tokens_per_s": 10},
        {"match": {"contains": "world"}, "reply": WORLD},
        {"match": {"contains": "raises"}, "reply": "ab", "finish": "error", "detail": "boom"},
        {"match": "*", "reply": DIGITS},
    ]
    return {"rules": [*rules, *common], **more}


@pytest.fixture(scope="module")
def scripted(folder: Path) -> Iterator[Server]:
    with serve("--models", str(folder), script=script()) as running:
        yield running


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Server]:
    """The real engine over the tiny random model."""
    with serve("--models", str(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    """The real engine over the demo model, as `router` without a model serves it."""
    demo_model()
    with serve("--kv-memory", "400M") as running:
        yield running


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": text, **fields}


def post(server: Server, text: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body(text, **fields), timeout=60)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def streamed_text(server: Server, text: str, **fields: Any) -> str:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        stream = client.completions.create(**body(text, **fields), stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)


def idle(server: Server) -> bool:
    names = ("router_permits_used", "router_requests_waiting", "router_requests_running")
    return all(server.metric(name) == 0 for name in names)


def per_replica(server: Server, name: str) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(rf'^{name}{{.*replica="(\d+)".*}} (\S+)$', text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}


async def gather(server: Server, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return list(
            await asyncio.gather(*(client.post("/v1/completions", json=sent) for sent in bodies))
        )


def test_check_02_two_devices_share_the_work(folder: Path) -> None:
    with serve("--models", f"{folder},{folder}", "--gpus", "cpu,cpu", script=script()) as server:
        wait_for(lambda: len(server.events("engine_ready")) == 2, 60, server)
        for number in range(100):
            assert text_of(post(server, f"request {number}")) == DIGITS
        steps = per_replica(server, "router_engine_generated_tokens_total")
        shares = [tokens / (len(DIGITS) + 1) for tokens in steps.values()]
        assert sum(shares) == 100
        assert abs(shares[0] - shares[1]) <= 1
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == [MODEL]


FIELDS: dict[str, list[Any]] = {
    "model": [None, 5, "nope"],
    "prompt": [None, 5, {}, [], "", [[]], [-1], ["a", 1]],
    "max_tokens": [None, "5", -1, 0, 2**40],
    "temperature": [None, "1", -0.1, 0, 2, 2.1],
    "top_p": [None, "1", -0.1, 0, 1, 1.1],
    "top_k": [None, "1", -2, -1, 0, 2**40],
    "min_p": [None, "1", -0.1, 0, 1, 1.1],
    "presence_penalty": [None, "1", -2, 2, 2.1],
    "frequency_penalty": [None, "1", -2, 2, -2.1],
    "repetition_penalty": [None, "1", 0, 2, 2.1],
    "seed": [None, "1", -(2**63), 2**63 - 1, 2**63, 0.5],
    "n": [None, "1", 0, 1, 129],
    "best_of": [None, "1", 0, 1, 20],
    "stop": [None, 5, "", [], ["a"] * 33, ["", "5"]],
    "stop_token_ids": [None, "1", [], [-1], [0], [10**9]],
    "logit_bias": [None, 5, {}, {"x": 1}, {"5": 101}, {"5": -100}],
    "logprobs": [None, "1", True, -1, 0, 20, 21],
    "echo": [None, "yes", True, False],
    "stream": [None, "yes", 1],
    "stream_options": [None, "yes", {}, {"include_usage": "x"}],
    "min_tokens": [None, "1", -1, 0, 10**6],
    "ignore_eos": [None, "yes", True],
    "cache_salt": [None, 5, "", "x"],
    "priority": [None, "1", 2**40, -5],
    "tools": [None, "x", [], [{}]],
    "response_format": [None, "x", {}, {"type": "text"}, {"type": "json_object"}],
    "user": [None, 5],
}


@pytest.mark.parametrize("field", FIELDS)
def test_check_03_every_field_at_its_worst(scripted: Server, field: str) -> None:
    for value in FIELDS[field]:
        answer = httpx.post(
            f"{scripted.url}/v1/completions", json={**body("hi"), field: value}, timeout=60
        )
        assert answer.status_code in (200, 400, 404), (value, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        elif value is None:
            assert text_of(answer) == DIGITS
    wait_for(lambda: idle(scripted), 30, scripted)


async def test_check_04_a_thousand_errors_and_hang_ups(scripted: Server) -> None:
    chance = random.Random(4)
    busy = asyncio.Semaphore(32)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        prompt = chance.choice(["raises", "slow", "hi"])
        sent = body(f"{prompt} {number}", stream=chance.random() < 0.5, max_tokens=500)
        patience_s = 0.02 * chance.random() if prompt == "slow" else 60
        async with busy:
            with contextlib.suppress(TimeoutError, httpx.ReadError):
                async with asyncio.timeout(patience_s):
                    await client.post("/v1/completions", json=sent)

    limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=scripted.url, timeout=60, limits=limits) as client:
        await asyncio.gather(*(one(client, number) for number in range(1000)))
    wait_for(lambda: idle(scripted), 30, scripted)
    assert scripted.metric("router_engine_queue") == 0
    assert text_of(post(scripted, "hi")) == DIGITS


async def test_check_05_an_engine_is_killed(folder: Path) -> None:
    with serve("--models", str(folder), "--gpus", "cpu,cpu", script=script()) as server:
        wait_for(lambda: len(server.events("engine_ready")) == 2, 60, server)
        bodies = [body(f"count {i}", stream=i % 2 == 0) for i in range(8)]
        answers = asyncio.ensure_future(gather(server, bodies))
        await asyncio.to_thread(
            wait_for, lambda: server.metric("router_requests_running") == 8, 5, server
        )
        victim = server.engines()[0]
        victim.kill()
        for answer, sent in zip(await answers, bodies, strict=True):
            assert answer.status_code == 200
            if sent["stream"]:
                assert '"error"' not in answer.text
                pieces = re.findall(r'"text":"(\d)"', answer.text)
                assert "".join(pieces) == DIGITS
            else:
                assert text_of(answer) == DIGITS
        for number in range(8):
            assert text_of(post(server, f"after {number}")) == DIGITS
        await asyncio.to_thread(
            wait_for, lambda: len(server.events("engine_ready")) == 3, 10, server
        )
        assert victim.pid not in [engine.pid for engine in server.engines()]


async def test_check_06_an_engine_is_stopped(folder: Path) -> None:
    words = ("--models", str(folder), "--gpus", "cpu,cpu", "--hang-timeout", "1")
    with serve(*words, script=script()) as server:
        wait_for(lambda: len(server.events("engine_ready")) == 2, 60, server)
        answers = asyncio.ensure_future(gather(server, [body(f"count {i}") for i in range(4)]))
        await asyncio.to_thread(
            wait_for, lambda: server.metric("router_requests_running") == 4, 5, server
        )
        server.engines()[0].send_signal(signal.SIGSTOP)
        async with asyncio.timeout(60):
            assert [text_of(answer) for answer in await answers] == [DIGITS] * 4
        assert text_of(post(server, "hi")) == DIGITS


async def test_check_07_sigterm_lets_requests_end(folder: Path) -> None:
    with serve("--models", str(folder), script=script(), clean=False) as server:
        bodies = [body("count", stream=True), body("count")]
        answers = asyncio.ensure_future(gather(server, bodies))
        await asyncio.to_thread(
            wait_for, lambda: server.metric("router_requests_running") == 2, 5, server
        )
        server.engines()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_for, lambda: bool(server.events("draining")), 5, server)
        with contextlib.suppress(httpx.ConnectError):  # refused in either way
            async with httpx.AsyncClient() as client:
                late = await client.post(f"{server.url}/v1/completions", json=body("hi"))
            assert (late.status_code, late.headers["retry-after"].isdecimal()) == (503, True)
        streamed, whole = await answers
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in streamed.text
        assert text_of(whole) == DIGITS
        assert await asyncio.to_thread(server.wait_end) == 0


def test_check_07_nothing_outlives_a_killed_router(folder: Path) -> None:
    with serve(
        "--models", str(folder), "--gpus", "cpu,cpu", script=script(), clean=False
    ) as server:
        wait_for(lambda: len(server.events("engine_ready")) == 2, 60, server)
        engines = server.engines()
        assert len(engines) == 2
        server.process.kill()
        server.process.wait()
        server.assert_nothing_left(2.0)


@pytest.mark.parametrize(
    ("words", "code", "tells"),
    [
        (("--models", "/no/such/model"), 78, "/no/such/model"),
        (("--models", "{folder}", "--port", "{busy}"), 69, "port"),
        (("--models", "{folder}", "--gpus", "7"), 69, "7"),
        (("--models", "{folder}", "--kv-memory", "1000T"), 75, "GB are free"),
        (("--nonsense",), 64, "--nonsense"),
    ],
)
def test_check_08_a_wrong_start_says_why(
    folder: Path, words: tuple[str, ...], code: int, tells: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = [word.format(folder=folder, busy=taken.getsockname()[1]) for word in words]
        if "--gpus" not in given:
            given += ["--gpus", "cpu"]
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        ended = subprocess.run(
            [sys.executable, "-m", "router.cli", *given],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == code, ended.stderr
    assert tells in ended.stderr
    assert "Traceback" not in ended.stderr
    left = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not left


async def test_check_09_sixteen_streams_share_their_steps(real: Server) -> None:
    steps = real.metric("router_engine_steps_total")
    tokens = real.metric("router_engine_generated_tokens_total")
    bodies = [body(f"prompt {i}", max_tokens=64, ignore_eos=True, stream=True) for i in range(16)]
    for answer in await gather(real, bodies):
        assert answer.text.endswith("data: [DONE]\n\n")
    steps = real.metric("router_engine_steps_total") - steps
    tokens = real.metric("router_engine_generated_tokens_total") - tokens
    assert tokens == 16 * 64
    assert steps < tokens / 5


@pytest.mark.parametrize("length", range(1, 41))
def test_check_12_streamed_equals_whole_at_every_cut(scripted: Server, length: int) -> None:
    whole = text_of(post(scripted, "world", max_tokens=length))
    assert streamed_text(scripted, "world", max_tokens=length) == whole
    data = WORLD.encode()[:length]
    assert whole == data.decode(errors="replace")


@pytest.mark.parametrize(
    ("stops", "text"), [((",", "6"), "0123 45"), (("45", "4"), "0123 "), (("9", "0123 4"), "")]
)
def test_check_13_the_earliest_stop_wins_in_any_order(
    folder: Path, stops: tuple[str, str], text: str
) -> None:
    rule = {"match": {"contains": "stops"}, "reply": "0123 456, 789"}
    with serve("--models", str(folder), script=script(rule)) as server:
        for stop in (list(stops), list(reversed(stops))):
            assert text_of(post(server, "stops", stop=stop)) == text
            assert streamed_text(server, "stops", stop=stop) == text


def test_check_14_usage_is_exact(scripted: Server) -> None:
    prompts: set[int] = set()
    for max_tokens in (1, 5, 10, 11, 10_000):
        answer = post(scripted, "héllo", max_tokens=max_tokens, return_token_ids=True).json()
        usage, choice = answer["usage"], answer["choices"][0]
        prompts.add(usage["prompt_tokens"])
        assert usage["completion_tokens"] == len(choice["token_ids"]) == min(max_tokens, 11)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert prompts == {len("héllo".encode())}


async def test_check_15_a_seed_means_the_same_text_in_company(real: Server) -> None:
    seeded = body("once upon", seed=7, temperature=0.8, max_tokens=24, ignore_eos=True)
    seeded["return_token_ids"] = True
    (alone,) = await gather(real, [seeded])
    others = [body(f"other {i}", temperature=1, max_tokens=24) for i in range(15)]
    beside, *_ = await gather(real, [seeded, *others])
    assert beside.json()["choices"][0]["token_ids"] == alone.json()["choices"][0]["token_ids"]
    (different,) = await gather(real, [{**seeded, "seed": 8}])
    assert different.json()["choices"][0]["token_ids"] != alone.json()["choices"][0]["token_ids"]


async def test_check_16_over_the_limit_is_refused_at_once(folder: Path) -> None:
    words = ("--models", str(folder), "--max-concurrency", "1", "--max-queue", "2")
    with serve(*words, script=script()) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            sent = [
                asyncio.ensure_future(client.post("/v1/completions", json=body(f"count {i}")))
                for i in range(3)
            ]
            await asyncio.to_thread(
                wait_for, lambda: server.metric("router_requests_waiting") == 2, 5, server
            )
            for _ in range(5):
                refused = await client.post("/v1/completions", json=body("one more"))
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "server_is_overloaded"
                assert int(refused.headers["retry-after"]) >= 1
                assert (await client.get("/health")).status_code == 200
                assert (await client.get("/v1/models")).status_code == 200
            assert [text_of(await answer) for answer in sent] == [DIGITS] * 3


async def test_check_17_a_plain_client_leaves(scripted: Server) -> None:
    def made() -> float:
        return scripted.metric("router_engine_generated_tokens_total")

    async with httpx.AsyncClient(base_url=scripted.url) as client:
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post("/v1/completions", json=body("slow", max_tokens=2000), timeout=0.5)
    await asyncio.to_thread(wait_for, lambda: idle(scripted), 30, scripted)
    await asyncio.sleep(0.2)
    before = made()
    await asyncio.sleep(0.3)
    assert made() == before


@pytest.mark.slow
def test_check_18_clients_on_the_demo_model(demo: Server) -> None:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="-", max_retries=0) as client:
        (model,) = [model.id for model in client.models.list()]
        assert client.models.retrieve(model).id == model
        question: Any = [{"type": "text", "text": "What is the capital of France?"}]
        messages: Any = [{"role": "user", "content": question}]
        fields: dict[str, Any] = {"model": model, "messages": messages, "temperature": 0}
        whole = client.chat.completions.create(**fields, max_tokens=30)
        text = whole.choices[0].message.content
        assert text is not None
        assert "Paris" in text
        chunks = list(
            client.chat.completions.create(
                **fields, max_tokens=30, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert whole.usage is not None
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=messages)
    chain = ChatOpenAI(model=model, base_url=f"{demo.url}/v1", api_key="-", temperature=0)  # type: ignore[arg-type]
    assert "Paris" in str(chain.invoke("What is the capital of France?").content)


@pytest.mark.slow
def test_check_12_and_13_on_the_demo_model(demo: Server) -> None:
    prompt = "Some emoji: 😊 🎉 🚀 你好"
    fields: dict[str, Any] = {
        "model": "smollm2-135m",
        "seed": 3,
        "temperature": 1.2,
        "max_tokens": 40,
    }
    whole = text_of(post(demo, prompt, **fields))
    assert streamed_text(demo, prompt, **fields) == whole
    stops = [whole[10:12], whole[20:22]]
    cut = min(whole.index(stop) for stop in stops)
    for stop in (stops, stops[::-1]):
        assert text_of(post(demo, prompt, **fields, stop=stop)) == whole[:cut]
        assert streamed_text(demo, prompt, **fields, stop=stop) == whole[:cut]


def test_check_19_proxies_in_the_environment_change_nothing(folder: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    env = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)
    with serve("--models", str(folder), script=script(), env={**env, "no_proxy": ""}) as server:
        assert os.environ.get("http_proxy") != nowhere
        assert text_of(post(server, "hi")) == DIGITS
