"""Cases of the kind replica: two engines of one model."""

from __future__ import annotations

import asyncio

import pytest

from engine.protocol import unpack_tokens
from tests.cases.asking import CHAT, COMPLETIONS, Scripted, both, content, error, joined
from tests.router_parts import Play, chat, complete, text_play
from tools.tiny_model import decode_tokens, encode_text


@pytest.mark.parametrize("dies_at", [0, 3])
async def test_case_240_another_replica_takes_over(engine: Scripted, dies_at: int) -> None:
    dying = Play([encode_text(letter) for letter in "abcdef"], dies_at=dies_at)

    def scene(prompt: str) -> Play:
        return dying if "dying" in prompt else text_play("abcdef")

    async with engine(scene, replicas=2) as router:
        router.engines.restarts = False  # only the other one is left
        assert content(await chat(router.app, "dying")) == "abcdef"
        first, second = router.engines.submits
        assert len(unpack_tokens(second.tokens)) == len(unpack_tokens(first.tokens)) + dies_at
        assert {replica.state for replica in router.fleet.replicas} == {"serving", "dead"}
        for route in (CHAT, COMPLETIONS):
            whole, streamed = await both(router.app, route)
            assert content(whole) == joined(streamed) == "abcdef"


async def test_case_241_a_replica_that_loads_gets_nothing(engine: Scripted) -> None:
    async with engine(text_play("ok"), replicas=2, started=False) as router:
        router.engines.start(0)
        router.fleet.start(1, 1, b"engine-1-1")  # a process, not ready yet
        answers = await asyncio.gather(*(chat(router.app, f"ask {i}") for i in range(20)))
        assert [content(answer) for answer in answers] == ["ok"] * 20
        views = router.fleet.views("tiny")
        assert [view.state == "serving" for view in views] == [True, False]
        assert len(router.engines.submits) == 20
        assert {each.epoch for each in router.engines.submits} == {1}
    assert router.engines.sent_to == {b"engine-0-1"}


async def test_case_242_client_errors_are_the_clients(engine: Scripted) -> None:
    async with engine(text_play("ok"), replicas=2) as router:
        for number in range(50):
            answer = await complete(router.app, f"bad {number}", temperature=9)
            error(answer)
        assert not router.engines.submits
        for number in range(10):
            assert content(await complete(router.app, f"{number} good " * 20)) == "ok"
        assert {replica.state for replica in router.fleet.replicas} == {"serving"}
        assert len(router.engines.sent_to) == 2
        prompts = [decode_tokens(unpack_tokens(each.tokens)) for each in router.engines.submits]
        assert all("good" in prompt for prompt in prompts)
