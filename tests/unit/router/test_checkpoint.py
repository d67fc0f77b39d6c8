from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.gguf import TENSOR_TYPES
from router.checkpoint.facts import facts_of_config, read_checkpoint, read_config
from router.checkpoint.gguf import read_gguf
from router.checkpoint.safetensors import read_safetensors, weight_files
from router.errors import EXIT_CONFIG, StartError
from tests.demo_model import demo_model
from tests.model_files import entry, write_gguf, write_safetensors


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


def test_gguf_header(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    header = read_gguf(file)
    assert header.metadata["llama.context_length"] == 128
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ab"]
    assert header.metadata["scores"] == [0.5, 1.5]
    assert header.metadata["flag"] is True
    assert [tensor.shape for tensor in header.tensors] == [(32, 3), (32, 4)]
    assert "tokenizer.ggml.tokens" not in read_gguf(file, texts=False).metadata


def test_gguf_agrees_with_the_gguf_package() -> None:
    ours = {tensor.name: tensor for tensor in read_gguf(demo_model(), texts=False).tensors}
    theirs = gguf.GGUFReader(demo_model()).tensors
    assert len(ours) == len(theirs)
    for tensor in theirs:
        mine = ours[tensor.name]
        assert mine.shape == tuple(int(size) for size in tensor.shape)
        assert (mine.offset, mine.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert mine.type_name == tensor.tensor_type.name


def test_gguf_type_table() -> None:
    for number, (name, values, size) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (values, size))


HUGE = struct.pack("<Q", 1 << 60)

# what is wrong -> (a text in the file, bytes from its start to the place, what to write there)
DAMAGES = {
    "magic": (b"GGUF", 0, b"GGML"),
    "version": (b"GGUF", 4, struct.pack("<I", 1)),
    "big-endian": (b"GGUF", 4, struct.pack(">I", 3)),
    "tensor count": (b"GGUF", 8, HUGE),
    "field count": (b"GGUF", 16, HUGE),
    "key length": (b"llama.block_count", -8, HUGE),
    "value type": (b"llama.block_count", 17, struct.pack("<I", 99)),
    "array count": (b"scores", 6 + 8, HUGE),
    "text count": (b"ggml.tokens", 11 + 8, HUGE),
    "tensor size": (b"blk.0.weight", 12 + 4, HUGE),
    "tensor type": (b"blk.0.weight", 12 + 4 + 16, struct.pack("<I", 99)),
    "overlap": (b"blk.0.weight", 12 + 4 + 16 + 4, struct.pack("<Q", 32)),
    "unaligned": (b"blk.0.weight", 12 + 4 + 16 + 4, struct.pack("<Q", 1 << 30 | 1)),
    "beyond the end": (b"blk.0.weight", 12 + 4 + 16 + 4, struct.pack("<Q", 1 << 30)),
}


@pytest.mark.parametrize("what", [*DAMAGES, "cut data", "cut header", "empty"])
@pytest.mark.parametrize("texts", [True, False])
def test_hostile_gguf(tmp_path: Path, small_gguf: bytes, what: str, texts: bool) -> None:
    file = tmp_path / "bad.gguf"
    data = bytearray(small_gguf)
    if what in DAMAGES:
        text, distance, new = DAMAGES[what]
        at = data.index(text) + distance
        data[at : at + len(new)] = new
    else:
        del data[{"cut data": -32, "cut header": 60, "empty": 0}[what] :]
    file.write_bytes(data)
    with pytest.raises(StartError, match=r"bad\.gguf") as caught:
        read_gguf(file, texts=texts)
    assert caught.value.code == EXIT_CONFIG


@given(cut=st.integers(0, 2000), place=st.integers(0, 2000), value=st.binary(max_size=8))
def test_any_damage_to_gguf_is_one_kind_of_error(
    small_gguf: bytes, tmp_path_factory: pytest.TempPathFactory, cut: int, place: int, value: bytes
) -> None:
    data = bytearray(small_gguf[: len(small_gguf) - cut])
    data[place : place + len(value)] = value
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(data)
    try:
        header = read_gguf(file)
    except StartError:
        return
    assert all(tensor.offset + tensor.num_bytes <= len(data) for tensor in header.tensors)


def test_safetensors_header(tmp_path: Path) -> None:
    file = write_safetensors(
        tmp_path / "model.safetensors",
        {
            "__metadata__": {"format": "pt"},
            "b": entry("F16", [2, 3], 8, 20),
            "a": entry("F32", [2], 0, 8),
            "none": entry("F32", [0], 20, 20),
        },
        bytes(20),
    )
    tensors = {tensor.name: tensor for tensor in read_safetensors(file)}
    assert (tensors["b"].num_values, tensors["b"].num_bytes) == (6, 12)
    assert weight_files(tmp_path) == (file,)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 8),
        lambda path: write_safetensors(path, {}, length=10_000),
        lambda path: write_safetensors(path, b"[" * 5000),
        lambda path: write_safetensors(path, b"\xff\xff"),
        lambda path: write_safetensors(path, {"a": 3}),
        lambda path: write_safetensors(path, {"a": entry("F32", [2], 0, 8)}),
        lambda path: write_safetensors(path, {"a": entry("F32", [2], 0, 8)}, bytes(9)),
        lambda path: write_safetensors(path, {"a": entry("F32", [3], 0, 8)}, bytes(8)),
        lambda path: write_safetensors(path, {"a": entry("F99", [2], 0, 8)}, bytes(8)),
        lambda path: write_safetensors(path, {"a": entry("F32", [-2], 0, 8)}, bytes(8)),
        lambda path: write_safetensors(path, {"a": entry("F32", [2], 8, 0)}, bytes(8)),
        lambda path: write_safetensors(path, {"a": entry("F32", [1 << 62, 4], 0, 8)}, bytes(8)),
        lambda path: write_safetensors(
            path, {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)
        ),
        lambda path: write_safetensors(path, {"a": entry("F32", [1], 4, 8)}, bytes(8)),
    ],
)
def test_hostile_safetensors(tmp_path: Path, write: Callable[[Path], object]) -> None:
    file = tmp_path / "bad.safetensors"
    write(file)
    with pytest.raises(StartError, match=r"bad\.safetensors") as caught:
        read_safetensors(file)
    assert caught.value.code == EXIT_CONFIG


def test_shards_come_from_the_index(tmp_path: Path) -> None:
    for number in (1, 2):
        write_safetensors(
            tmp_path / f"part-{number}.safetensors", {"a": entry("F32", [1], 0, 4)}, bytes(4)
        )
    index = tmp_path / "model.safetensors.index.json"
    weights = {"x": "part-2.safetensors", "y": "part-1.safetensors", "z": "part-1.safetensors"}
    index.write_text(json.dumps({"weight_map": weights}), encoding="utf-8")
    assert [file.name for file in weight_files(tmp_path)] == sorted(set(weights.values()))


@given(cut=st.integers(0, 300), place=st.integers(0, 300), value=st.binary(max_size=8))
def test_any_damage_to_safetensors_is_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, place: int, value: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    header = {"b": entry("F16", [2, 3], 8, 20), "a": entry("F32", [2], 0, 8)}
    data = bytearray(write_safetensors(file, header, bytes(20)).read_bytes())
    del data[len(data) - min(cut, len(data)) :]
    data[place : place + len(value)] = value
    file.write_bytes(data)
    try:
        tensors = read_safetensors(file)
    except StartError:
        return
    assert sum(tensor.num_bytes for tensor in tensors) < len(data)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "missing.safetensors", ""])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}), encoding="utf-8")
    with pytest.raises(StartError, match=r"index\.json"):
        weight_files(tmp_path)


def test_facts_of_the_demo_model() -> None:
    checkpoint = read_checkpoint(demo_model())
    facts = checkpoint.facts
    assert checkpoint.num_parameters == 134_515_008
    assert facts.num_parameters == 134_515_008
    assert (facts.context_length, facts.vocab_size, facts.tied) == (8192, 49152, True)
    assert facts.kv_values_per_token == 2 * 30 * 3 * 64


def test_facts_of_chatglm2() -> None:
    # the names differ, and kv_channels is not hidden_size / heads in general
    facts = facts_of_config(
        {
            "architectures": ["ChatGLMModel"],
            "num_layers": 28,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 128,
            "ffn_hidden_size": 13696,
            "padded_vocab_size": 65024,
            "seq_length": 32768,
            "torch_dtype": "float16",
        }
    )
    assert facts.kv_values_per_token * 2 == 28 * 1024
    assert facts.context_length == 32768
    # 6,243,584,000 with biases, which an estimate leaves out
    assert facts.num_parameters == pytest.approx(6_243_584_000, rel=1e-3)


def test_facts_of_older_and_nested_configs() -> None:
    gpt2 = facts_of_config({"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 1024})
    assert (gpt2.num_kv_heads, gpt2.head_dim, gpt2.context_length) == (4, 16, 1024)
    nested = facts_of_config({"model_type": "x", "text_config": {"num_hidden_layers": 3}})
    assert nested.num_layers == 3
    assert facts_of_config({}).kv_values_per_token == 0
    no_groups = {"num_attention_heads": 4, "multi_query_attention": False}
    assert facts_of_config({**no_groups, "multi_query_group_num": 2}).num_kv_heads == 4


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a":' * 5000])
def test_unreadable_configs(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(StartError, match="missing"):
        read_config(file)
    file.write_bytes(content)
    with pytest.raises(StartError, match=r"config\.json"):
        read_config(file)
