"""Several models of different families behind one address, with tokenizers of every kind.

What each answers is compared with the same model alone in this process, fed with the ids that its
own chat format gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from router.checkpoint.facts import read_checkpoint
from router.text.model import load_text
from tests.generation import Driver, device_of
from tests.serving import Server, serve
from tools.make_families import FAMILIES
from tools.make_model import make_model

pytestmark = pytest.mark.slow

MESSAGES: list[dict[str, str]] = [
    {"role": "user", "content": "Hello! 你好"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What is the capital of France?"},
]
MAX_NEW, MAX_LEN = 24, 256


class Expected(NamedTuple):
    """A chat's prompt length and greedy answer."""

    num_prompt: int
    tokens: list[int]
    text: str


def alone(folder: Path) -> Expected:
    """The model in this process, without a router."""
    text = load_text(folder)
    assert text.template is not None
    tokenizer = text.tokenizer
    prompt = text.template.render_tokens(MESSAGES, None, True, False, {}, tokenizer)
    size, rows = tokenizer.vocab_size, read_checkpoint(folder).facts.vocab_size
    device = device_of(folder, max_len=MAX_LEN, max_batch=2, text_ids=size if size < rows else 0)
    driver = Driver(device)
    [result] = driver.run([driver.submit(prompt, MAX_NEW)])
    return Expected(len(prompt), result.tokens, tokenizer.decode(result.tokens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders named tiny-FAMILY, as for --model-dir."""
    root = tmp_path_factory.mktemp("models")
    for family in ("chatglm2", "chatglm3", "glm4-9b", "llama", "vicuna", "bert"):
        make_model(root / f"tiny-{family}", family)
    return root


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Server]:
    models = "tiny-chatglm2,tiny-llama|gpt-4o|text-davinci-003=tiny-llama"
    words = ("--model-dir", str(folder), "--max-len", str(MAX_LEN), "--gpus", "cpu,cpu")
    with serve("--models", models, *words) as running:
        yield running


@pytest.fixture(scope="module")
def four(folder: Path) -> Iterator[Server]:
    models = "tiny-chatglm3,tiny-glm4-9b,tiny-vicuna,tiny-bert"
    words = ("--model-dir", str(folder), "--max-len", str(MAX_LEN), "--gpus", "cpu,cpu,cpu,cpu")
    with serve("--models", models, *words) as running:
        yield running


def assert_answers(server: Server, name: str, expected: Expected) -> None:
    """As if it were alone, whole and streamed."""
    fields: dict[str, Any] = {
        "model": name,
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": MAX_NEW,
    }
    body = {**fields, "return_token_ids": True, "ignore_eos": True}
    told = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    [choice] = told["choices"]
    assert told["model"] == name
    assert told["usage"]["prompt_tokens"] == expected.num_prompt
    assert choice["token_ids"] == expected.tokens
    assert choice["message"]["content"] == expected.text
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(
            **fields, stream=True, extra_body={"ignore_eos": True}
        )
        parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == expected.text


def test_each_name_is_listed_once(two: Server) -> None:
    listed = httpx.get(f"{two.url}/v1/models").json()["data"]
    names = ["tiny-chatglm2", "tiny-llama", "gpt-4o", "text-davinci-003"]
    assert [entry["id"] for entry in listed] == names
    assert len(two.engines()) == 2


def test_each_name_is_its_model(two: Server, folder: Path) -> None:
    glm, llama = alone(folder / "tiny-chatglm2"), alone(folder / "tiny-llama")
    assert glm.tokens != llama.tokens
    assert_answers(two, "tiny-chatglm2", glm)
    for name in ("tiny-llama", "gpt-4o", "text-davinci-003"):
        assert_answers(two, name, llama)
    body = {"model": "tiny-chatglm3", "messages": MESSAGES}
    assert httpx.post(f"{two.url}/v1/chat/completions", json=body).status_code == 404


@pytest.mark.parametrize("family", ["chatglm3", "glm4-9b", "vicuna"])
def test_families_with_tokenizers_of_their_own(four: Server, folder: Path, family: str) -> None:
    name = f"tiny-{family}"
    assert_answers(four, name, alone(folder / name))


def test_an_encoder_beside_them(four: Server) -> None:
    """It embeds and does not chat; the chat models do both."""
    for name in ("tiny-bert", "tiny-vicuna"):
        body = {"model": name, "input": ["hello world", "the capital of France"]}
        told = httpx.post(f"{four.url}/v1/embeddings", json=body, timeout=60).json()
        assert [len(entry["embedding"]) for entry in told["data"]] == [64, 64]
        assert told["data"][0]["embedding"] != told["data"][1]["embedding"]
    body = {"model": "tiny-bert", "messages": MESSAGES}
    assert httpx.post(f"{four.url}/v1/chat/completions", json=body).status_code == 400


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_every_family_answers_a_chat(tmp_path: Path, family: str) -> None:
    """In this process: text, decoder and text again."""
    answer = alone(make_model(tmp_path / family, family))
    assert answer.num_prompt > 10
    assert len(answer.tokens) == MAX_NEW
    assert answer.text
