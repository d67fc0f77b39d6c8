"""ChatGLM2 with its real vocabulary, end to end over HTTP: messages to text, deltas, log-probs.

The weights come from the formula in tests/golden/README.md, the tokenizer file from where it is
kept (it is not ours to pass on).
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import save_file

from tests.serving import Server, serve
from tests.text_models import real_vocabulary

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent.parent / "golden" / "chatglm2-realvocab"
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (GOLDEN / "greedy.jsonl").read_text().splitlines()
]
NAME = "chatglm2-realvocab"
LOGPROB_TOLERANCE = 1e-3


def formula_weights() -> dict[str, torch.Tensor]:
    """As tests/golden/README.md has it; checked against the file's own first values and sums."""
    facts = json.loads((GOLDEN / "weights.json").read_text())
    tensors = {}
    for name, shape in facts["shapes"].items():
        random = np.random.RandomState(zlib.crc32(f"{name}#{facts['salt']}".encode()))
        if "layernorm" in name:
            values = 1 + random.randint(-256, 257, shape) / 512
        else:
            scale = 0.25
            if "word_embeddings" in name or name.endswith("bias"):
                scale = 1.0
            elif "output_layer" in name:
                scale = 0.5
            elif "query_key_value.weight" in name:
                scale = 0.375
            values = random.randint(-1024, 1025, shape) / 1024 * scale
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    return tensors


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models") / NAME
    folder.mkdir()
    shutil.copy(real_vocabulary("chatglm2-6b"), folder / "tokenizer.model")
    shutil.copy(GOLDEN / "config.json", folder)
    save_file(formula_weights(), folder / "model.safetensors")
    with serve("--models", f"chatglm2-6b={folder}", "--max-len", "1024") as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, row: dict[str, Any], **more: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 32, **more}
    return client.chat.completions.create(model="chatglm2-6b", messages=row["messages"], **fields)


def test_the_weights_are_those_of_the_golden() -> None:
    checks = json.loads((GOLDEN / "weights.json").read_text())["checks"]
    weights = formula_weights()
    assert checks.keys() == weights.keys()
    for name, check in checks.items():
        flat = weights[name].flatten().double()
        assert flat[:3].tolist() == check["first"]
        assert float(flat.abs().sum()) == pytest.approx(check["abs_sum"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["messages"][-1]["content"][:12])
def test_messages_to_text(client: openai.OpenAI, row: dict[str, Any]) -> None:
    answer = ask(client, row)
    assert answer.usage.prompt_tokens == len(row["prompt_ids"])
    assert answer.choices[0].message.content == row["text"]
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["messages"][-1]["content"][:12])
def test_deltas(client: openai.OpenAI, row: dict[str, Any]) -> None:
    """The golden has one delta a token; ours may bundle them and are the same text in order."""
    chunks = [
        chunk.choices[0].delta.content or ""
        for chunk in ask(client, row, stream=True)
        if chunk.choices
    ]
    bounds = {len("".join(row["deltas"][:n])) for n in range(len(row["deltas"]) + 1)}
    sent = 0
    for chunk in chunks:
        sent += len(chunk)
        assert sent in bounds, "a delta ends inside of a token's text"
    assert "".join(chunks) == row["text"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["messages"][-1]["content"][:12])
def test_logprobs(client: openai.OpenAI, row: dict[str, Any]) -> None:
    content = ask(client, row, logprobs=True, top_logprobs=5).choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(
        row["token_logprobs"], abs=LOGPROB_TOLERANCE
    )
    for entry, wanted in zip(content, row["top5"], strict=True):
        got = [rival.logprob for rival in entry.top_logprobs]
        assert got == pytest.approx([value for _, value in wanted], abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("row", ROWS[:4], ids=lambda row: row["messages"][-1]["content"][:12])
def test_prompt_logprobs(client: openai.OpenAI, row: dict[str, Any]) -> None:
    """By echo, for the golden's own ids; the first token has no log-probability."""
    answer = client.completions.create(
        model="chatglm2-6b",
        prompt=row["prompt_ids"],
        max_tokens=0,
        echo=True,
        logprobs=0,
        temperature=0,
    )
    values = answer.choices[0].logprobs.token_logprobs
    assert values[0] is None
    assert values[1:] == pytest.approx(row["prompt_token_logprobs"][1:], abs=LOGPROB_TOLERANCE)


def test_ids_without_text_are_never_sampled(server: Server, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="chatglm2-6b",
        prompt="你好",
        max_tokens=600,
        temperature=2,
        seed=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    ids = answer.choices[0].model_extra["token_ids"]
    assert max(ids) < 64794
    assert len(ids) > 100
