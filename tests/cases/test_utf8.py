"""Cases of the kind utf8: characters and spaces, streamed and whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cases.asking import (
    CHAT,
    COMPLETIONS,
    REPLACEMENT,
    Scripted,
    both,
    bytes_play,
    content,
    deltas,
    events,
    joined,
)
from tests.router_parts import Play, Router, chat, complete, text_play
from tests.text_models import CHATML, sentencepiece_like, write_folder
from tools.tiny_model import decode_tokens

SMILE = bytes_play(b"\xf0\x9f", b"\x98", b"\x8a")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model: words begin with ▁, other characters are bytes."""
    return write_folder(
        tmp_path_factory.mktemp("pieces") / "pieces",
        sentencepiece_like(),
        settings={"chat_template": CHATML, "eos_token": "</s>"},
        config={"model_type": "llama"},
    )


def piece_play(*names: str) -> Play:
    """One step for each piece."""
    vocabulary = sentencepiece_like().get_vocab()
    return Play([[vocabulary[name]] for name in names])


async def test_case_001_a_split_character_in_a_stream(engine: Scripted) -> None:
    async with engine(SMILE) as router:
        answer = await chat(router.app, stream=True)
    assert deltas(answer) == ["😊"]
    assert REPLACEMENT not in answer.body.decode()
    opening, *rest = events(answer)
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["choices"][0]["delta"].get("content") != "" for event in rest)


async def test_case_002_eight_streams_at_once(engine: Scripted) -> None:
    texts = ["天气很好", "😊🎉", "日本語です", "한국어", "🏳️‍🌈!", "Ω≈ç√∫", "नमस्ते", "👩‍👩‍👧"]

    def scene(prompt: str) -> Play:
        text = next(text for at, text in enumerate(texts) if f"ask {at}" in prompt)
        return bytes_play(*(bytes([byte]) for byte in text.encode()))

    async with engine(scene) as router:
        asked = [chat(router.app, f"ask {at}", stream=True) for at in range(8)]
        streams = await asyncio.gather(*asked)
        whole = [content(await chat(router.app, f"ask {at}")) for at in range(8)]
    assert [joined(stream) for stream in streams] == whole == texts
    assert not any(REPLACEMENT in stream.body.decode() for stream in streams)


async def test_case_004_a_split_character_in_a_whole_answer(engine: Scripted) -> None:
    async with engine(SMILE) as router:
        whole, streamed = await both(router.app, CHAT)
    assert content(whole) == joined(streamed) == "😊"


async def test_case_006_the_first_space_of_a_continuation(engine: Scripted, pieces: Path) -> None:
    for names, text in (
        (("▁", "▁a", "▁", "x"), "  a x"),
        (("▁a", "▁", "x"), " a x"),
        (("x", "▁a"), "x a"),
    ):
        async with engine(piece_play(*names), folder=pieces) as router:
            whole, streamed = await both(router.app, COMPLETIONS, "Hello")
            assert joined(streamed) == content(whole) == text


async def test_case_007_spaces_between_words(engine: Scripted, pieces: Path) -> None:
    names = ("▁Hello", "!", "▁", "I", "'", "m", "▁a", "n", "▁", "<0x41>", "I")
    async with engine(piece_play(*names), folder=pieces) as router:
        whole, streamed = await both(router.app, CHAT)
    assert joined(streamed) == content(whole) == "Hello! I'm an AI"


async def test_case_008_runs_of_spaces(engine: Scripted, pieces: Path) -> None:
    async with engine(text_play("a", "  ", " ", " b")) as router:
        assert joined(await chat(router.app, stream=True)) == "a    b"
    play = piece_play("▁a", "▁", "▁", "▁", "▁", "<0x62>")
    async with engine(play, folder=pieces) as router:
        assert joined(await chat(router.app, stream=True)) == "a    b"


async def test_case_009_chunks_hold_new_text_only(engine: Scripted) -> None:
    async with engine(text_play(*"sixteen tokens..", stop=False)) as router:
        whole, streamed = await both(router.app, COMPLETIONS)
    texts = deltas(streamed)
    assert sum(map(len, texts)) == len(content(whole)) == 16
    assert "".join(texts) == content(whole)


async def test_case_011_a_hundred_streams(engine: Scripted) -> None:
    def scene(prompt: str) -> Play:
        byte = prompt.encode()[0]
        return bytes_play(*(bytes([0xE5, 0x80 + i % 64, byte % 64 + 0x80]) for i in range(40)))

    async def client(router: Router, number: int) -> None:
        for turn in range(20):
            prompt = f"{chr(48 + number * 10 + turn // 2)} client"
            answer = await complete(
                router.app, prompt, stream=True, max_tokens=100, return_token_ids=True
            )
            choices = [event["choices"][0] for event in events(answer)]
            ids = [token for choice in choices for token in choice.get("token_ids", [])]
            assert len(ids) == 100
            assert joined(answer) == decode_tokens(ids)

    async with engine(scene) as router:
        await asyncio.gather(*(client(router, number) for number in range(5)))
