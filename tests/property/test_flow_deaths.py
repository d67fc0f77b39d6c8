"""Engines may die at any token: the answer is that of an undisturbed run, in either form."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router_parts import Play, complete, router_parts
from tools.tiny_model import encode_text, write_tiny_model

TEXT = st.text(alphabet="ab é😊", min_size=1, max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@given(
    text=TEXT,
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dies_at=st.integers(0, 20),
    stop=st.lists(st.text(alphabet="ab é", min_size=1, max_size=2), max_size=2),
    n=st.integers(1, 3),
    max_tokens=st.integers(1, 30),
    replicas=st.integers(1, 2),
)
def test_a_death_changes_nothing(
    folder: Path,
    text: str,
    sizes: list[int],
    dies_at: int,
    stop: list[str],
    n: int,
    max_tokens: int,
    replicas: int,
) -> None:
    tokens = encode_text(text)
    steps: list[list[int]] = []
    while tokens:
        size = sizes[len(steps) % len(sizes)]
        steps.append(tokens[:size])
        tokens = tokens[size:]

    def plays(prompt: str) -> Play:
        return Play(steps, dies_at=dies_at if "dies" in prompt else -1)

    async def run() -> list[Any]:
        fields = {"stop": stop, "n": n, "max_tokens": max_tokens, "logprobs": 1, "seed": 1}
        async with router_parts(folder, plays, replicas=replicas) as router:
            wholes = [
                (await complete(router.app, prompt, **fields)).json() for prompt in ("calm", "dies")
            ]
            streamed = await complete(router.app, "dies again", stream=True, **fields)
            events = streamed.events()
        texts = [""] * n
        for event in events:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        calm, died = wholes
        assert [choice["text"] for choice in calm["choices"]] == texts
        assert calm["usage"]["completion_tokens"] == died["usage"]["completion_tokens"]
        return [calm["choices"], died["choices"]]

    calm, died = asyncio.run(run())
    assert calm == died
