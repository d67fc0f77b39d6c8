"""Cases of the kind embed: /v1/embeddings, and reranking that is not served."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import pytest

from tests.cases.asking import (
    MAX_LEN,
    TINY,
    Scripted,
    assert_alive,
    body,
    error,
    openai_client,
    post,
)
from tests.router_parts import EMBEDDING_SIZE, MODEL, text_play
from tests.serving import Server

EMBEDDINGS = "/v1/embeddings"
OK = text_play("ok")


async def test_case_162_empty_texts(engine: Scripted) -> None:
    async with engine(OK) as router:
        for given in ("", [""], [], ["a", ""], [[]], None):
            assert error(await post(router.app, EMBEDDINGS, {"input": given}))["param"] == "input"
        assert not router.engines.submits
        await assert_alive(router.app)


async def test_case_163_token_ids(engine: Scripted) -> None:
    async with engine(OK) as router:
        one = body(await post(router.app, EMBEDDINGS, {"input": [153, 191]}))
        assert [entry["index"] for entry in one["data"]] == [0]
        assert one["usage"]["prompt_tokens"] == 2
        two = body(await post(router.app, EMBEDDINGS, {"input": [[1, 2], [3]]}))
        assert [entry["index"] for entry in two["data"]] == [0, 1]
        assert two["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_case_164_base64(engine: Scripted) -> None:
    async with engine(OK) as router:
        texts = ["one", "two"]
        floats = body(await post(router.app, EMBEDDINGS, {"input": texts}))["data"]
        fields = {"input": texts, "encoding_format": "base64"}
        coded = body(await post(router.app, EMBEDDINGS, fields))["data"]
        for plain, packed in zip(floats, coded, strict=True):
            data = base64.b64decode(packed["embedding"], validate=True)
            assert len(data) == 4 * EMBEDDING_SIZE
            values = list(struct.unpack(f"<{EMBEDDING_SIZE}f", data))
            assert values == pytest.approx(plain["embedding"], abs=1e-7)
        async with openai_client(router.app) as client:  # asks for base64 by itself
            told = await client.embeddings.create(model=MODEL, input=texts)
            assert [entry.embedding for entry in told.data] == [
                pytest.approx(entry["embedding"], abs=1e-7) for entry in floats
            ]


async def test_case_165_an_unknown_encoding(engine: Scripted) -> None:
    async with engine(OK) as router:
        told = error(await post(router.app, EMBEDDINGS, {"input": "x", "encoding_format": "md5"}))
    assert told["param"] == "encoding_format"
    assert "float" in told["message"]
    assert "base64" in told["message"]
    assert "md5" not in told["message"]


async def test_case_166_a_long_text(engine: Scripted) -> None:
    async with engine(OK) as router:
        text = "x" * (MAX_LEN + 1)
        told = error(await post(router.app, EMBEDDINGS, {"input": ["a", text]}))
        assert (told["param"], told["code"]) == ("input", "context_length_exceeded")
        assert not router.engines.submits
        cut = {"input": text, "truncate_prompt_tokens": -1}
        assert body(await post(router.app, EMBEDDINGS, cut))["usage"]["prompt_tokens"] == MAX_LEN


@pytest.mark.slow
def test_case_166_late_words_count(real: Server) -> None:
    texts = ["word " * 200 + end for end in ("cat", "dog")]
    asked = {"model": TINY, "input": texts}
    answer: Any = httpx.post(real.url + EMBEDDINGS, json=asked, timeout=60).json()
    first, second = (entry["embedding"] for entry in answer["data"])
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    assert first != second


async def test_case_169_reranking_is_not_served(engine: Scripted) -> None:
    """A clear 404: there is no model for it here, and no list of zeros either."""
    async with engine(OK) as router:
        fields = {"query": "q", "documents": [str(i) for i in range(10)], "top_n": 1}
        for path in ("/v1/rerank", "/rerank", "/v2/rerank", "/v1/score"):
            told = error(await post(router.app, path, fields), 404)
            assert told["code"] == "not_found"
        assert not router.engines.submits
