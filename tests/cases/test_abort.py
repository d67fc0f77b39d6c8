"""Cases of the kind abort: clients that leave, over real sockets."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.cases.asking import CHAT, DEMO, KEY, TINY, Scripted, post, raw_connection, user
from tests.router_parts import Play, text_play
from tests.serving import Server, wait_for

ENOUGH_S = 30.0  # against hangs; on an idle machine it takes one step


def body_of(model: str, text: str, **fields: Any) -> bytes:
    asked = {"model": model, "messages": [user(text)], "max_tokens": 2000, **fields}
    return json.dumps(asked).encode()


def idle(server: Server) -> bool:
    """Nothing runs or waits, and no block is held."""
    names = ("permits_used", "requests_waiting", "requests_running", "kv_blocks_held")
    return all(server.metric(f"router_{name}") == 0 for name in names)


@pytest.mark.slow
def test_case_171_leaving_a_whole_answer(real: Server) -> None:
    assert idle(real)
    payload = body_of(DEMO, "Tell me everything.", ignore_eos=True)
    with raw_connection(real.url, payload):
        wait_for(lambda: real.metric("router_requests_running") == 1, 60, real)
        wait_for(lambda: real.metric("router_kv_blocks_held") > 0, 60, real)
    wait_for(lambda: idle(real), ENOUGH_S, real)


@pytest.mark.slow
def test_case_172_leaving_a_stream(real: Server) -> None:
    aborted = ended_by_abort(real)
    payload = body_of(DEMO, "Tell me everything.", ignore_eos=True, stream=True)
    with raw_connection(real.url, payload) as connection:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        wait_for(lambda: real.metric("router_requests_running") == 1, 60, real)
    wait_for(lambda: idle(real), ENOUGH_S, real)
    assert ended_by_abort(real) == aborted + 1


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_case_173_with_keys_and_request_log(process: Server, stream: bool) -> None:
    payload = body_of(TINY, "slow", ignore_eos=True, stream=stream)
    with raw_connection(process.url, payload, f"Authorization: Bearer {KEY}") as connection:
        if stream:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        wait_for(lambda: running(process) == 1, 60, process)
    wait_for(lambda: running(process) == 0, ENOUGH_S, process)
    wait_for(lambda: bool(process.events("request")), 60, process)
    assert process.events("request")[-1]["finish"] == "none"


def series(server: Server, name: str, label: str = "") -> float:
    """The sum over the series of a metric that have that label."""
    headers = {"authorization": f"Bearer {KEY}"}
    text = httpx.get(f"{server.url}/metrics", headers=headers).text
    lines = [line for line in text.splitlines() if line.startswith(name) and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def running(server: Server) -> float:
    return series(server, "router_requests_running")


def ended_by_abort(server: Server) -> float:
    return series(server, "router_request_success_total", 'finished_reason="abort"')


@pytest.mark.parametrize("stream", [False, True])
async def test_case_172_the_engine_is_told(engine: Scripted, stream: bool) -> None:
    play = Play(text_play("abc").steps, waits=True)
    async with engine(play) as router:
        fields = {"messages": [user("hi")], "stream": stream}
        await post(router.app, CHAT, fields, leave_after=2 if stream else 0)
        assert len(router.engines.aborted) == 1
        assert not router.engines.running
        assert (len(router.table), router.admission.active) == (0, 0)
