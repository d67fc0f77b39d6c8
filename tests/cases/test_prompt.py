"""Cases of the kind prompt: the forms of a completion's prompt."""

from __future__ import annotations

from pathlib import Path

from tests.cases.asking import Scripted, assert_alive, body, error
from tests.router_parts import Play, complete, text_play
from tests.text_models import byte_level, write_folder
from tools.tiny_model import VOCAB_SIZE


async def test_case_145_an_empty_prompt(engine: Scripted, tmp_path: Path) -> None:
    async with engine(text_play("ok")) as router:
        for prompt in ("", [""], ["a", ""]):
            assert error(await complete(router.app, prompt))["param"] == "prompt"
        assert not router.engines.submits
        await assert_alive(router.app)
    starting = write_folder(
        tmp_path / "starts", byte_level(bos=True), config={"model_type": "llama"}
    )
    async with engine(Play([[65]], stop=False), folder=starting) as router:
        for prompt in ("", [""]):
            answer = body(await complete(router.app, prompt))
            assert (answer["usage"]["prompt_tokens"], answer["choices"][0]["text"]) == (1, "A")


async def test_case_146_negative_ids(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        for prompt in ([-1], [[5], [-1]], [20, -7]):
            assert error(await complete(router.app, prompt))["param"] == "prompt"
        assert not router.engines.submits


async def test_case_147_ids_too_large(engine: Scripted) -> None:
    async with engine(text_play("ok")) as router:
        for token in (VOCAB_SIZE, 99999999, 5279552648203111001, 2**63, 2**80):
            assert error(await complete(router.app, [token]))["param"] == "prompt"
        assert not router.engines.submits
        await assert_alive(router.app)


async def test_case_148_several_prompts(engine: Scripted) -> None:
    async with engine(lambda prompt: text_play(prompt.upper())) as router:
        answer = body(await complete(router.app, ["a", "bcd"]))
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "A"), (1, "BCD")]
    assert answer["usage"]["prompt_tokens"] == 4


async def test_case_150_ids_as_a_prompt(engine: Scripted, tmp_path: Path) -> None:
    starting = write_folder(
        tmp_path / "starts", byte_level(bos=True), config={"model_type": "llama"}
    )
    for folder in ({}, {"folder": starting}):
        async with engine(Play([[65]], stop=False), **folder) as router:
            answer = body(await complete(router.app, [5, 6, 7], return_token_ids=True))
            assert answer["usage"]["prompt_tokens"] == 3
            assert answer["choices"][0]["prompt_token_ids"] == [5, 6, 7]
