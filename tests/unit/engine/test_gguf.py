"""GGUF headers: sound ones are read as the reference library does, hostile ones are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st

from engine.gguf import GgufError, TensorInfo, read_header
from tests.demo_model import demo_model


def write_small(path: Path) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_float32("llama.rope.freq_base", 500.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b€", ""])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    writer.add_tensor("output_norm.weight", np.arange(4, dtype=np.float32))
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    packed = quantize(rows, GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_small(path)
    return path


def test_metadata_and_tensors(small: Path) -> None:
    header = read_header(small)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.rope.freq_base"] == 500.0
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "b€", ""]
    assert header.metadata["tokenizer.ggml.token_type"] == [1, 2, 3]
    embedding = header.tensors["token_embd.weight"]
    assert embedding.shape == (2, 32)
    assert embedding.size == 64
    assert embedding.nbytes == 2 * 34


@pytest.mark.slow
def test_the_demo_model_as_the_reference_library_reads_it() -> None:
    header = read_header(demo_model())
    reader = GGUFReader(demo_model())
    assert {name: tuple(info.shape) for name, info in header.tensors.items()} == {
        tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors
    }
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)


@given(st.data())
def test_any_truncation_is_refused(small: Path, data: st.DataObject) -> None:
    whole = small.read_bytes()
    cut = small.parent / "cut.gguf"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 33))])
    with pytest.raises(GgufError, match=r"cut\.gguf"):
        read_header(cut)


@given(st.data())
def test_no_changed_byte_does_harm(small: Path, data: st.DataObject) -> None:
    """A header with flipped bytes is read or refused; it never crashes or takes much memory."""
    whole = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    changed = small.parent / "changed.gguf"
    changed.write_bytes(whole)
    try:
        header = read_header(changed)
    except GgufError:
        return
    assert all(isinstance(info, TensorInfo) for info in header.tensors.values())
    assert all(info.offset + info.nbytes <= len(whole) for info in header.tensors.values())


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "too short"),
        (b"PK\x03\x04" + bytes(40), "does not begin"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "announced"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(40), "announced"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**62),
            "announced",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<II", 99, 0), "type 99"),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=fault):
        read_header(path)
