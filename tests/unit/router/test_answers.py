"""best_of, prompt_logprobs and truncate_prompt_tokens, over scripted engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from router.api.options import truncated
from router.errors import BadRequest
from tests.router_parts import MODEL, Play, Router, chat, complete, router_parts, text_play
from tools.tiny_model import encode_text, write_tiny_model


def plays(_prompt: str) -> Play:
    return text_play("Hel", "lo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


@pytest_asyncio.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays) as parts:
        yield parts


async def test_of_more_answers_the_likeliest_are_kept(router: Router) -> None:
    for answer in (
        await complete(router.app, n=2, best_of=3, prompt=["a", "b"]),
        await chat(router.app, n=2, best_of=3),
    ):
        assert answer.status == 200, answer.body
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        assert all(choice["logprobs"] is None for choice in choices)
    assert len(router.engines.submits) == 3 * 2 + 3
    assert all(submit.sampling.logprobs == 0 for submit in router.engines.submits)
    seeds = [submit.sampling.seed for submit in router.engines.submits[:3]]
    assert len(set(seeds)) == 3


async def test_best_of_counts_what_was_generated(router: Router) -> None:
    one = (await complete(router.app)).json()["usage"]["completion_tokens"]
    usage = (await complete(router.app, best_of=3)).json()["usage"]
    assert usage["completion_tokens"] == 3 * one


async def test_best_of_cannot_be_streamed(router: Router) -> None:
    answer = await complete(router.app, best_of=3, stream=True)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "best_of"
    assert not router.engines.submits


async def test_prompt_logprobs(router: Router) -> None:
    answer = (await complete(router.app, prompt="abc", prompt_logprobs=2)).json()
    (choice,) = answer["choices"]
    assert choice["logprobs"] is None
    told = choice["prompt_logprobs"]
    assert len(told) == answer["usage"]["prompt_tokens"]
    assert told[0] is None
    for entry, token in zip(told[1:], encode_text("abc")[-len(told) + 1 :], strict=True):
        assert {"logprob", "rank", "decoded_token"} == set(entry[str(token)])
    answer = (await chat(router.app, prompt_logprobs=0)).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_prompt_logprobs_are_not_streamed(router: Router) -> None:
    answer = await complete(router.app, prompt_logprobs=1, stream=True)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "prompt_logprobs"


async def test_a_long_prompt_is_cut_where_asked(router: Router) -> None:
    refused = await complete(router.app, prompt="x" * 600)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    for wanted, expected in ((-1, 511), (10, 10)):
        for answer in (
            await complete(router.app, prompt="x" * 600, truncate_prompt_tokens=wanted),
            await chat(
                router.app,
                messages=[{"role": "user", "content": "x" * 600}],
                truncate_prompt_tokens=wanted,
            ),
        ):
            assert answer.status == 200, answer.body
            assert answer.json()["usage"]["prompt_tokens"] == expected


async def test_an_endless_prompt_is_cut_before_it_is_tokenized(router: Router) -> None:
    endless = "y" * 1_000_000 + "x" * 9
    assert (await complete(router.app, prompt=endless)).status == 400
    answer = await complete(router.app, prompt=endless, truncate_prompt_tokens=10, echo=True)
    assert answer.json()["usage"]["prompt_tokens"] == 10
    assert "y" + "x" * 9 in answer.json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("wanted", "expected"), [(None, [1, 2, 3]), (2, [2, 3]), (7, [1, 2, 3]), (-1, [1, 2, 3])]
)
def test_truncated(wanted: int | None, expected: list[int]) -> None:
    assert truncated([1, 2, 3], wanted, 8) == expected


@pytest.mark.parametrize("wanted", [0, -2, 8])
def test_truncated_to_nothing_or_more_than_fits(wanted: int) -> None:
    with pytest.raises(BadRequest):
        truncated([1, 2, 3], wanted, 8)
