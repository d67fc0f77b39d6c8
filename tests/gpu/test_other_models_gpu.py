"""Embeddings and the fallback through transformers on a CUDA device, against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.embedding import embed, embedding_device, largest_difference
from tests.generation import Driver, device_of
from tools.tiny_model import TinySpec, write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXTS = [[3 + (5 * i + n) % 90 for i in range(n)] for n in (1, 4, 33, 60, 7)]
TOLERANCE = 1e-4


def test_embeddings_of_a_chat_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, TinySpec(max_len=256))
    here = embed(embedding_device(folder, dtype="float32"), TEXTS)
    there = embedding_device(folder, dtype="float32", device="cuda:0")
    assert largest_difference(here, embed(there, TEXTS)) < TOLERANCE
    assert largest_difference(here, embed(there, TEXTS, step_tokens=16)) < TOLERANCE


def test_embeddings_of_an_encoder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    here = embed(embedding_device(tmp_path, dtype="float32"), TEXTS)
    there = embed(embedding_device(tmp_path, dtype="float32", device="cuda:0"), TEXTS)
    assert largest_difference(here, there) < TOLERANCE


@pytest.mark.parametrize("kind", ["gpt_neox", "cohere2", "qwen2_moe"])
def test_fallback(tmp_path: Path, kind: str) -> None:
    """The load itself compares paged attention with the class's own forward pass."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    if kind == "qwen2_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens = []
    for device in ("cpu", "cuda:0"):
        driver = Driver(device_of(tmp_path, dtype="float32", device=device, max_len=256))
        tokens.append([r.tokens for r in driver.run([driver.submit(t, 12) for t in TEXTS])])
    assert tokens[0] == tokens[1]
