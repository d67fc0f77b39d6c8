"""Write a tiny random model with a byte-level tokenizer, for tests that need no real one.

The folder is a complete Hugging Face one: config.json, model.safetensors, generation_config.json,
tokenizer.json, tokenizer_config.json. The same arguments always give the same bytes.

Tokens: ids 0-15 are the special ones of `SPECIALS`, and byte b is token b + 16 (`FIRST_BYTE`), so
the vocabulary has 272 entries and every text of n UTF-8 bytes has n tokens. No token is added in
front. A chat message is rendered as `<|im_start|>ROLE\\nTEXT<|im_end|>\\n`, the answer begins after
`<|im_start|>assistant\\n`. The end-of-sequence tokens are `</s>` and `<|im_end|>`.

usage: python tools/tiny_model.py DIR [--family llama] [--seed N] [--layers N] ... (see --help)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

SPECIALS = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|reserved_0|>",
    "<|reserved_1|>",
    "<|reserved_2|>",
    "<|reserved_3|>",
    "<|reserved_4|>",
)
FIRST_BYTE = len(SPECIALS)
VOCAB_SIZE = FIRST_BYTE + 256
PAD_ID, BOS_ID, EOS_ID, IM_END_ID = (
    SPECIALS.index(name) for name in ("<pad>", "<s>", "</s>", "<|im_end|>")
)
# Written into texts by models, so decoding must show them.
_VISIBLE = frozenset(("<tool_call>", "</tool_call>", "<think>", "</think>"))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinySpec:
    """The shape of the model; `family` names what differs from llama besides numbers."""

    family: str = "llama"
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 128
    max_len: int = 2048
    tied: bool = False
    seed: int = 0
    dtype: str = "float32"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def encode_text(text: str) -> list[int]:
    """Token ids of plain text."""
    return [byte + FIRST_BYTE for byte in text.encode()]


def decode_tokens(tokens: list[int]) -> str:
    """Text of token ids, special ones by name; bytes that are no UTF-8 become U+FFFD."""
    parts: list[bytes] = []
    for token in tokens:
        if FIRST_BYTE <= token < VOCAB_SIZE:
            parts.append(bytes((token - FIRST_BYTE,)))
        elif 0 <= token < FIRST_BYTE:
            parts.append(SPECIALS[token].encode())
    return b"".join(parts).decode(errors="replace")


def write_tiny_model(folder: Path, spec: TinySpec | None = None) -> Path:
    """Write all files into `folder` (made if needed) and return it. Needs numpy and safetensors."""
    from safetensors.numpy import save_file

    spec = spec or TinySpec()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", config_json(spec)),
        ("generation_config.json", generation_config_json()),
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", tokenizer_config_json(spec)),
    ):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    save_file(dict(weights(spec)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_json(spec: TinySpec) -> dict[str, Any]:
    """config.json as transformers reads it."""
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[spec.family]
    return {
        "architectures": [architecture],
        "model_type": spec.family,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": spec.dtype,
    }


def generation_config_json() -> dict[str, Any]:
    """generation_config.json: a chat turn ends at either of two tokens."""
    return {
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, IM_END_ID],
        "pad_token_id": PAD_ID,
    }


def weights(spec: TinySpec) -> Iterator[tuple[str, numpy.ndarray[Any, Any]]]:
    """Tensors by Hugging Face name.

    Scaled by fan-in, so that activations keep their size through the layers, and logits spread by
    3 to 4: greedy choices have margins far above rounding.
    """
    import numpy as np

    random = np.random.default_rng(spec.seed)

    def matrix(rows: int, columns: int) -> numpy.ndarray[Any, Any]:
        values = random.standard_normal((rows, columns)) / math.sqrt(columns)
        return values.astype(spec.dtype)

    def vector(size: int, mean: float) -> numpy.ndarray[Any, Any]:
        return (mean + 0.1 * random.standard_normal(size)).astype(spec.dtype)

    hidden, kv_size = spec.hidden, spec.kv_heads * spec.head_dim
    yield "model.embed_tokens.weight", matrix(VOCAB_SIZE, hidden) * hidden**0.25
    for layer in range(spec.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", vector(hidden, 1.0)
        for name, rows in (("q", hidden), ("k", kv_size), ("v", kv_size)):
            yield f"{at}.self_attn.{name}_proj.weight", matrix(rows, hidden)
            if spec.family == "qwen2":
                yield f"{at}.self_attn.{name}_proj.bias", vector(rows, 0.0)
        yield f"{at}.self_attn.o_proj.weight", matrix(hidden, hidden)
        yield f"{at}.post_attention_layernorm.weight", vector(hidden, 1.0)
        yield f"{at}.mlp.gate_proj.weight", matrix(spec.intermediate, hidden)
        yield f"{at}.mlp.up_proj.weight", matrix(spec.intermediate, hidden)
        yield f"{at}.mlp.down_proj.weight", matrix(hidden, spec.intermediate)
    yield "model.norm.weight", vector(hidden, 1.0)
    if not spec.tied:
        yield "lm_head.weight", matrix(VOCAB_SIZE, hidden) * 4.0


def tokenizer_json() -> dict[str, Any]:
    """tokenizer.json: byte-level BPE without merges, so that every byte is one token."""
    vocabulary = {name: i for i, name in enumerate(SPECIALS)}
    vocabulary |= {glyph: FIRST_BYTE + byte for byte, glyph in enumerate(byte_glyphs())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | added_token(name) for i, name in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def tokenizer_config_json(spec: TinySpec) -> dict[str, Any]:
    """tokenizer_config.json with the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): added_token(name) for i, name in enumerate(SPECIALS)},
        "bos_token": SPECIALS[BOS_ID],
        "eos_token": SPECIALS[EOS_ID],
        "pad_token": SPECIALS[PAD_ID],
        "model_max_length": spec.max_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def byte_glyphs() -> list[str]:
    """The printable character that byte-level BPE writes for each byte 0-255.

    Bytes that are printable in Latin-1 stand for themselves, the others are numbered from U+0100.
    """
    spare = iter(range(0x100, 0x200))
    return [
        chr(byte)
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
        else chr(next(spare))
        for byte in range(256)
    ]


def added_token(content: str) -> dict[str, Any]:
    """An entry of `added_tokens`; a control token unless answers show it."""
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": content not in _VISIBLE,
    }


def main(words: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tiny_model.py",
        description=(__doc__ or "").partition("usage:")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = TinySpec()
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--family", choices=("llama", "qwen2"), default=default.family)
    for name in ("seed", "layers", "hidden", "heads", "kv_heads", "intermediate", "max_len"):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(default, name), help="%(default)s")
    parser.add_argument("--vocab", choices=("byte",), default="byte", help="%(default)s")
    parser.add_argument("--dtype", choices=("float32", "float16"), default=default.dtype)
    parser.add_argument("--tied", action="store_true", help="lm_head shares the embedding")
    arguments = vars(parser.parse_args(words))
    folder: Path = arguments.pop("folder")
    del arguments["vocab"]
    write_tiny_model(folder, TinySpec(**arguments))
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
