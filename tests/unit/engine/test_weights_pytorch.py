"""PyTorch's .bin files: the same weights as safetensors, no code of theirs run, little memory."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from engine.config import EngineConfig, ModelError
from engine.device.build import build_device
from engine.device.pytorch_weights import PytorchSource
from engine.device.weights import open_model
from tools.tiny_model import write_tiny_model

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder whose weights are in pytorch_model.bin."""
    write_tiny_model(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    return tmp_path


def test_shards_hold_what_safetensors_hold() -> None:
    want = load_file(GOLDEN / "chatglm2-tiny" / "model.safetensors")
    _, source = open_model(GOLDEN / "chatglm2-tiny-bin", "auto")
    angles = want.pop("transformer.rotary_pos_emb.inv_freq")  # the only one rounded in float16
    for name, value in want.items():
        assert source.shape(name) == tuple(value.shape)
        got = source.get(name, tuple(value.shape))
        assert torch.equal(got.float(), value.float())
        assert got.is_contiguous()
    assert source.shape("none") is None
    with pytest.raises(ModelError, match="none is missing"):
        source.get("none", (1,))
    with pytest.raises(ModelError, match=rf"shape \[{len(angles)}\], the config asks for \[7\]"):
        source.get("transformer.rotary_pos_emb.inv_freq", (7,))


def test_a_single_file_builds(tiny: Path) -> None:
    config = EngineConfig(endpoint="", replica=0, epoch=0, model=str(tiny), num_blocks=64)
    assert build_device(config).limits.weights_bytes > 0


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, indexed: bool) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(1)}, tmp_path / names[1])
    if indexed:
        index = {"weight_map": {"a": names[1], "b": names[0]}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"{names[0]}.* is missing"):
        open_model(tmp_path, "auto")


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_pickle_with_a_program_is_not_run(tmp_path: Path, old_format: bool, whole: bool) -> None:
    marker, file = tmp_path / "marker", tmp_path / "pytorch_model.bin"
    content = Hostile(marker) if whole else {"a": torch.ones(2), "b": Hostile(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    wanted = "not in the zip format" if old_format else r"nothing of it was run.*system"
    with pytest.raises(ModelError, match=rf"pytorch_model\.bin .*{wanted}"):
        PytorchSource([file])
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file was harmless: the test proves nothing"


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, file)
    data = file.read_bytes()
    for content, named in (
        (b"", "not in the zip format"),
        (pickle.dumps({"a": 1}), "not in the zip format"),
        (data[:-30], "is the download complete"),
        (data[: len(data) // 2], "is the download complete"),
    ):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=rf"pytorch_model\.bin .*{named}"):
            PytorchSource([file])
    torch.save(torch.ones(3), file)
    with pytest.raises(ModelError, match="holds a Tensor, not weights by name"):
        PytorchSource([file])


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    """As in ChatGLM's int4 checkpoints: int8 with a scale beside it."""
    file = tmp_path / "pytorch_model.bin"
    torch.save(
        {"w.weight": torch.ones(4, 2, dtype=torch.int8), "w.weight_scale": torch.ones(4)}, file
    )
    source = PytorchSource([file])
    with pytest.raises(ModelError, match=r"w\.weight is stored as int8.*--quant"):
        source.shape("w.weight")
    assert source.shape("w.weight_scale") == (4,)


def test_views_and_other_content(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"turned": whole.T, "row": whole[1], "epoch": 3, "sparse": whole.to_sparse()}, file)
    source = PytorchSource([file])
    assert torch.equal(source.get("turned", (4, 3)), whole.T)
    assert torch.equal(source.get("row", (4,)), whole[1])
    assert source.shape("epoch") is None
    assert source.shape("sparse") is None


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_one_tensor(tmp_path: Path) -> None:
    size = 36 << 20  # malloc gives blocks of this size back at once
    files = [tmp_path / f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for number, file in enumerate(files):
        torch.save({f"{number}.{i}": torch.ones(size // 4) for i in range(2)}, file)
    before, most = _anonymous_bytes(), 0
    source = PytorchSource(files)
    for number in (0, 1):
        for i in range(2):
            tensor: Tensor = source.get(f"{number}.{i}", (size // 4,))
            most = max(most, _anonymous_bytes() - before)
            assert float(tensor[-1]) == 1.0
    assert most >= size // 2, "the measurement sees no tensor at all"
    assert most < 3 * size


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 2100), value=st.binary(min_size=1, max_size=8), cut=st.integers(0, 300))
def test_any_damage_is_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes, cut: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.bin"
    torch.save({"a": torch.ones(3, 4).half(), "b": torch.ones(5)}, file)
    data = bytearray(file.read_bytes())
    data[place : place + len(value)] = value
    file.write_bytes(data[: len(data) - (cut if cut < 100 else 0)])
    try:
        source = PytorchSource([file])
        shapes = {name: source.shape(name) for name in ("a", "b")}
    except ModelError:
        return
    assert all(shape is None or len(shape) <= 2 for shape in shapes.values())
