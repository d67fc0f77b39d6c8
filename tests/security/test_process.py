"""Rules of security that need a real process: sockets, memory, logs. Named by their numbers."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.router_process import RouterProcess

PAGE = "https://chat.example"


def test_s2_private_sockets_and_one_port(router: RouterProcess) -> None:
    paths = [router.runtime, *router.runtime.rglob("*")][1:]
    assert paths
    assert all(path.stat().st_mode & 0o077 == 0 for path in paths if path.is_dir())
    assert any(path.is_socket() for path in paths)
    process = psutil.Process(router.popen.pid)
    everyone = [process, *process.children(recursive=True)]
    listening = [
        each.laddr
        for one in everyone
        for each in one.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert len({address.port for address in listening}) == 1


def test_s16_grammars_are_compiled_in_a_process_of_their_own(
    router: RouterProcess, client: httpx.Client
) -> None:
    """One that ends its compiler ends a process that can be had again, and not the router."""
    bound = {"model": "tiny", "prompt": "hello", "guided_regex": "[a-z]{5}"}
    process = psutil.Process(router.popen.pid)
    for _ in range(2):
        assert client.post("/v1/completions", json=bound).status_code == 200
        compilers = [
            child
            for child in process.children()
            if "router.text.grammar_process" in child.cmdline()
        ]
        assert len(compilers) == 1
        assert "llguidance" in Path(f"/proc/{compilers[0].pid}/maps").read_text()
        assert "llguidance" not in Path(f"/proc/{process.pid}/maps").read_text()
        compilers[0].kill()
    assert client.post("/v1/completions", json=bound).status_code == 200


def test_s5_s22_keys_are_nowhere_to_be_seen(router: RouterProcess, client: httpx.Client) -> None:
    wrong = {"authorization": "Bearer sk-secret-three"}
    assert client.get("/v1/models", headers=wrong).status_code == 401
    assert client.get("/v1/models", headers={"x-api-key": "sk-secret-two"}).status_code == 200
    assert "sk-secret" not in router.log
    for child in psutil.Process(router.popen.pid).children(recursive=True):
        assert "sk-secret" not in Path(f"/proc/{child.pid}/environ").read_text()
        assert "sk-secret" not in " ".join(child.cmdline())


def test_s15_pages_220_221(router: RouterProcess, client: httpx.Client) -> None:
    preflight = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    answer = httpx.options(f"{router.url}/v1/models", headers=preflight, trust_env=False)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    body = {"model": "tiny", "prompt": "hello", "stream": True}
    streamed = client.post("/v1/completions", json=body, headers={"origin": PAGE})
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert streamed.headers["access-control-allow-origin"] == PAGE
    assert streamed.headers["x-request-id"]
    refused = httpx.get(f"{router.url}/v1/models", headers={"origin": PAGE}, trust_env=False)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE


def test_s14_s19_what_answers_tell_of_the_server(client: httpx.Client) -> None:
    for path in ("/v1/models", "/nowhere", "/v1/completions", "/docs", "/health"):
        answer = client.get(path)
        assert "server" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-request-id"]
    head = client.head("/health")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "\x1b[31mred", "x\u2028y", "\x00", "é" * 3000])
def test_s13_logs_stay_lines(router: RouterProcess, client: httpx.Client, text: str) -> None:
    before = len(router.log.splitlines())
    answer = client.post("/v1/completions", json={"model": text, "prompt": text, "user": text})
    assert answer.status_code == 404
    lines = router.log.split("\n")
    assert len(lines) - before <= 3
    for line in lines:
        assert not line or json.loads(line)
        assert line.isprintable()
        assert len(line) < 5000


def test_s6_a_body_without_end_189(router: RouterProcess, client: httpx.Client) -> None:
    process = psutil.Process(router.popen.pid)
    before = process.memory_info().rss

    def endless() -> Iterator[bytes]:
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(100):
            yield b"a" * 2**20

    try:
        answer = client.post(
            "/v1/completions", content=endless(), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
    except httpx.HTTPError:
        pass  # it hangs up before all is sent
    assert process.memory_info().rss - before < 120e6
    assert client.get("/v1/models").status_code == 200


def test_s6_large_heads(router: RouterProcess) -> None:
    port = int(router.url.rpartition(":")[2])
    for head in (
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head)
            assert b" 431 " in connection.recv(4096)


def test_s6_absurd_bodies_end_as_refusals(router: RouterProcess, client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    chat = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],'
    bodies: list[bytes] = [
        b"[" * 5_000_000,
        chat + b'"x":' + b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_001,
        chat + b'"tools":[' + b"{}," * 2_000_000 + b"{}]}",
        chat + b'"stop":[' + b'"a",' * 2_000_000 + b'"a"]}',
        chat.replace(b"hi", b"hi " * 7_000_000) + b'"n":1}',
        b'{"model":"tiny","messages":[' + b'{"role":"user","content":"a"},' * 20_000 + b"{}]}",
    ]
    for body in bodies:
        answer = client.post("/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code in (400, 413)
        error: dict[str, Any] = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
    assert not router.events("bug")
    assert client.get("/health").status_code == 200
