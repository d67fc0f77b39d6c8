"""A model through transformers' classes behind the real router: same tokens, shared prefixes."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch
from transformers import Cohere2Config, Cohere2ForCausalLM

from tests.serving import serve
from tools.tiny_model import (
    BOS_ID,
    EOS_ID,
    FIRST_BYTE,
    PAD_ID,
    VOCAB_SIZE,
    decode_tokens,
    encode_text,
    tokenizer_json,
)

PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom"


def write_model(folder: Path) -> Cohere2ForCausalLM:
    """Random weights with a byte-level tokenizer; its windows are shorter than the prompt."""
    torch.manual_seed(1)
    config = Cohere2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=20,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = Cohere2ForCausalLM(config).eval()
    with torch.no_grad():  # special tokens, which texts do not show, are never the likeliest
        model.get_input_embeddings().weight[:FIRST_BYTE] = 0.0
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return model


def greedy(model: Cohere2ForCausalLM, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, each from a whole forward pass."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
def test_router_serves_a_model_through_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    model = write_model(folder)
    wanted = decode_tokens(greedy(model, encode_text(PROMPT), 24))
    with serve("--models", str(folder), "--max-len", "256") as server:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        body |= {"ignore_eos": True}
        answers = [
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            for _ in range(2)
        ]
        assert [answer["choices"][0]["text"] for answer in answers] == [wanted, wanted]
        cached = answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= 64, answers[1]["usage"]
        assert "Cohere2ForCausalLM runs through transformers' own code" in server.log()
