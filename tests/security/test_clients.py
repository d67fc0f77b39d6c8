"""What clients may make this server do, say and repeat: nothing but answer them."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from router.api.http import MAX_BODY_BYTES
from router.app import Access
from router.config import Options, key_digests, key_matches, resolve
from tests.router_parts import MODEL, Answer, Play, Router, call, router_parts, text_play
from tests.router_process import ROOT, RouterProcess, is_running
from tests.security.conftest import KEYED
from tests.serving import wait_for

CHAT = "/v1/chat/completions"


def plays(prompt: str) -> Play:
    return (
        Play([], error="CUDA error at /secret/engine.py:7, peer 10.0.0.7")
        if "bug" in prompt
        else text_play("x")
    )


@pytest.fixture
async def parts(tmp_path: Path) -> Any:
    async with router_parts(tmp_path, plays) as router:
        yield router


# -- who may start what


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("keys", [(), key_digests("k")])
@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("", True),
        ("10.1.2.3", True),
        ("127.0.0.1.evil.example", True),
        ("server.example", True),
    ],
)
def test_s3_start_matrix(host: str, public: bool, keys: tuple[bytes, ...], insecure: bool) -> None:
    options = Options(host=host, insecure_no_auth=insecure)
    if public and not keys and not insecure:
        with pytest.raises(ValueError, match=r"--api-key-file.*--insecure-no-auth"):
            resolve(options, api_keys=keys)
    else:
        assert resolve(options, api_keys=keys).http.host == host


def test_s3_the_default_is_this_machine_alone() -> None:
    assert resolve(Options()).http.host == "127.0.0.1"


def test_s5_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def note(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    digests = key_digests("a\nb\nc")
    monkeypatch.setattr("hmac.compare_digest", note)
    for key, known in ((b"a", True), (b"c", True), (b"d", False)):
        compared.clear()
        assert key_matches(key, digests) is known
        assert tuple(compared) == digests


def test_s5_keys_are_not_kept() -> None:
    config = resolve(Options(), api_keys=key_digests("sk-secret"))
    assert "sk-secret" not in repr(config)


# -- nothing is fetched


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """(address, who called): a listener that nobody should ever call."""
    calls: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, args=(listener, calls), daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", calls
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def accept(listener: socket.socket, calls: list[str]) -> None:
    while True:
        try:
            connection, address = listener.accept()
        except OSError:
            return
        calls.append(str(address))
        connection.close()


def test_s12_nothing_is_fetched_for_a_client(
    client: httpx.Client, canary: tuple[str, list[str]]
) -> None:
    address, calls = canary
    for url in (
        f"http://{address}/x",
        f"https://{address}/x",
        f"ftp://{address}/",
        f"//{address}/",
    ):
        for path, body in fetching(url):
            answer = client.post(path, json=body)
            assert answer.status_code < 500, (path, body)
            # an answer is one that ignored the field, as OpenAI's clients send many
            assert answer.status_code in (200, 400, 404), (path, body)
    assert calls == []
    host, port = address.split(":")
    socket.create_connection((host, int(port))).close()  # the canary does hear who calls
    wait_for(lambda: len(calls) == 1)


def fetching(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests that name an address wherever some API lets one be named."""
    text = {"role": "user", "content": "hi"}
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_data": url, "file_id": url}},
    ):
        yield CHAT, {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
    for fields in (
        {"response_format": schema(url)},
        {"guided_json": {"$ref": url}},
        {"tools": [{"type": "mcp", "server_url": url}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": url}}}]},
        {"web_search_options": {"url": url}},
        {"documents": [{"url": url}]},
        {"metadata": {"url": url}},
        {"webhook": url, "callback_url": url},
        {"kv_transfer_params": {"remote_host": url}},
        {"bootstrap_host": url.split("//")[1].split(":")[0]},
        {"chat_template": "{% include '" + url + "' %}"},
        {"lora_path": url},
    ):
        yield CHAT, {"model": "tiny", "messages": [text], "max_tokens": 2, **fields}
    yield CHAT, {"model": url, "messages": [text]}
    yield "/v1/embeddings", {"model": "tiny", "input": [{"image": url}]}
    image = {"type": "input_image", "image_url": url}
    yield "/v1/responses", {"model": "tiny", "input": [{"role": "user", "content": [image]}]}
    yield "/v1/responses", {"model": "tiny", "input": "x", "prompt": {"id": url}}
    yield (
        "/v1/responses",
        {"model": "tiny", "input": "x", "tools": [{"type": "mcp", "server_url": url}]},
    )
    source = {"type": "image", "source": {"type": "url", "url": url}}
    message = {"role": "user", "content": [source]}
    yield "/v1/messages", {"model": "tiny", "max_tokens": 2, "messages": [message]}


def schema(url: str) -> dict[str, Any]:
    inner = {"$schema": url, "$id": url, "type": "object", "properties": {"a": {"$ref": url}}}
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": inner, "strict": True}}


# -- fields that would change the server's own ways


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ ''.__class__ }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": {"return_dict": True}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"self": 1}},
        {"chat_template_kwargs": {"__class__": 1}},
        {"logits_processors": ["os.system"]},
        {"documents": [{"a": 1}]},
        {"prompt_embeds": "gASV"},
        {"mm_processor_kwargs": {"a": 1}},
        {"media_io_kwargs": {"a": 1}},
        {"vllm_xargs": {"a": 1}},
        {"custom_params": {"a": 1}},
        {"custom_logit_processor": "gASV"},
    ],
)
async def test_s7_dangerous_fields_do_nothing(parts: Router, fields: dict[str, Any]) -> None:
    """They are refused, or unknown and ignored: the engine gets the same as without them."""
    plain = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "seed": 1}
    assert (await call(parts.app, "POST", CHAT, plain)).status == 200
    answer = await call(parts.app, "POST", CHAT, {**plain, **fields})
    first, *others = parts.engines.submits
    if answer.status == 200:
        (other,) = others
        assert (other.tokens, other.sampling) == (first.tokens, first.sampling)
    else:
        assert answer.status == 400
        assert others == []


# -- headers and answers


@pytest.mark.parametrize(
    "given",
    [
        "a b",
        "a\tb",
        "x" * 65,
        "é",
        "<b>",
        "a;b",
        "a\x1b[31m",
        "../x",
        "%0d%0aset-cookie:x",
        "a\x00b",
        "",
    ],
)
async def test_s14_only_plain_ids_are_repeated(parts: Router, given: str) -> None:
    for path in (CHAT, "/health", "/nowhere"):
        answer = await call(parts.app, "POST", path, headers={"x-request-id": given})
        told = answer.headers["x-request-id"]
        assert told != given
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", told)
        assert not given or given not in json.dumps(answer.headers)


async def test_s14_a_plain_id_is_repeated(parts: Router) -> None:
    for given in ("a", "x" * 64, "A.b_c-9"):
        answer = await call(parts.app, "GET", "/health", headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given


def test_s14_a_header_cannot_be_broken_up(router: RouterProcess) -> None:
    """Over a real connection, byte for byte: what is no header is no request."""
    url = urlsplit(router.url)
    for given in (b"a\nset-cookie: x=1", b"a\rset-cookie: x=1", b"a\x00b", b"\xff\xfe"):
        with socket.create_connection(
            (url.hostname or "", url.port or 0), timeout=30
        ) as connection:
            head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: " + given
            connection.sendall(head + b"\r\nConnection: close\r\n\r\n")
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert b"set-cookie" not in answer.lower()
        assert given not in answer


INSIDE = re.compile(
    rb"Traceback|\.py\b|0x[0-9a-f]{6}|\bline \d+, in|/secret|/tmp|/home|/usr|/root|10\.0\.0\.7"
    rb"|127\.0\.0\.1|ipc://|\bmsgspec|starlette|uvicorn|zmq|llguidance|jinja|torch|CUDA"
    rb"|\b(router|engine)\.[a-z]|[A-Z][a-z]+(Error|Exception)\b|site-packages"
)


def bad_requests() -> Iterator[tuple[str, str, dict[str, Any] | bytes]]:
    """(method, path, body) of requests that fail in every way that a client can bring about."""
    text = {"role": "user", "content": "hi"}
    chat = {"model": MODEL, "messages": [text]}
    for fields in (
        {"model": "/etc/passwd"},
        {"messages": "x"},
        {"messages": [{"role": 1}]},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [{"role": "user", "content": "bug"}]},
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        {"temperature": "NaN"},
        {"n": -1},
        {"stop": [[1]]},
        {"logit_bias": {"x": 1}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 1}}}]},
        {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
        {"guided_regex": "(((("},
        {"guided_regex": "a{1,99999}"},
        {"guided_grammar": "root ::= ("},
        {"guided_grammar": "start: %import common.X"},
        {"guided_json": {"$ref": "#/nowhere"}},
        {"guided_json": {"type": "string", "pattern": "(?=x)"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        {"stream_options": {"include_usage": "maybe"}},
    ):
        yield "POST", CHAT, {**chat, **fields}
        yield "POST", CHAT, {**chat, "stream": True, **fields}
    for path in (
        CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/tokenize",
        "/detokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens",
        "/v1/engines/x/embeddings",
    ):  # fmt: skip
        for body in (b"", b"{", b"[]", b"\xff", b'{"model": 1}', b'"' + b"\\" * 9, b"[" * 3000):
            yield "POST", path, body
        yield "POST", path, {"model": MODEL, "prompt": ["bug", []], "input": 1, "tokens": [-1]}
        yield "GET", path, b""
        yield "POST", path, b" " * (MAX_BODY_BYTES + 1)
    yield "GET", "/v1/models/..%2f..%2fetc%2fpasswd", b""
    yield "GET", "/../../etc/passwd", b""


async def test_s19_answers_say_nothing_of_the_inside(
    parts: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(method: str, path: str, body: Any) -> Answer:
        if isinstance(body, bytes):
            return await call(parts.app, method, path, raw=body)
        return await call(parts.app, method, path, body)

    for method, path, body in bad_requests():
        answer = await ask(method, path, body)
        assert answer.status in (400, 404, 405, 413, 500) or b"error" in answer.body, (path, body)
        assert not INSIDE.search(answer.body), (path, answer.body)
        assert str(ROOT).encode() not in answer.body
    # and a bug of ours
    monkeypatch.setattr(parts.flow, "check_room", lambda *_, **__: [][1])
    good = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    answer = await ask("POST", CHAT, good)
    assert answer.status == 500
    assert not INSIDE.search(answer.body)


# -- inside


def test_s2_another_user_cannot_connect(router: RouterProcess) -> None:
    """By the rights of each folder on the way; the socket's own do not count on every system."""
    (path,) = (path for path in router.runtime.rglob("*") if path.is_socket())
    assert path.parent.stat().st_mode & 0o077 == 0
    assert re.fullmatch(r"router-[0-9a-f]{10}", path.parent.name)


def test_s22_engines_know_nothing_of_keys(router: RouterProcess, client: httpx.Client) -> None:
    pid = router.engine_pid(0)
    assert is_running(pid)
    environ = Path(f"/proc/{pid}/environ").read_text()
    names = {entry.split("=")[0] for entry in environ.split("\0") if entry}
    assert not [name for name in names if re.search(r"KEY|TOKEN|SECRET|PASS|PROXY", name, re.I)]
    assert client.get("/v1/models", headers=KEYED).status_code == 200


async def test_s17_a_clients_own_salt_only_narrows(tmp_path: Path) -> None:
    """Two keys with the same cache_salt still share nothing."""
    async with router_parts(tmp_path, plays, access=Access(key_digests("one\ntwo"))) as parts:
        body = {"model": MODEL, "prompt": "hi"}
        for key, salt in (("one", None), ("one", "s"), ("two", "s"), ("two", None)):
            headers = {"x-api-key": key}
            fields = {} if salt is None else {"cache_salt": salt}
            answer = await call(
                parts.app, "POST", "/v1/completions", {**body, **fields}, headers=headers
            )
            assert answer.status == 200
        salts = [submit.salt for submit in parts.engines.submits]
        assert len(set(salts)) == 4
        assert all(salts)
