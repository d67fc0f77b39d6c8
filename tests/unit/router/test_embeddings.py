"""POST /v1/embeddings in one process: real routes, flows and text over scripted engines.

Numbers in test names are cases of the project's API corpus.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.protocol import Pooling, unpack_floats
from router.api.embeddings import SLICE_VALUES, LengthRule
from router.embed_flow import TEXT_TOKENS, WINDOW_TOKENS
from router.errors import ContextLengthExceeded, StartError
from router.text.pooling import PoolingRule, load_pooling
from router.waiting import FlowSettings
from tests.router_parts import (
    EMBEDDING_SIZE,
    MAX_LEN,
    MODEL,
    Answer,
    Play,
    Router,
    call,
    chat,
    complete,
    router_parts,
    text_play,
)
from tests.router_process import until
from tools.fake_batch import fake_embedding
from tools.tiny_model import VOCAB_SIZE, encode_text, write_tiny_model


def plays(prompt: str) -> Play:
    """Scenes by the beginning of the text."""
    scenes = {
        "broken": Play([], error="/secret/path.py"),
        "hangs": Play([], waits=True),
        "dies once": Play([], dies_at=0),
        "dies twice": Play([], dies_at=0, deaths=2),
    }
    return next((play for word, play in scenes.items() if prompt.startswith(word)), text_play("ok"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


@pytest_asyncio.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays) as parts:
        yield parts


async def embed(router: Router, input: Any, path: str = "/v1/embeddings", **fields: Any) -> Answer:
    body = {"model": MODEL, "input": input, **fields}
    return await call(router.app, "POST", path, {k: v for k, v in body.items() if v is not ...})


def vectors(answer: Answer) -> list[Any]:
    assert answer.status == 200, answer.body
    value = answer.json()
    assert value["object"] == "list"
    assert [entry["index"] for entry in value["data"]] == list(range(len(value["data"])))
    assert {entry["object"] for entry in value["data"]} == {"embedding"}
    return [entry["embedding"] for entry in value["data"]]


def expected(text: str | list[int], **pooling: Any) -> list[float]:
    tokens = encode_text(text) if isinstance(text, str) else text
    return unpack_floats(fake_embedding(tokens, Pooling(**pooling), EMBEDDING_SIZE))


def refusal(answer: Answer, code: str | None = "invalid_value") -> tuple[str, str]:
    """(param, message) of a 400."""
    error = answer.json()["error"]
    assert (answer.status, error["type"]) == (400, "invalid_request_error"), error
    assert error["code"] == code, error
    return error["param"], error["message"]


# -- the answer


async def test_one_text(router: Router) -> None:
    answer = await embed(router, "hello")
    assert vectors(answer) == [expected("hello")]
    value = answer.json()
    assert value["model"] == MODEL
    assert value["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert int(answer.headers["content-length"]) == len(answer.body)


async def test_several_texts_in_order(router: Router) -> None:
    texts = ["b", "aa", "cc c", "b"]
    answer = await embed(router, texts)
    assert vectors(answer) == [expected(text) for text in texts]
    assert answer.json()["usage"]["prompt_tokens"] == 8


async def test_163_token_ids_are_used_as_given(router: Router) -> None:
    assert vectors(await embed(router, [20, 30, 40])) == [expected([20, 30, 40])]
    two = await embed(router, [[20, 30], [271]])
    assert vectors(two) == [expected([20, 30]), expected([271])]
    assert two.json()["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_164_base64_is_the_float_answer(router: Router) -> None:
    floats = vectors(await embed(router, ["one", "two"], encoding_format="float"))
    coded = vectors(await embed(router, ["one", "two"], encoding_format="base64"))
    assert [len(base64.b64decode(text)) for text in coded] == [4 * EMBEDDING_SIZE] * 2
    assert [unpack_floats(base64.b64decode(text)) for text in coded] == floats


async def test_dimensions_and_normalize_go_to_the_engine(router: Router) -> None:
    (vector,) = vectors(await embed(router, "hello", dimensions=3, normalize=False))
    assert vector == expected("hello", dimensions=3, normalize=False)
    assert router.engines.submits[-1].pooling == Pooling("mean", 3, False)


async def test_the_models_own_pooling(folder: Path) -> None:
    async with router_parts(folder, plays, pooling=PoolingRule("cls")) as router:
        assert vectors(await embed(router, "hello")) == [expected("hello", kind="cls")]


async def test_the_old_path_names_the_model(router: Router) -> None:
    answer = await embed(router, "hello", "/v1/engines/a/b/embeddings", model=...)
    assert vectors(answer) == [expected("hello")]
    assert answer.json()["model"] == "a/b"


async def test_a_long_answer_comes_in_parts(router: Router) -> None:
    texts = [f"text {i}" for i in range(2048)]
    floats = await embed(router, texts, user="me", unknown={"a": 1})
    assert vectors(floats) == [expected(text) for text in texts]
    coded = await embed(router, texts, encoding_format="base64")
    assert len(vectors(coded)) == 2048
    few = min(SLICE_VALUES // EMBEDDING_SIZE, 2048)
    assert len(coded.parts) >= 2048 // few


# -- what is refused


@pytest.mark.parametrize(
    "input",
    ["", [""], ["a", ""], [], [[]], [[20], []], ..., None, 5, {"a": 1}, True, ["a", 5], [["a"]],
     [5, "a"], ["a", [5]], [[5], 5], [1.5], [[1.5]], [None], [[[5]]], ["a", None], [-1], [[20, -1]],
     [VOCAB_SIZE], [[VOCAB_SIZE]], [10**30], ["a"] * 2049],
    ids=str,
)  # fmt: skip
async def test_162_inputs_that_are_none(router: Router, input: Any) -> None:
    param, message = refusal(await embed(router, input))
    assert param == "input"
    assert len(message) < 200
    assert not router.engines.submits


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dimensions", 0), ("dimensions", EMBEDDING_SIZE + 1), ("dimensions", -1),
        ("dimensions", "3"), ("dimensions", True), ("normalize", "yes"), ("encoding_format", 1),
        ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", MAX_LEN + 1), ("truncation_side", "middle"), ("model", ...),
        ("model", None), ("model", 5), ("messages", [{"role": "user", "content": "hi"}]),
        ("add_special_tokens", False), ("embed_dtype", "float16"), ("endianness", "big"),
    ],
)  # fmt: skip
async def test_fields_that_are_refused(router: Router, field: str, value: Any) -> None:
    param, _ = refusal(await embed(router, "hi", **{field: value}))
    assert param == field


@pytest.mark.parametrize("raw", [b'{"model":"tiny","input":["\\ud800"]}', b'{"input":"\xff"}'])
async def test_bad_json(router: Router, raw: bytes) -> None:
    raw = raw.replace(b'{"input"', b'{"model":"tiny","input"')
    answer = await call(router.app, "POST", "/v1/embeddings", raw=raw)
    assert answer.status == 400


async def test_165_an_unknown_encoding_format(router: Router) -> None:
    param, message = refusal(await embed(router, "hi", encoding_format="md5"))
    assert param == "encoding_format"
    assert "float" in message
    assert "base64" in message


async def test_null_means_absent(router: Router) -> None:
    names = ("encoding_format", "dimensions", "normalize", "truncate_prompt_tokens", "user")
    assert vectors(await embed(router, "hi", **dict.fromkeys(names))) == [expected("hi")]


async def test_an_unknown_model(router: Router) -> None:
    answer = await embed(router, "hi", model="nobody")
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")


# -- long texts


async def test_166_a_text_that_is_too_long_is_refused(router: Router) -> None:
    answer = await embed(router, ["fits", "x" * (MAX_LEN + 1), "y"])
    param, message = refusal(answer, "context_length_exceeded")
    assert param == "input"
    assert all(part in message for part in ("input[1]", str(MAX_LEN), str(MAX_LEN + 1)))
    assert not router.engines.submits
    late = vectors(await embed(router, ["x" * (MAX_LEN - 1) + end for end in "ab"]))
    assert late == [expected("x" * (MAX_LEN - 1) + end) for end in "ab"]


async def test_truncation_only_when_asked_for(router: Router) -> None:
    text = "".join(map(chr, range(33, 120))) * 10
    for wanted, count in ((-1, MAX_LEN), (7, 7)):
        answer = await embed(router, [text, "short"], truncate_prompt_tokens=wanted)
        assert vectors(answer) == [expected(text[:count]), expected("short")]
    left = await embed(router, text, truncate_prompt_tokens=7, truncation_side="left")
    assert vectors(left) == [expected(text[-7:])]
    ids = await embed(router, [20, 21, 22, 23], truncate_prompt_tokens=2)
    assert vectors(ids) == [expected([20, 21])]


def test_truncation_keeps_what_frames_a_text() -> None:
    ids = [101, 1, 2, 3, 4, 102]
    assert LengthRule(6).apply(ids, "", framed=True) == ids
    right = LengthRule(6, 4, "right", (1, 1))
    assert right.apply(ids, "", framed=True) == [101, 1, 2, 102]
    assert right.apply(ids, "", framed=False) == [101, 1, 2, 3]
    left = LengthRule(6, 3, "left", (1, 1))
    assert left.apply(ids, "", framed=True) == [101, 4, 102]
    assert left.apply(ids, "", framed=False) == [3, 4, 102]
    with pytest.raises(ContextLengthExceeded):
        LengthRule(5).apply(ids, "input[0]", framed=True)


async def test_the_models_own_longest_text(folder: Path) -> None:
    async with router_parts(folder, plays, pooling=PoolingRule("mean", 16)) as router:
        assert (await embed(router, "x" * 16)).status == 200
        refusal(await embed(router, "x" * 17), "context_length_exceeded")
        assert (await complete(router.app, "x" * 17)).status == 200


# -- models of different kinds


async def test_120_an_encoder_does_not_chat(folder: Path) -> None:
    async with router_parts(folder, plays, generates=False) as router:
        for answer in (await chat(router.app), await complete(router.app)):
            param, message = refusal(answer, "unsupported_operation")
            assert param == "model"
            assert "/v1/embeddings" in message
        assert vectors(await embed(router, "hello")) == [expected("hello")]
        entry = (await call(router.app, "GET", f"/v1/models/{MODEL}")).json()
        assert entry["capabilities"] == {
            "chat_completions": False, "completions": False, "embeddings": True
        }  # fmt: skip
        assert entry["embeddings"] == {
            "dimensions": EMBEDDING_SIZE, "max_tokens": MAX_LEN, "pooling": "mean"
        }  # fmt: skip


async def test_120_a_model_without_embeddings(folder: Path) -> None:
    async with router_parts(folder, plays, embedding_size=0) as router:
        assert refusal(await embed(router, "hi"), "unsupported_operation")[0] == "model"
        assert (await chat(router.app)).status == 200
        entry = (await call(router.app, "GET", f"/v1/models/{MODEL}")).json()
        assert entry["capabilities"]["embeddings"] is False
        assert "embeddings" not in entry


async def test_a_chat_model_can_do_all(router: Router) -> None:
    (first, _) = (await call(router.app, "GET", "/v1/models")).json()["data"]
    assert set(first["capabilities"].values()) == {True}


async def test_nothing_was_ready_yet(folder: Path) -> None:
    async with router_parts(folder, plays, started=False) as router:
        answer = await embed(router, "hi")
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        entry = (await call(router.app, "GET", f"/v1/models/{MODEL}")).json()
        assert entry["capabilities"]["embeddings"] is False


# -- engines, clients, load


async def test_all_replicas_work_within_the_window(folder: Path) -> None:
    texts = ["x" * 200 + str(i) for i in range(200)]
    async with router_parts(folder, plays, replicas=2) as router:
        assert vectors(await embed(router, texts)) == [expected(text) for text in texts]
        given = [replica.submitted for replica in router.fleet.replicas]
        assert min(given) >= 60, given
        assert 2 * WINDOW_TOKENS < 200 * 200  # else the next line says nothing
        assert router.engines.most_running <= 2 * WINDOW_TOKENS


async def test_one_long_text_is_enough_to_fill_the_window(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.embed_flow.WINDOW_TOKENS", TEXT_TOKENS + 2)
    texts = ["x" * 100, "ab", "y" * 100]
    assert vectors(await embed(router, texts)) == [expected(text) for text in texts]
    assert router.engines.most_running == 100


async def test_an_engine_that_dies_costs_nothing(folder: Path) -> None:
    texts = ["first", "dies once", *("x" * i for i in range(1, 50))]
    async with router_parts(folder, plays, replicas=2) as router:
        assert vectors(await embed(router, texts)) == [expected(text) for text in texts]
        assert b'router_requests_migrated_total{reason="engine_died"}' in router.metrics.render()


async def test_two_deaths_are_enough(folder: Path) -> None:
    async with router_parts(folder, plays, replicas=2) as router:
        answer = await embed(router, ["first", "dies twice", "last"])
        assert answer.status == 500
        assert answer.json()["error"]["code"] == "request_quarantined"


async def test_waits_for_the_restart(folder: Path) -> None:
    async with router_parts(folder, plays) as router:
        assert vectors(await embed(router, "dies once")) == [expected("dies once")]


async def test_engines_that_are_given_up(folder: Path) -> None:
    async with router_parts(folder, plays) as router:
        router.engines.restarts = False
        task = asyncio.create_task(embed(router, ["dies once", "more"]))
        await asyncio.sleep(0.05)
        assert not task.done()
        router.fleet.park(0, "the test says so")
        assert (await task).status == 503


async def test_an_engines_error_is_a_500_without_details(router: Router) -> None:
    answer = await embed(router, ["fine", "broken"])
    assert answer.status == 500
    assert b"secret" not in answer.body


@pytest.mark.parametrize("values", [b"", b"\0" * 4, b"\0\0\xc0\x7f" * EMBEDDING_SIZE])
async def test_a_vector_that_is_none_is_a_500(
    router: Router, monkeypatch: pytest.MonkeyPatch, values: bytes
) -> None:
    monkeypatch.setattr("tests.router_parts.fake_embedding", lambda *_: values)
    assert (await embed(router, "hi")).status == 500
    monkeypatch.undo()
    assert vectors(await embed(router, "hi")) == [expected("hi")]


async def test_a_client_that_leaves_frees_its_texts(router: Router) -> None:
    body = {"model": MODEL, "input": ["hangs", "hangs too", "fine"]}
    await call(router.app, "POST", "/v1/embeddings", body, leave_after=0)
    hanging = {submit.id for submit in router.engines.submits[:2]}
    assert set(router.engines.aborted) == hanging
    assert not router.engines.running
    assert router.admission.active == 0


async def test_a_client_that_leaves_while_its_answer_is_sent(router: Router) -> None:
    body = {"model": MODEL, "input": ["x"] * 2048, "encoding_format": "base64"}
    answer = await call(router.app, "POST", "/v1/embeddings", body, leave_after=1)
    assert router.admission.active == 0
    assert answer.status == 200


async def test_the_time_limit(folder: Path) -> None:
    settings = FlowSettings(request_timeout_s=0.1)
    async with router_parts(folder, plays, settings=settings) as router:
        answer = await embed(router, ["fine", "hangs"])
        assert (answer.status, answer.json()["error"]["code"]) == (504, "request_timeout")


async def test_the_end_of_the_server_cuts_it(router: Router) -> None:
    task = asyncio.create_task(embed(router, ["fine", "hangs"]))
    await until(lambda: len(router.table) > 0)
    for stream in list(router.table):
        router.fleet.cut(stream, "The server is stopping.", "abort")
    assert (await task).status == 503


async def test_chats_have_their_own_permits(folder: Path) -> None:
    settings = FlowSettings(max_concurrency=4)
    async with router_parts(folder, plays, settings=settings, max_queue=1) as router:
        hanging = [asyncio.create_task(embed(router, "hangs")) for _ in range(2)]
        await until(lambda: router.admission.views()[0].waiting == 1)
        (view,) = router.admission.views()
        assert (view.used, view.waiting, view.permits) == (1, 1, 5)
        refused = await embed(router, "hi")
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert (await chat(router.app)).status == 200
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)


async def test_counts_and_the_log_line(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "router"):
        await embed(router, ["abc", "de"])
    (line,) = [record.fields for record in caplog.records if record.message == "request"]
    wanted = {
        "route": "/v1/embeddings", "model": MODEL, "status": 200, "texts": 2, "prompt_tokens": 5,
        "finish": "stop",
    }  # fmt: skip
    assert wanted.items() <= line.items()
    assert f'router_prompt_tokens_total{{model="{MODEL}"}} 5.0' in router.metrics.render().decode()


async def test_the_event_loop_turns_all_the_time(router: Router) -> None:
    """Between any two turns of the loop at most one slice of the work happens."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counter = asyncio.create_task(count())
    await asyncio.sleep(0)
    turns = 0
    texts = ["some words " * 40] * 1000
    assert len(vectors(await embed(router, texts))) == 1000
    counter.cancel()
    assert turns >= 1000 // 32


# -- what the model's files say


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return folder


MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_the_kind_of_pooling(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    write(tmp_path, modules_json=MODULES, sentence_bert_config_json={"max_seq_length": 256})
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert load_pooling(tmp_path) == PoolingRule(kind, 256)
    (tmp_path / "modules.json").unlink()
    assert load_pooling(tmp_path).kind == kind


def test_without_such_files_it_is_the_mean(tmp_path: Path) -> None:
    assert load_pooling(tmp_path) == PoolingRule("mean", 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode_mean_tokens": False},
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    write(tmp_path, modules_json=MODULES)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(StartError, match=r"1_Pooling/config\.json.*pooling_mode"):
        load_pooling(tmp_path)


def test_further_steps_are_refused(tmp_path: Path) -> None:
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    write(tmp_path, modules_json=[*MODULES[:2], dense])
    with pytest.raises(StartError, match=r"modules\.json.*Dense"):
        load_pooling(tmp_path)


@pytest.mark.parametrize("longest", [0, "256", 1.5, True])
def test_a_longest_text_that_is_no_number(tmp_path: Path, longest: Any) -> None:
    write(tmp_path, sentence_bert_config_json={"max_seq_length": longest})
    with pytest.raises(StartError, match="max_seq_length"):
        load_pooling(tmp_path)
