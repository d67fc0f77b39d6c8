from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.gguf import TENSOR_TYPES
from router.checkpoint.facts import facts_of_config, read_checkpoint, read_config
from router.checkpoint.files import weight_files
from router.checkpoint.gguf import read_gguf
from router.checkpoint.pytorch import read_pytorch
from router.checkpoint.safetensors import read_safetensors
from router.errors import EXIT_CONFIG, StartError
from tests.demo_model import demo_model
from tests.model_files import entry, write_gguf, write_safetensors

GOLDEN = Path(__file__).parents[2] / "golden"


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
def test_s10_hostile_safetensors(tmp_path: Path, write: Callable[[Path], object]) -> None:
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


def write_bin(path: Path, parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(f"archive/{name}", data)
    return path


class _Storage:
    """Pickled as torch pickles a tensor's values: a persistent id with type, key and count."""

    def __init__(self, dtype: str, key: int, count: int) -> None:
        self.id = ("storage", _Type(f"{dtype}Storage"), str(key), "cpu", count)


class _Type(str):
    def __reduce__(self) -> str:
        return str(self)


def table_of(*storages: tuple[str, int]) -> bytes:
    """data.pkl of a state dict with these storages, as written by torch.save."""

    class Pickler(pickle._Pickler):  # the one in Python can be taught names of absent modules
        def persistent_id(self, obj: object) -> object:
            return obj.id if isinstance(obj, _Storage) else None

        def save_global(self, obj: object, name: str | None = None) -> None:
            self.write(pickle.GLOBAL + f"torch\n{name}\n".encode())
            self.memoize(obj)

    buffer = io.BytesIO()
    tensors = {f"t{i}": _Storage(kind, i, count) for i, (kind, count) in enumerate(storages)}
    Pickler(buffer, 2).dump(tensors)
    return buffer.getvalue()


def test_pytorch_files_of_the_golden_data() -> None:
    folder = GOLDEN / "chatglm2-tiny-bin"
    found = read_checkpoint(folder)
    files = weight_files(folder)
    assert [file.name for file in files] == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    ]
    # the same weights, but for the 8 angles that are float32 there
    other = read_checkpoint(GOLDEN / "chatglm2-tiny")
    assert (found.num_parameters, found.facts.dtype) == (other.num_parameters, "float16")
    assert found.file_bytes == 2 * found.num_parameters
    assert other.file_bytes == 4 * other.num_parameters


def test_the_type_of_pytorch_files_is_that_of_most_bytes(tmp_path: Path) -> None:
    for storages, dtype, size in (
        ((("Half", 90), ("Float", 10), ("Half", 5)), "float16", 2),
        ((("BFloat16", 30), ("Float", 10), ("BFloat16", 1)), "bfloat16", 2),
        ((("Half", 10), ("Float", 30)), "float32", 4),
        ((("Char", 90), ("Float", 10)), "int8", 1),
    ):
        data = {"data.pkl": table_of(*storages), "data/0": bytes(400)}
        found = read_pytorch(write_bin(tmp_path / "pytorch_model.bin", data))
        assert (found.dtype, found.num_bytes, found.num_values) == (dtype, 400, 400 // size)


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda path: path.write_bytes(b""), "zip format"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "zip format that torch"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "cut short"),
        (lambda path: write_bin(path, {"data/0": b"1234"}), "no data.pkl"),
        (lambda path: write_bin(path, {"data.pkl": b"junk", "data/0": b"1234"}), "not enough data"),
        (lambda path: write_bin(path, {"data.pkl": pickle.dumps({}, 2)}), "names no weights"),
        (
            lambda path: write_bin(path, {"data.pkl": bytes(9 << 20)}),
            r"its data.pkl has 9,437,184 bytes",
        ),
        (
            lambda path: write_bin(path, {"data.pkl": bytes(9 << 20)}, zipfile.ZIP_DEFLATED),
            "is compressed",
        ),
    ],
)
def test_hostile_pytorch_files(tmp_path: Path, write: Callable[[Path], object], named: str) -> None:
    file = tmp_path / "pytorch_model.bin"
    write(file)
    with pytest.raises(StartError, match=rf"pytorch_model\.bin is no usable .*{named}") as caught:
        read_pytorch(file)
    assert caught.value.code == EXIT_CONFIG


@given(cut=st.integers(0, 200), place=st.integers(0, 900), value=st.binary(max_size=8))
def test_any_damage_to_pytorch_files_is_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, place: int, value: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.bin"
    parts = {"data.pkl": table_of(("Half", 90), ("Float", 10)), "data/0": bytes(220)}
    data = bytearray(write_bin(file, parts).read_bytes())
    del data[len(data) - (cut if cut < 100 else 0) :]
    data[place : place + len(value)] = value
    file.write_bytes(data)
    try:
        found = read_pytorch(file)
    except StartError:
        return
    assert found.num_bytes <= len(data)


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_index_is_used_or_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"a": ' + content)
    with pytest.raises(StartError, match=r"index\.json is not usable"):
        weight_files(folder)


def test_which_files_are_weights(tmp_path: Path) -> None:
    for name in ("training_args.bin", "adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"")
    assert weight_files(tmp_path) == ()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path)] == ["pytorch_model.bin"]
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(StartError, match=r"model-00002-of-00002\.safetensors is missing"):
        weight_files(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert len(weight_files(tmp_path)) == 2
    (tmp_path / "model-00001-of-99999.safetensors").write_bytes(b"")
    with pytest.raises(StartError, match=r"model-00002-of-99999\.safetensors is missing"):
        weight_files(tmp_path)


def test_the_stored_type_by_all_its_names(tmp_path: Path) -> None:
    for config, dtype in (
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": "bfloat16", "text_config": {"hidden_size": 1}}, "bfloat16"),
        ({"torch_dtype": "bfloat16", "text_config": {"dtype": "float32"}}, "float32"),
        ({"torch_dtype": "bfloat16", "text_config": {"torch_dtype": None}}, "bfloat16"),
        ({"torch_dtype": None}, ""),
        ({"torch_dtype": 3}, ""),
    ):
        assert facts_of_config(config).dtype == dtype
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    header = {"b": entry("BF16", [6], 4, 16), "a": entry("F32", [1], 0, 4)}
    write_safetensors(tmp_path / "model.safetensors", header, bytes(16))
    assert read_checkpoint(tmp_path).facts.dtype == "bfloat16"
    assert read_checkpoint(write_gguf(tmp_path / "m.gguf")).facts.dtype == "float32"


def test_encoders_have_no_kv_cache() -> None:
    bert = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "max_position_embeddings": 512,
        "vocab_size": 30522,
    }
    facts = facts_of_config(bert)
    assert (facts.kv_values_per_token, facts.context_length, facts.encoder) == (0, 512, True)
    # all-MiniLM-L6-v2, whose positions, biases and pooler are left out here
    assert facts.num_parameters == pytest.approx(22_713_216, rel=0.02)
    roberta = {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"}
    facts = facts_of_config({**roberta, "max_position_embeddings": 8194, "pad_token_id": 1})
    assert (facts.context_length, facts.encoder) == (8192, True)
    assert facts_of_config({**bert, "is_decoder": True}).kv_values_per_token > 0


def test_experts_count() -> None:
    mixtral = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "vocab_size": 32000,
    }
    assert facts_of_config(mixtral).num_parameters == 46_702_792_704  # as published
    qwen = {**mixtral, "num_local_experts": 0, "num_experts": 128, "moe_intermediate_size": 768}
    assert facts_of_config(qwen).expert_ffn_size == 768
