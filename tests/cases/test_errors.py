"""Cases of the kind errors: the one form of a failure."""

from __future__ import annotations

import logging

import pytest

from tests.cases.asking import CHAT, Scripted, assert_alive, error, post
from tests.router_parts import MODEL, Play, call, chat, complete, text_play

BROKEN = Play([], error="/secret/path.py: KeyError(7)")


async def test_case_112_an_object_of_four_keys(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        for answer in (
            await chat(router.app, temperature="x"),
            await complete(router.app, n=0),
            await chat(router.app, messages=[]),
            await complete(router.app, stream=True, top_p=7),
        ):
            assert error(answer)["code"] in ("invalid_value", None)
            assert error(answer)["type"] == "invalid_request_error"


async def test_case_113_routes_methods_and_engines_too(engine: Scripted) -> None:
    async with engine(BROKEN) as router:
        error(await call(router.app, "GET", "/nowhere"), 404)
        error(await call(router.app, "POST", "/v1/nowhere", {}), 404)
        wrong = await call(router.app, "GET", CHAT)
        error(wrong, 405)
        assert "POST" in wrong.headers["allow"]
        error(await chat(router.app), 500)


async def test_case_114_it_names_the_field(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        told = error(await chat(router.app, temperature=-1))
        assert told["param"] == "temperature"
        assert "temperature" in told["message"]
        assert "/" not in told["message"]


async def test_case_116_general_words_for_failed_engines(
    engine: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "router"):
        async with engine(BROKEN) as router:
            for stream in (False, True):
                answer = await chat(router.app, stream=stream)
                assert answer.headers["x-request-id"]
                assert b"secret" not in answer.body
                assert b"KeyError" not in answer.body
            told = error(await chat(router.app), 500)
            assert (told["type"], told["code"]) == ("server_error", "internal_error")
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    assert any("secret" in str(each.get("reason")) for each in fields)


async def test_case_118_an_unknown_model(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        for path, fields in (
            (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/embeddings", {"input": "x"}),
        ):
            told = error(await post(router.app, path, {**fields, "model": "nope"}), 404)
            assert (told["code"], told["param"]) == ("model_not_found", "model")
            assert told["type"] == "invalid_request_error"
            assert MODEL in told["message"]


async def test_case_120_embeddings_of_a_chat_model(engine: Scripted) -> None:
    async with engine(text_play("ok"), embedding_size=0) as router:
        told = error(await post(router.app, "/v1/embeddings", {"input": "x"}))
        assert told["code"] == "unsupported_operation"
        assert not router.engines.submits
        await assert_alive(router.app)
