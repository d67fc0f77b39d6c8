"""Everything about one model's text in one value: tokenizer and chat template.

Owns nothing. The only place that chooses between the kinds of model files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from router.text.gguf_vocab import load_gguf_vocabulary
from router.text.hf_vocab import load_hf_vocabulary
from router.text.template import ChatTemplate, load_template
from router.text.tokenizer import ModelTokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class ModelText:
    """`template` is None where the model has none: its chat routes answer chat_template_missing."""

    tokenizer: Tokenizer
    template: ChatTemplate | None


def load_text(path: Path) -> ModelText:
    """From a model folder or a .gguf file. Raises `StartError` naming file and remedy."""
    return ModelText(load_tokenizer(path), load_template(path))


def load_tokenizer(path: Path) -> Tokenizer:
    """From a model folder or a .gguf file. Raises `StartError` naming file and remedy."""
    if path.is_dir():
        return ModelTokenizer(load_hf_vocabulary(path))
    return ModelTokenizer(load_gguf_vocabulary(path))
