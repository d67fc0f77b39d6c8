"""Cases of the kind sampling, on a real model."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.cases.asking import COMPLETIONS, DEMO, Scripted, error
from tests.router_parts import chat, complete, text_play
from tests.serving import Server

PROMPT = "The best thing about the sea is"


def ask(server: Server, prompt: Any = PROMPT, **fields: Any) -> Any:
    """The one choice of a completion by the demo model, with its ids."""
    asked = {"model": DEMO, "prompt": prompt, "max_tokens": 8, "return_token_ids": True, **fields}
    answer = httpx.post(server.url + COMPLETIONS, json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.fixture(scope="module")
def greedy(real: Server) -> list[int]:
    """The ids that no chance has a part in."""
    ids: list[int] = ask(real, temperature=0)["token_ids"]
    return ids


@pytest.mark.slow
async def test_case_152_a_seed_gives_the_same_beside_others(real: Server) -> None:
    async with httpx.AsyncClient(base_url=real.url, timeout=60) as client:

        async def ids(**fields: Any) -> list[int]:
            asked = {"model": DEMO, "prompt": PROMPT, "temperature": 0.8, "max_tokens": 12}
            answer = await client.post(
                COMPLETIONS, json={**asked, "return_token_ids": True, **fields}
            )
            found: list[int] = answer.json()["choices"][0]["token_ids"]
            return found

        alone = await ids(seed=42)
        beside, *others = await asyncio.gather(ids(seed=42), *(ids() for _ in range(7)))
    assert beside == alone
    assert all(other != alone for other in others)


@pytest.mark.slow
def test_case_153_without_a_seed_answers_differ(real: Server) -> None:
    texts = {ask(real, temperature=1.5)["text"] for _ in range(8)}
    assert len(texts) >= 2


@pytest.mark.slow
def test_case_155_a_tiny_temperature_is_greedy(real: Server, greedy: list[int]) -> None:
    choice = ask(real, temperature=0.0001)
    assert choice["token_ids"] == greedy
    assert choice["text"]


async def test_case_156_a_huge_temperature_is_refused(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        for answer in (
            await chat(router.app, temperature=1_000_000),
            await complete(router.app, temperature=2.0001),
        ):
            assert error(answer)["param"] == "temperature"
            assert "2" in error(answer)["message"]
        assert (await chat(router.app, temperature=2)).status == 200


@pytest.mark.slow
def test_case_157_what_the_penalties_count(real: Server) -> None:
    """Our log-probabilities are the model's own, before penalties: the tokens tell."""
    prompt = "Paris, Paris, Paris, Paris, Paris,"
    plain = ask(real, prompt, temperature=0, max_tokens=1, logprobs=5)
    assert plain["text"] == " Paris"
    for penalty in ("presence_penalty", "frequency_penalty"):
        same = ask(real, prompt, temperature=0, max_tokens=1, logprobs=5, **{penalty: 2})
        assert same["token_ids"] == plain["token_ids"]
        (before,), (after,) = (choice["logprobs"]["top_logprobs"] for choice in (plain, same))
        assert after == pytest.approx(before, abs=1e-2)
    other = ask(real, prompt, temperature=0, max_tokens=1, repetition_penalty=2)
    assert other["token_ids"] != plain["token_ids"]


@pytest.mark.slow
def test_case_159_top_k_one_is_greedy(real: Server, greedy: list[int]) -> None:
    assert ask(real, temperature=1.5, top_k=1)["token_ids"] == greedy


@pytest.mark.slow
def test_case_161_a_bias_forces_or_forbids(real: Server, greedy: list[int]) -> None:
    forced = ask(real, temperature=0, max_tokens=3, logit_bias={"1234": 100})
    assert forced["token_ids"] == [1234] * 3
    wanted = greedy[0]
    without = ask(real, temperature=0, max_tokens=3, logit_bias={str(wanted): -100})
    assert wanted not in without["token_ids"]
