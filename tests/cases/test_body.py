"""Cases of the kind body: what is no JSON, and what is too much of it."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator

import httpx
import psutil
import pytest

from router.api.http import MAX_BODY_BYTES
from tests.cases.asking import (
    CHAT,
    COMPLETIONS,
    KEY,
    Scripted,
    assert_alive,
    error,
    error_object,
    user,
)
from tests.router_parts import MODEL, call, text_play
from tests.serving import Server

OK = text_play("ok")
GOOD = json.dumps({"model": MODEL, "messages": [user("hi")]}).encode()


async def test_case_183_a_form_instead_of_json(engine: Scripted) -> None:
    async with engine(OK) as router:
        for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
            answer = await call(router.app, "POST", CHAT, raw=GOOD, headers={"content-type": kind})
            assert error(answer, 415)["code"] == "unsupported_media_type"
        for kind in ("application/json; charset=utf-8", "Application/JSON"):
            answer = await call(router.app, "POST", CHAT, raw=GOOD, headers={"content-type": kind})
            assert answer.status == 200


async def test_case_184_half_a_document(engine: Scripted) -> None:
    async with engine(OK) as router:
        for raw in (b'{"model": "m",', b"", b"{", GOOD[:-1], GOOD + b"}"):
            told = error(await call(router.app, "POST", CHAT, raw=raw))
            assert told["code"] == "invalid_json"
        await assert_alive(router.app)


@pytest.mark.parametrize("raw", [b"[]", b"null", b"123", b'"x"', b"true", b"[{}]"])
async def test_case_185_json_that_is_no_object(engine: Scripted, raw: bytes) -> None:
    async with engine(OK) as router:
        for path in (CHAT, COMPLETIONS, "/v1/embeddings", "/tokenize", "/detokenize"):
            error(await call(router.app, "POST", path, raw=raw))


async def test_case_186_a_compressed_body(engine: Scripted) -> None:
    async with engine(OK) as router:
        packed = gzip.compress(GOOD)
        answer = await call(
            router.app, "POST", CHAT, raw=packed, headers={"content-encoding": "gzip"}
        )
        error(answer, 415)
        assert answer.body.isascii()
        bare = await call(router.app, "POST", CHAT, raw=packed)  # not even announced
        assert error(bare)["code"] == "invalid_json"
        assert bare.body.isascii()


async def test_case_187_half_a_surrogate_pair(engine: Scripted) -> None:
    async with engine(OK) as router:
        for half in (r"\ud83d", r"\ude0a\ud83d", r"a\udfffb"):
            raw = GOOD.replace(b'"hi"', f'"{half}"'.encode())
            assert error(await call(router.app, "POST", CHAT, raw=raw))["code"] == "invalid_json"
        broken = GOOD.replace(b"hi", b"\xff\xfe")
        assert error(await call(router.app, "POST", CHAT, raw=broken))["code"] == "invalid_json"
        await assert_alive(router.app)


@pytest.mark.slow
def test_case_189_a_body_without_end(process: Server) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 2**20

    memory = psutil.Process(process.process.pid).memory_info
    before = memory().rss
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        answer = httpx.post(process.url + CHAT, content=endless(), headers=headers, timeout=60)
        assert answer.status_code == 413
        assert error_object(answer.content)["code"] == "request_too_large"
    assert memory().rss - before < 2 * MAX_BODY_BYTES + 16 * 2**20
    alive = httpx.post(
        process.url + CHAT, content=GOOD, headers={**headers, "content-length": str(len(GOOD))}
    )
    assert alive.status_code == 200
