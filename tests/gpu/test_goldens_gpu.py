"""Known answers on a CUDA device: ids, cache hits, and independence of what runs beside."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.device.build import Device
from engine.protocol import Sampling, unpack_floats
from tests.demo_model import demo_model
from tests.generation import Driver, Generated, device_of
from tools.tiny_model import TinySpec, write_tiny_model

DEVICE = "cuda:0"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GOLDEN = Path(__file__).parent.parent / "golden"
SMOLLM2: list[dict[str, Any]] = json.loads((GOLDEN / "smollm2/greedy.json").read_text())["items"]
MAX_NEW = 32
# Below this margin of the first over the second token even float32 may go either way.
FIRM_MARGIN = 0.005
# Differences of a log-probability between two ways to compute it: float32 by the order of sums
# alone, float16 twice what the golden README allows a logit.
TOLERANCES = {"float32": 5e-4, "float16": 0.08}
BATCH = 16


@pytest.fixture(scope="module", params=["float16", "float32"])
def smollm2(request: pytest.FixtureRequest) -> Device:
    options = {"device": DEVICE, "dtype": request.param, "max_len": 512, "max_batch": BATCH}
    return device_of(demo_model(), **options, num_blocks=256)


def num_firm(item: dict[str, Any], dtype: str) -> int:
    """How many ids must be equal: in float16 up to the end token, where all margins are above
    0.0148; in float32 up to the first that is not firm."""
    ids, margins = item["greedy_ids_float32"], item["top1_top2_margin_float32"]
    if dtype == "float16":
        return len(ids) if item["eos_at"] is None else int(item["eos_at"]) + 1
    return next((at for at, margin in enumerate(margins) if margin < FIRM_MARGIN), len(ids))


def assert_golden(results: list[Generated], dtype: str) -> None:
    wrong: list[str] = []
    for item, result in zip(SMOLLM2, results, strict=True):
        ids, margins = item["greedy_ids_float32"], item["top1_top2_margin_float32"]
        assert result.finish is not None
        assert (result.finish.reason, len(result.tokens)) == ("length", MAX_NEW)
        end = num_firm(item, dtype)
        parted = next((at for at in range(end) if result.tokens[at] != ids[at]), None)
        if parted is not None:
            wrong.append(f"{item['prompt_text'][-40:]!r} at {parted}, margin {margins[parted]}")
    assert not wrong, wrong


def prompts(driver: Driver) -> list[Any]:
    return [driver.submit(item["prompt_ids"], MAX_NEW) for item in SMOLLM2]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_smollm2_alone(smollm2: Device, prefix_cache: bool) -> None:
    driver = Driver(smollm2, prefix_cache=prefix_cache)
    assert_golden([driver.run([submit])[0] for submit in prompts(driver)], smollm2.limits.dtype)
    assert (driver.stats.prefix_hit_tokens > 0) == prefix_cache


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("step_tokens", [7, 64, 512])
def test_smollm2_together(smollm2: Device, step_tokens: int, overlap: int) -> None:
    driver = Driver(smollm2, step_tokens=step_tokens, prefix_cache=False)
    assert_golden(driver.run(prompts(driver), overlap), smollm2.limits.dtype)


def test_smollm2_after_preemption(smollm2: Device) -> None:
    longest = max(len(item["prompt_ids"]) for item in SMOLLM2) + MAX_NEW
    tight = -(-longest // smollm2.limits.block_size) + 3
    driver = Driver(smollm2, num_blocks=tight, prefix_cache=False)
    assert_golden(driver.run(prompts(driver), 1), smollm2.limits.dtype)
    assert driver.stats.preemptions > 0


def test_smollm2_captured(smollm2: Device) -> None:
    """The same once all graphs are there."""
    while smollm2.runner.idle():
        pass
    driver = Driver(smollm2)
    assert_golden(driver.run(prompts(driver), 1), smollm2.limits.dtype)
    assert_golden([driver.run([submit], 1)[0] for submit in prompts(driver)], smollm2.limits.dtype)


def formula_weights(folder: Path) -> dict[str, torch.Tensor]:
    """By the rule in tests/golden/README.md."""
    facts = json.loads((folder / "weights.json").read_text())
    scales = {"word_embeddings": 1.0, "bias": 1.0, "output_layer": 0.5, "key_value.weight": 0.375}
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in facts["shapes"].items():
        source = np.random.RandomState(zlib.crc32(f"{name}#{facts['salt']}".encode()))
        if "layernorm" in name:
            values = 1 + source.randint(-256, 257, shape) / 512
        else:
            scale = next((scale for part, scale in scales.items() if part in name), 0.25)
            values = source.randint(-1024, 1025, shape) / 1024 * scale
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    return tensors


def test_real_vocabulary_of_chatglm2(tmp_path: Path) -> None:
    """65,024 rows of logits, greedy; the other golden ChatGLMs are in test_models_gpu.py."""
    golden = GOLDEN / "chatglm2-realvocab"
    (tmp_path / "config.json").write_bytes((golden / "config.json").read_bytes())
    save_file(formula_weights(golden), tmp_path / "model.safetensors")
    rows = [json.loads(line) for line in (golden / "greedy.jsonl").read_text().splitlines()]
    served = device_of(tmp_path, device=DEVICE, dtype="float32", max_len=1024, max_batch=BATCH)
    driver = Driver(served)
    known = [row["greedy_ids"] for row in rows]
    submits = [driver.submit(row["prompt_ids"], len(row["greedy_ids"])) for row in rows]
    assert [result.tokens for result in driver.run(submits, 1)] == known


def test_weights_in_shards_of_pytorch() -> None:
    """chatglm2-tiny-bin holds the weights of chatglm2-tiny, in float16."""
    prompt = [64 + 3 * i % 90 for i in range(40)]
    tokens: list[list[int]] = []
    for name in ("chatglm2-tiny", "chatglm2-tiny-bin"):
        options = {"device": DEVICE, "dtype": "float32", "max_len": 256, "max_batch": 2}
        driver = Driver(device_of(GOLDEN / name, **options))
        tokens.append(driver.run([driver.submit(prompt, 24)])[0].tokens)
    assert tokens[0] == tokens[1]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many query heads to a key head as matter to kernels, and a head of 64."""
    spec = TinySpec(layers=3, hidden=512, heads=8, kv_heads=2, intermediate=768)
    return write_tiny_model(tmp_path_factory.mktemp("wide"), spec)


def texts(count: int, shortest: int = 1) -> list[list[int]]:
    """Prompts of many lengths, no two of which begin alike."""
    return [
        [16 + (31 * n + 7 * i * (n + 3)) % 256 for i in range(shortest + 13 * n % 190)]
        for n in range(count)
    ]


def scores_of(result: Generated) -> torch.Tensor:
    """Log-probabilities of the prompt after its first token, then of what was generated."""
    entries = [*result.prompt_logprobs, *result.logprobs]
    return torch.tensor([score for entry in entries for score in unpack_floats(entry.chosen)])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("step_tokens", [48, 2048])
def test_log_probabilities_do_not_depend_on_company(
    wide_model: Path, dtype: str, step_tokens: int
) -> None:
    """Of the same sequences, alone against in a batch of 16; the answers are given, so that none
    can part from its twin."""
    scored = Sampling(temperature=0.0, prompt_logprobs=0)
    served = device_of(wide_model, device=DEVICE, dtype=dtype, max_len=512, max_batch=BATCH)
    alone = Driver(served, prefix_cache=False)
    crowd = Driver(served, step_tokens=step_tokens, prefix_cache=False)
    given = texts(BATCH, 2)
    single = [alone.run([alone.submit(text, 0, scored)])[0] for text in given]
    together = crowd.run([crowd.submit(text, 0, scored) for text in given], 1)
    for one, other, text in zip(single, together, given, strict=True):
        assert len(scores_of(one)) == len(text) - 1
        assert float((scores_of(one) - scores_of(other)).abs().max()) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_decode_does_not_depend_on_company(wide_model: Path, dtype: str) -> None:
    """Log-probabilities of decode steps, alone against among 15 others, as far as ids agree."""
    told = Sampling(temperature=0.0, logprobs=2)
    served = device_of(wide_model, device=DEVICE, dtype=dtype, max_len=512, max_batch=BATCH)
    alone = Driver(served, prefix_cache=False)
    crowd = Driver(served, prefix_cache=False)
    given = texts(BATCH)
    single = [alone.run([alone.submit(text, 24, told)])[0] for text in given]
    together = crowd.run([crowd.submit(text, 24, told) for text in given], 1)
    for one, other in zip(single, together, strict=True):
        pairs = zip(one.tokens, other.tokens, strict=True)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(one.tokens))
        if same < len(one.tokens):
            first, second = unpack_floats(one.logprobs[same].top)
            assert first - second < 2 * TOLERANCES[dtype], "parted although it was no tie"
        difference = scores_of(one)[:same] - scores_of(other)[:same]
        assert float(difference.abs().max()) < TOLERANCES[dtype], "or parted at once"


@pytest.mark.parametrize("length", [1, 31, 32, 33, 95, 200])
def test_hits_equal_misses(wide_model: Path, length: int) -> None:
    """Of a whole prompt, and of its beginning with another end, in float32."""
    told = Sampling(temperature=0.0, logprobs=0)
    served = device_of(wide_model, device=DEVICE, dtype="float32", max_len=512, max_batch=BATCH)
    first = texts(9)[8]
    common = (first * (length // len(first) + 1))[:length]
    others = [[*common, *more] for more in ([], [40], [41, 42, 43], list(range(50, 120)))]
    # First all misses: two drivers of one device overwrite each other's blocks.
    fresh = Driver(served, prefix_cache=False)
    known = fresh.run([fresh.submit(text, 12, told) for text in others], 1)
    cached = Driver(served)
    cached.run([cached.submit(common, 4)])
    for overlap in (0, 1):
        found = cached.run([cached.submit(text, 12, told) for text in others], overlap)
        assert [result.tokens for result in found] == [result.tokens for result in known]
        for result, twin in zip(found, known, strict=True):
            assert result.cached >= (length - 1) // 32 * 32
            assert float((scores_of(result) - scores_of(twin)).abs().max()) < TOLERANCES["float32"]
