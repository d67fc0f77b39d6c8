"""Cases of the kind http: keys, request ids, methods, slashes."""

from __future__ import annotations

import asyncio
import hashlib
import inspect

import openai
import pytest

from router import config
from router.app import Access
from tests.cases.asking import CHAT, COMPLETIONS, Scripted, body, error, openai_client, user
from tests.router_parts import MODEL, call, chat, text_play

HELLO = text_play("Hello")
KEYS = (hashlib.sha256(b"the-key").digest(),)
PAGE = "https://chat.example"
OPEN_TO_PAGE = Access(KEYS, origins=(PAGE,))
ASKED = {"model": MODEL, "messages": [user("hi")]}


async def test_case_222_keys_as_bytes_in_constant_time(engine: Scripted) -> None:
    assert "hmac.compare_digest(" in inspect.getsource(config.key_matches)
    async with engine(HELLO, keys=KEYS) as router:
        for key in ("Bearer the-key", "bearer the-key"):
            answer = await call(router.app, "POST", CHAT, ASKED, headers={"authorization": key})
            assert answer.status == 200
        for key in ("Bearer th\xe9-key", "Bearer \xff\xfe", "Bearer the-key2", "the-key", ""):
            answer = await call(router.app, "POST", CHAT, ASKED, headers={"authorization": key})
            assert error(answer, 401)["code"] == "invalid_api_key"
        assert error(await call(router.app, "POST", CHAT, ASKED), 401)


async def test_case_225_two_requests_with_one_id(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        headers = {"x-request-id": "same"}
        first, second = await asyncio.gather(
            *(call(router.app, "POST", CHAT, ASKED, headers=headers) for _ in range(2))
        )
        assert body(first)["choices"] == body(second)["choices"]
        assert body(first)["id"] != body(second)["id"]


async def test_case_227_the_request_id_comes_back(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        headers = {"x-request-id": "abc"}
        for answer in (
            await call(router.app, "POST", CHAT, ASKED, headers=headers),
            await call(router.app, "POST", CHAT, {**ASKED, "stream": True}, headers=headers),
            await call(router.app, "POST", CHAT, {**ASKED, "n": 0}, headers=headers),
            await call(router.app, "GET", "/nowhere", headers=headers),
            await call(router.app, "GET", CHAT, headers=headers),
            await call(router.app, "GET", "/health", headers=headers),
        ):
            assert answer.headers["x-request-id"] == "abc"
        assert (await chat(router.app)).headers["x-request-id"]  # one of ours
        async with openai_client(router.app) as client:
            told = await client.chat.completions.create(
                model=MODEL, messages=[user("hi")], extra_headers={"X-Request-Id": "abc"}
            )
            assert told._request_id == "abc"
            with pytest.raises(openai.BadRequestError) as raised:
                await client.chat.completions.create(
                    model=MODEL, messages=[], extra_headers={"X-Request-Id": "abc"}
                )
            assert raised.value.request_id == "abc"


async def test_case_228_slashes_methods_and_head(engine: Scripted) -> None:
    async with engine(HELLO) as router:
        asked = {"model": MODEL, "prompt": "x"}
        assert (await call(router.app, "POST", COMPLETIONS + "/", asked)).status == 200
        wrong = await call(router.app, "GET", COMPLETIONS)
        error(wrong, 405)
        assert wrong.headers["allow"] == "POST"
        error(await call(router.app, "POST", "/v1/completion", asked), 404)
        assert (await call(router.app, "HEAD", "/health")).status == 200


async def test_case_220_a_preflight_needs_no_key(engine: Scripted) -> None:
    wish = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    async with engine(HELLO, access=OPEN_TO_PAGE) as router:
        answer = await call(router.app, "OPTIONS", CHAT, headers=wish)
        assert answer.status in (200, 204)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    async with engine(HELLO, keys=KEYS) as router:  # closed unless it was opened
        answer = await call(router.app, "OPTIONS", CHAT, headers=wish)
        assert "access-control-allow-origin" not in answer.headers


async def test_case_221_refusals_carry_the_headers_of_cors(engine: Scripted) -> None:
    async with engine(HELLO, access=OPEN_TO_PAGE) as router:
        for headers, status in (({}, 401), ({"authorization": "Bearer the-key"}, 200)):
            answer = await call(
                router.app, "POST", CHAT, ASKED, headers={"origin": PAGE, **headers}
            )
            assert answer.status == status
            assert answer.headers["access-control-allow-origin"] == PAGE
        refused = await call(router.app, "POST", CHAT, ASKED, headers={"origin": PAGE})
        assert error(refused, 401)["code"] == "invalid_api_key"
        stranger = await call(router.app, "POST", CHAT, ASKED, headers={"origin": "https://x.y"})
        assert "access-control-allow-origin" not in stranger.headers
