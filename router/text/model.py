"""Everything about one model's text in one value: tokenizer and chat format.

Owns the choice between kinds of model files, and between chat formats. Libraries are imported when
a model needs them.

The tokenizer: tokenizer.json as it is, else tokenizer.model, whose content tells sentencepiece from
tiktoken's ranks; or the vocabulary in a .gguf file. The chat format: what the operator asks for,
ChatGLM's own (ChatGLM3 and GLM-4 publish templates that give other ids), the template in the
model's files, or one for models whose name says what they were trained with. A model that fits none
of these has no chat: a guess would let it answer with the marks of another model's format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from router.checkpoint.gguf import read_gguf
from router.errors import EXIT_CONFIG, StartError
from router.text.formats import ChatFormat, make_format
from router.text.glm import GlmKind, glm_kind, is_glm
from router.text.scanner import ThinkingRule
from router.text.settings import optional_config
from router.text.template import load_template, read_template
from router.text.tokenizer import ModelTokenizer, Tokenizer
from router.text.tool_forms import (
    DEFAULT_FORM,
    OTHER_NAMES,
    OTHER_THINKING,
    THINKING_TAGS,
    TOOL_FORMS,
    ToolForm,
    thinking_rule,
)
from router.text.vocabulary import Vocabulary

MAX_MODEL_BYTES: Final = 64 * 1024 * 1024

# Models that were published without a template: model_type, name, format.
_BY_NAME: Final = (
    ("llama", re.compile(r"vicuna", re.IGNORECASE), "vicuna_v1.1"),
    ("llama", re.compile(r"llama-?2.*chat", re.IGNORECASE), "llama-2"),
    ("qwen2", re.compile(r"qwen.*(chat|instruct)", re.IGNORECASE), "chatml"),
)


@dataclass(frozen=True, slots=True)
class ModelText:
    """`template` is None where the model has none: its chat routes answer chat_template_missing."""

    tokenizer: Tokenizer
    template: ChatFormat | None


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a model's files say about it: config.json, and all the names that they and we know."""

    config: Mapping[str, Any]
    names: Sequence[str]


def load_text(
    path: Path, *, names: Sequence[str] = (), chat_format: str = "", chat_template: str = ""
) -> ModelText:
    """From a model folder or a .gguf file; `names` are what the model is served as.

    `chat_format` (a name in `FORMATS`) or `chat_template` (a file) takes the place of the model's
    own. Raises `StartError` naming file and remedy.
    """
    facts = _facts(path, names)
    vocabulary, glm = _vocabulary(path, facts, chat_format)
    if chat_template:
        return ModelText(ModelTokenizer(vocabulary), read_template(Path(chat_template)))
    own = None if chat_format or glm else load_template(path)
    name = chat_format or glm or _format_by_name(facts)
    if own is not None or not name:
        return ModelText(ModelTokenizer(vocabulary), own)
    template, ends = make_format(name, {text: i for i, text in vocabulary.special.items()})
    eos_ids = tuple(dict.fromkeys([*vocabulary.eos_ids, *ends]))
    return ModelText(ModelTokenizer(replace(vocabulary, eos_ids=eos_ids)), template)


def tool_form_of(text: ModelText, asked: str) -> ToolForm:
    """How the model writes calls: as asked, else as its chat format says.

    Raises `StartError` for a name that is none.
    """
    name = OTHER_NAMES.get(asked, asked) or (text.template.tool_parser if text.template else "")
    if name and name not in TOOL_FORMS:
        raise StartError(
            f"--tool-parser '{asked}' is not known; known are {', '.join(TOOL_FORMS)}", EXIT_CONFIG
        )
    form = ToolForm(name or DEFAULT_FORM)
    tokenizer = text.tokenizer
    control = {tokenizer.token_text(token): token for token in tokenizer.special_ids}
    return replace(form, ids={word: control[word] for word in form.words if word in control})


def thinking_of(text: ModelText, asked: str) -> ThinkingRule | None:
    """How the model marks its thinking: as asked ("none": it does not), else as its format says.

    Raises `StartError` for a name that is none.
    """
    name = OTHER_THINKING.get(asked, asked)
    if not asked and text.template is not None:
        name = text.template.reasoning_parser
    if name and name not in THINKING_TAGS:
        raise StartError(
            f"--reasoning-parser '{asked}' is not known; known are "
            f"{', '.join(THINKING_TAGS)} and none",
            EXIT_CONFIG,
        )
    return thinking_rule(name)


def load_tokenizer(path: Path) -> Tokenizer:
    """From a model folder or a .gguf file. Raises `StartError` naming file and remedy."""
    return ModelTokenizer(_vocabulary(path, _facts(path, ()), "")[0])


def _facts(path: Path, names: Sequence[str]) -> _Facts:
    # a hub's cache has the model's name three folders up: models--ORG--NAME/snapshots/COMMIT
    folders = [part for part in path.parts if part.startswith("models--")]
    if path.is_dir():
        config = optional_config(path / "config.json")
    else:
        metadata = read_gguf(path, texts=False).metadata
        config = {
            "model_type": metadata.get("general.architecture"),
            "_name_or_path": metadata.get("general.name"),
        }
    return _Facts(config, [str(config.get("_name_or_path", "")), *names, path.name, *folders])


def _format_by_name(facts: _Facts) -> str:
    for kind, pattern, name in _BY_NAME:
        if facts.config.get("model_type") == kind and any(map(pattern.search, facts.names)):
            return name
    return ""


def _vocabulary(path: Path, facts: _Facts, asked: str) -> tuple[Vocabulary, GlmKind | None]:
    """And which ChatGLM it is of, if it is one whose vocabulary says so."""
    if path.is_file():
        from router.text.gguf_vocab import load_gguf_vocabulary

        return load_gguf_vocabulary(path), None
    file = path / "tokenizer.model"
    if (path / "tokenizer.json").is_file() or not file.is_file():
        from router.text.hf_vocab import load_hf_vocabulary

        return load_hf_vocabulary(path), None
    data = _content(file)
    glm: GlmKind | None = None
    from router.text.rank_vocab import is_rank_file, load_rank_vocabulary

    if is_rank_file(data):
        if not is_glm(facts.config) and asked != "glm-4":
            raise StartError(
                f"{file} holds ranks as tiktoken reads them, without control tokens; those are "
                "known of GLM-4 only: take a copy of the model that has a tokenizer.json",
                EXIT_CONFIG,
            )
        return load_rank_vocabulary(path, file, data), "glm-4"
    from router.text.spm_vocab import load_spm_vocabulary

    if is_glm(facts.config) or asked in ("chatglm2", "chatglm3"):
        settings = optional_config(path / "tokenizer_config.json")
        glm = glm_kind(facts.config, settings, facts.names, asked)
    return load_spm_vocabulary(path, data, glm), glm


def _content(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_MODEL_BYTES:
            raise StartError(f"{file} is larger than {MAX_MODEL_BYTES:,} bytes", EXIT_CONFIG)
        return file.read_bytes()
    except OSError as error:
        raise StartError(f"{file} is not readable: {error}", EXIT_CONFIG) from error
