"""The folder of tools/tiny_model.py: complete, the same every time, one token per byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tools import tiny_model
from tools.tiny_model import (
    FIRST_BYTE,
    SPECIALS,
    VOCAB_SIZE,
    TinySpec,
    decode_tokens,
    encode_text,
    write_tiny_model,
)

FILES = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES


def test_same_arguments_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_tiny_model(tmp_path / "again")
    other = write_tiny_model(tmp_path / "other", TinySpec(seed=1))
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    weights = "model.safetensors"
    assert (other / weights).read_bytes() != (folder / weights).read_bytes()


@pytest.mark.parametrize(
    "spec", [TinySpec(), TinySpec(tied=True, layers=3), TinySpec("qwen2", heads=8, kv_heads=8)]
)
def test_weights_fit_the_config(spec: TinySpec, tmp_path: Path) -> None:
    config = json.loads((write_tiny_model(tmp_path, spec) / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    assert weights["model.embed_tokens.weight"].shape == (vocab, hidden)
    assert ("lm_head.weight" in weights) is not config["tie_word_embeddings"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        assert weights[f"{at}.self_attn.k_proj.weight"].shape == (kv_size, hidden)
        assert weights[f"{at}.mlp.up_proj.weight"].shape == (config["intermediate_size"], hidden)
        assert (f"{at}.self_attn.q_proj.bias" in weights) is (spec.family == "qwen2")
    assert f"model.layers.{config['num_hidden_layers']}.input_layernorm.weight" not in weights


@given(st.text(max_size=60))
def test_every_byte_is_one_token(tokenizer: Tokenizer, text: str) -> None:
    tokens = encode_text(text)
    assert tokens == [byte + FIRST_BYTE for byte in text.encode()]
    assert decode_tokens(tokens) == text
    if not any(special in text for special in SPECIALS):
        assert tokenizer.encode(text).ids == tokens
        assert tokenizer.decode(tokens) == text


def test_all_bytes_have_a_glyph(tokenizer: Tokenizer) -> None:
    for byte, glyph in enumerate(tiny_model.byte_glyphs()):
        assert tokenizer.token_to_id(glyph) == byte + FIRST_BYTE
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


def test_specials(tokenizer: Tokenizer) -> None:
    for token, name in enumerate(SPECIALS):
        assert tokenizer.encode(name).ids == [token]
        assert decode_tokens([token]) == name
    assert tokenizer.decode([4, *encode_text("hi"), 5]) == "hi"
    assert tokenizer.decode([9, *encode_text("hi"), 10]) == "<think>hi</think>"


def test_half_characters_and_strange_ids_decode() -> None:
    assert decode_tokens(encode_text("é")[:1]) == "\ufffd"
    assert decode_tokens([VOCAB_SIZE, -1]) == ""


def test_chat_template(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = jinja2.Environment().from_string(config["chat_template"])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = template.render(messages=messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_command_line(tmp_path: Path) -> None:
    script = Path(tiny_model.__file__)
    words = [sys.executable, script, tmp_path / "m", "--layers", "1", "--tied", "--seed", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'm'}\n"
    expected = write_tiny_model(tmp_path / "f", TinySpec(layers=1, tied=True, seed=3))
    assert (
        load_file(expected / "model.safetensors").keys()
        == load_file(tmp_path / "m" / "model.safetensors").keys()
    )


def test_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tools.tiny_model import write_tiny_model;"
        f"write_tiny_model(Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    root = Path(tiny_model.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
