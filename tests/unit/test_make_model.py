"""The folders of tools/make_model.py: as checkpoints come, whole, the same every time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from engine.models.registry import read_spec, shape_of
from engine.protocol import Sampling, unpack_floats
from router.checkpoint.facts import read_checkpoint
from router.text.model import load_text
from router.text.pooling import load_pooling
from tests.decoding import HeldTensors, decoder_logits
from tests.generation import Driver, device_of
from tools import make_model as tool
from tools.make_families import FAMILIES, config_json
from tools.make_model import make_model, make_shape
from tools.make_shapes import SHAPES
from tools.make_weights import weights

NATIVE = [name for name, family in FAMILIES.items() if family.architecture != "ChatGLMModel"]
DECODERS = [name for name in FAMILIES if name != "bert"]
TEXTS = (
    "Hello!  Two spaces, \ttab\n\nlines.",
    "你好，世界 👋 naïve Ångström",
    " leading",
    "def f(x):\n    return x  # 100%",
    "<|user|> [gMASK] sop </s> are words here",
)
# Parameters as their makers give them, in billions.
BILLIONS = {
    "chatglm2-6b": 6.2436,
    "chatglm2-6b-32k": 6.2436,
    "chatglm3-6b": 6.2436,
    "chatglm3-6b-32k": 6.2436,
    "glm-4-9b": 9.400,
    "glm-4-9b-0414": 9.400,
    "vicuna-7b": 6.738,
    "vicuna-13b": 13.016,
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.016,
    "llama-3-8b": 8.030,
    "llama-3.1-8b": 8.030,
    "llama-3.2-1b": 1.236,
    "mistral-7b": 7.248,
    "mixtral-8x7b": 46.703,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-7b": 7.616,
    "qwen3-0.6b": 0.596,
    "qwen3-8b": 8.191,
    "qwen3-30b-a3b": 30.532,
    "phi-3-mini": 3.821,
    "gemma-7b": 8.538,
    "gemma-2-2b": 2.614,
    "gemma-2-9b": 9.242,
    "gemma-3-1b": 1.000,
    "smollm2-135m": 0.1345,
    "smollm3-3b": 3.075,
    "seed-oss-36b": 36.151,
    "granite-3-2b": 2.534,
    "olmo-2-7b": 7.299,
    "minilm-l6": 0.02271,
    "bge-small-en": 0.03336,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name) for name in FAMILIES}


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_arguments_same_bytes(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    first, again = files(folders[family]), files(make_model(tmp_path / "again", family))
    other = files(make_model(tmp_path / "other", family, seed=1))
    assert again == first
    assert [name for name in first if other[name] != first[name]] == ["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("family", NATIVE)
@torch.inference_mode()
def test_transformers_takes_all_weights_and_computes_the_same(
    folders: dict[str, Path], family: str
) -> None:
    """No weight missing, none left over: the names and keys are those of true checkpoints."""
    kind = AutoModel if family == "bert" else AutoModelForCausalLM
    model, loading = kind.from_pretrained(
        folders[family], dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    if family == "bert":
        return
    prompts = [[20 + 7 * i % 250 for i in range(length)] for length in (60, 3)]
    config = json.loads((folders[family] / "config.json").read_text())
    source = HeldTensors(load_file(folders[family] / "model.safetensors"))
    ours = decoder_logits(read_spec(config), config, source, prompts)
    for prompt, logits in zip(prompts, ours, strict=True):
        theirs = model(torch.tensor([prompt])).logits[0]
        assert float((logits - theirs).abs().max()) < 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_choices_are_firm_and_vary(folders: dict[str, Path], family: str) -> None:
    driver = Driver(device_of(folders[family], max_len=256, max_batch=4))
    scored = Sampling(temperature=0.0, logprobs=2)
    prompts = [[20 + 11 * i % 250 for i in range(length)] for length in (5, 40, 90)]
    results = driver.run([driver.submit(prompt, 24, scored) for prompt in prompts])
    best = [unpack_floats(entry.top) for result in results for entry in result.logprobs]
    assert min(first - second for first, second in best) > 1e-4
    assert len({token for result in results for token in result.tokens}) > 12
    assert len({tuple(result.tokens[-8:]) for result in results}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer(folders: dict[str, Path], family: str) -> None:
    text = load_text(folders[family])
    tokenizer, facts = text.tokenizer, read_checkpoint(folders[family]).facts
    unused_rows = facts.vocab_size - tokenizer.vocab_size
    assert (0 < unused_rows < 64) if family not in NATIVE else unused_rows == 0
    assert (text.template is None) == (family == "bert")
    assert bool(tokenizer.eos_ids) == (family != "bert")
    for sample in TEXTS:
        ids = tokenizer.encode(sample, add_special=False, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(ids) or family == "bert"
        if family != "bert":
            assert tokenizer.decode(ids) == sample


def test_glm_prompts_begin_with_their_control_tokens(folders: dict[str, Path]) -> None:
    """Whose ids follow the number of pieces, as in the released ones."""
    for family, names in (
        ("chatglm2", ["[gMASK]", "sop"]),
        ("chatglm3", ["[gMASK]", "sop"]),
        ("glm4-9b", ["[gMASK]", "<sop>"]),
    ):
        tokenizer = load_text(folders[family]).tokenizer
        ids = tokenizer.encode("Hi", add_special=True, parse_special=False)
        assert [tokenizer.token_text(token) for token in ids[:2]] == names
    assert load_text(folders["chatglm2"]).tokenizer.eos_ids == (2,)
    assert load_text(folders["chatglm3"]).tokenizer.eos_ids == (2, 384 + 6, 384 + 8)
    assert set(load_text(folders["glm4-9b"]).tokenizer.eos_ids) == {320, 327, 329}


def test_encoder_says_how_it_pools(folders: dict[str, Path]) -> None:
    rule = load_pooling(folders["bert"])
    assert (rule.kind, rule.max_len) == ("mean", 256)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_the_rounded_model(tmp_path: Path, dtype: str) -> None:
    half = load_file(make_model(tmp_path / "half", "llama", dtype=dtype) / "model.safetensors")
    whole = load_file(make_model(tmp_path / "whole", "llama") / "model.safetensors")
    for name, weight in whole.items():
        assert torch.equal(half[name], weight.to(getattr(torch, dtype)))
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["torch_dtype"] == dtype


def test_sizes(tmp_path: Path) -> None:
    made = make_model(tmp_path, "qwen3", layers=1, heads=6, kv_heads=3, head_dim=8, vocab=1000)
    facts = read_checkpoint(made).facts
    assert (facts.num_layers, facts.num_heads, facts.num_kv_heads, facts.head_dim) == (1, 6, 3, 8)
    assert facts.vocab_size == load_text(made).tokenizer.vocab_size == 1000


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_parameters(name: str) -> None:
    shape = SHAPES[name]
    kind = FAMILIES[shape.family]
    config = config_json(kind, shape.sizes, shape.changes, {})
    found = sum(math.prod(weight.shape) for weight in weights(kind, config))
    assert found / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)


@pytest.mark.parametrize(
    ("name", "rows", "pieces"),
    [
        ("chatglm2-6b", 65024, 64794),
        ("chatglm3-6b", 65024, 64798),
        ("glm-4-9b", 151552, 151343),
        ("vicuna-7b", 32000, 32000),
        ("qwen2.5-0.5b", 151936, 151936),
        ("minilm-l6", 30522, 30522),
    ],
)
def test_tokenizers_of_shapes_fill_the_vocabulary(
    tmp_path: Path, name: str, rows: int, pieces: int
) -> None:
    folder = make_shape(tmp_path, name)
    assert not list(folder.glob("*.safetensors"))
    text = load_text(folder)
    assert read_checkpoint(folder).facts.vocab_size == rows
    assert text.tokenizer.vocab_size == pieces
    if text.template is not None:
        assert text.tokenizer.decode(range(5000, 5020))  # a random model writes words
        for sample in TEXTS:
            ids = text.tokenizer.encode(sample, add_special=False, parse_special=False)
            assert text.tokenizer.decode(ids) == sample


@pytest.mark.slow
def test_a_shape_is_served_with_made_up_weights(tmp_path: Path) -> None:
    folder = make_shape(tmp_path, "smollm2-135m")
    device = device_of(folder, load_format="dummy", max_len=64, max_batch=2, kv_bytes=1 << 26)
    assert device.limits.vocab_size == 49152
    config = json.loads((folder / "config.json").read_text())
    assert shape_of(read_spec(config)).kv_bytes_per_token(4) == 2 * 30 * 3 * 64 * 4
    driver = Driver(device)
    [result] = driver.run([driver.submit([100, 200, 300], 4)])
    assert len(result.tokens) == 4


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tool.__file__, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    done = run(tmp_path / "m", "--family", "chatglm2")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'm'}\n")
    assert files(tmp_path / "m") == files(folders["chatglm2"])
    listed = run("--list").stdout.splitlines()
    assert [set(line.split()[1:]) for line in listed] == [set(FAMILIES), set(SHAPES)]
    assert run(tmp_path / "n", "--family", "llama", "--shape", "phi-3-mini").returncode == 2
    assert run("--family", "llama").returncode == 2


def test_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tools.make_model import make_model;"
        f"[make_model(Path({str(tmp_path)!r}) / n, n) for n in ('mixtral', 'chatglm2', 'bert')];"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(tool.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
