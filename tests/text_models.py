"""Tiny vocabularies and model folders for tests of the router's text side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from router.text.vocabulary import byte_alphabet

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(*, bos: bool = False) -> Tokenizer:
    """256 bytes, a few merges, three control tokens, one added token that is no control token."""
    vocab = {char: byte for byte, char in byte_alphabet().items()}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A",
            special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
        )
    return tokenizer


def sentencepiece_like(*, scheme: str = "legacy") -> Tokenizer:
    """▁ for spaces, bytes as <0xNN>. `legacy` puts a ▁ before every stretch of text, `first` only
    before the first one of a text (Metaspace)."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "H"), ("e", "l"), ("▁H", "el"), ("l", "o"), ("▁Hel", "lo"), ("▁", "a")]
    letters = "▁Helomanyx!',.I<>/su"
    vocab = {piece: number for number, piece in enumerate([*pieces, *letters])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme=scheme)]
        )
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


def write_folder(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    settings: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> Path:
    """A model folder without weights: tokenizer.json and the config files given."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": settings,
        "config.json": config,
        "generation_config.json": generation,
    }
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


# Real vocabularies may not be part of this repository: they are read where they lie.
ROOT = Path(__file__).resolve().parent.parent
TOKENIZERS = Path(os.environ.get("ROUTER_TOKENIZERS", ROOT.parent / "shared" / "tokenizers"))
GLM_CONFIG = {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}


def real_vocabulary(name: str) -> Path:
    """The tokenizer.model of chatglm2-6b, glm-4-9b-chat or llama-2; skips where it is not."""
    file = TOKENIZERS / name / "tokenizer.model"
    if not file.is_file():
        pytest.skip(f"no {file}: set ROUTER_TOKENIZERS to a folder with {name}/tokenizer.model")
    return file


def real_folder(folder: Path, name: str, **files: dict[str, Any]) -> Path:
    """A folder without weights: the tokenizer.model of `name`, and JSON files by their stem."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").symlink_to(real_vocabulary(name))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def golden_rows(name: str) -> list[dict[str, Any]]:
    """The lines of tests/golden/tokenizer-<name>.jsonl."""
    file = Path(__file__).parent / "golden" / f"tokenizer-{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
