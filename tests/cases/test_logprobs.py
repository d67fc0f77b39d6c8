"""Cases of the kind logprobs: names, bytes, echo, streams."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.text.vocabulary import byte_alphabet
from tests.cases.asking import (
    CHAT,
    COMPLETIONS,
    DEMO,
    Scripted,
    body,
    both,
    bytes_play,
    content,
    events,
    joined,
)
from tests.router_parts import Play, chat, complete, text_play
from tests.serving import Server
from tests.text_models import CHATML, byte_level, write_folder

SMILE = bytes_play(b"\xf0\x9f", b"\x98", b"\x8a")
IS = "是"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model whose token 256 is one Chinese character."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    write_folder(
        folder, byte_level(), settings={"chat_template": CHATML}, config={"model_type": "llama"}
    )
    file = folder / "tokenizer.json"
    glyphs = "".join(byte_alphabet()[byte] for byte in IS.encode())
    # 'he' is the first merge of that vocabulary, and takes id 256
    text = file.read_text(encoding="utf-8").replace('"he": 256', f'"{glyphs}": 256')
    text = text.replace('"he":256', f'"{glyphs}":256')
    file.write_text(_without_merges(text), encoding="utf-8")
    return folder


def _without_merges(text: str) -> str:
    import json

    value = json.loads(text)
    value["model"]["merges"] = []
    return json.dumps(value, ensure_ascii=False)


def chat_entries(answer: Any) -> list[Any]:
    """Log-probability entries of one choice, streamed or whole."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        told = [event["choices"][0]["logprobs"] for event in events(answer)]
        return [entry for logprobs in told if logprobs for entry in logprobs["content"]]
    entries: list[Any] = body(answer)["choices"][0]["logprobs"]["content"]
    return entries


def streamed_columns(answer: Any) -> dict[str, list[Any]]:
    """The four lists of a streamed completion, joined."""
    told = [c["logprobs"] for event in events(answer) for c in event["choices"] if c["logprobs"]]
    return {name: [value for part in told for value in part[name]] for name in told[0]}


def finite_numbers(value: Any) -> None:
    """No number anywhere that JSON does not know."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            finite_numbers(item)
    assert not isinstance(value, float) or math.isfinite(value)


async def test_case_047_true_bytes(engine: Scripted) -> None:
    async with engine(SMILE) as router:
        for answer in await both(router.app, CHAT, logprobs=True):
            parts = [entry["bytes"] for entry in chat_entries(answer)]
            assert parts == [[0xF0], [0x9F], [0x98], [0x8A]]
            assert b"".join(map(bytes, parts)).decode() == "😊"


async def test_case_048_texts_not_glyphs(engine: Scripted, merged: Path) -> None:
    async with engine(Play([[256]], stop=False), folder=merged) as router:
        answer = await chat(router.app, logprobs=True, top_logprobs=5)
        (entry,) = chat_entries(answer)
        named = await complete(router.app, logprobs=5)
    assert content(answer) == IS
    assert (entry["token"], entry["bytes"]) == (IS, [230, 152, 175])
    assert (entry["top_logprobs"][0]["token"], entry["top_logprobs"][0]["bytes"]) == (
        IS,
        [230, 152, 175],
    )
    assert body(named)["choices"][0]["logprobs"]["tokens"] == [IS]
    assert IS in body(named)["choices"][0]["logprobs"]["top_logprobs"][0]


async def test_case_049_every_alternative_has_a_name(engine: Scripted) -> None:
    async with engine(Play([[269], [270], [271]])) as router:  # the rivals wrap to control tokens
        entries = chat_entries(await chat(router.app, logprobs=True, top_logprobs=5))
    rivals = [rival for entry in entries for rival in (entry, *entry["top_logprobs"])]
    assert len(rivals) == 3 * 6
    for rival in rivals:
        assert rival["token"]
        assert rival["bytes"] or rival["token"].startswith("<")  # hidden control tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_case_050_minus_infinity(engine: Scripted, stream: bool) -> None:
    async with engine(text_play("ab")) as router:
        router.engines.logprob = lambda token: -math.inf
        answer = await complete(
            router.app, "hi", echo=True, logprobs=1, top_k=1, temperature=1, stream=stream
        )
        told = await chat(router.app, logprobs=True, top_logprobs=1, stream=stream)
    assert b"Infinity" not in answer.body + told.body
    columns = streamed_columns(answer) if stream else body(answer)["choices"][0]["logprobs"]
    finite_numbers(columns)
    assert columns["token_logprobs"] == [None, -9999.0, -9999.0, -9999.0]
    assert [entry["logprob"] for entry in chat_entries(told)] == [-9999.0] * 2


async def test_case_051_alternatives_of_each_token(engine: Scripted) -> None:
    async with engine(text_play("abc", "def", "ghi")) as router:
        whole, streamed = await both(router.app, CHAT, logprobs=True, top_logprobs=3)
    entries = chat_entries(whole)
    assert chat_entries(streamed) == entries
    assert [entry["token"] for entry in entries] == list("abcdefghi")
    assert [entry["top_logprobs"][0]["token"] for entry in entries] == list("abcdefghi")


async def test_case_052_echo_covers_the_prompt(engine: Scripted) -> None:
    async with engine(text_play("!", stop=False)) as router:
        for answer in await both(
            router.app, COMPLETIONS, "The step of", echo=True, logprobs=1, max_tokens=1
        ):
            if answer.headers["content-type"].startswith("text"):
                columns = streamed_columns(answer)
            else:
                columns = body(answer)["choices"][0]["logprobs"]
                assert body(answer)["usage"]["prompt_tokens"] == 11
            assert {name: len(column) for name, column in columns.items()} == dict.fromkeys(
                ("tokens", "token_logprobs", "top_logprobs", "text_offset"), 12
            )
            assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
            assert None not in columns["token_logprobs"][1:]


async def test_case_054_the_prompt_alone(engine: Scripted) -> None:
    prompt = "Your answer: Yes"
    async with engine(text_play("x")) as router:
        whole, streamed = await both(
            router.app, COMPLETIONS, prompt, echo=True, max_tokens=0, logprobs=1
        )
    choice, usage = body(whole)["choices"][0], body(whole)["usage"]
    assert content(whole) == joined(streamed) == prompt
    assert (choice["finish_reason"], usage["completion_tokens"]) == ("length", 0)
    assert len(choice["logprobs"]["tokens"]) == usage["prompt_tokens"] == len(prompt)
    assert streamed_columns(streamed) == choice["logprobs"]


async def test_case_056_twenty_alternatives(engine: Scripted) -> None:
    async with engine(Play([[token] for token in (260, 271, 16, 100)])) as router:
        for answer in await both(router.app, CHAT, logprobs=True, top_logprobs=20):
            for entry in chat_entries(answer):
                values = [rival["logprob"] for rival in entry["top_logprobs"]]
                assert 0 < len(values) <= 20
                assert values == sorted(values, reverse=True)


async def test_case_058_tokens_are_strings(engine: Scripted) -> None:
    async with engine(SMILE) as router:
        logprobs = body(await complete(router.app, logprobs=1, max_tokens=5))["choices"][0][
            "logprobs"
        ]
    assert len(logprobs["tokens"]) == 4
    assert all(isinstance(token, str) and token for token in logprobs["tokens"])


async def test_case_059_streams_have_them_too(engine: Scripted) -> None:
    async with engine(text_play("ab", "c")) as router:
        whole, streamed = await both(router.app, COMPLETIONS, logprobs=1)
    columns = streamed_columns(streamed)
    assert columns == body(whole)["choices"][0]["logprobs"]
    assert len(columns["token_logprobs"]) == body(whole)["usage"]["completion_tokens"] - 1


@pytest.mark.slow
def test_case_050_a_real_engine_echoes_finite_numbers(real: Server) -> None:
    asked = {"model": DEMO, "prompt": "The sky is", "echo": True, "logprobs": 5, "top_k": 1}
    answer = httpx.post(real.url + COMPLETIONS, json={**asked, "max_tokens": 4}, timeout=60)
    assert answer.status_code == 200
    logprobs = answer.json()["choices"][0]["logprobs"]
    finite_numbers(logprobs)
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert len(logprobs["tokens"]) == answer.json()["usage"]["prompt_tokens"] + 4
