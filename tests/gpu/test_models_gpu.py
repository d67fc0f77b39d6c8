"""Every golden ChatGLM model and every kind of quantization on a CUDA device, driven as served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.device.build import Device
from engine.protocol import Sampling, unpack_floats
from tests.generation import Driver, device_of
from tools.tiny_model import TinySpec, write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
# Largest differences of a log-probability: twice what the golden README allows a logit.
TOLERANCES = {"float32": 5e-4, "float16": 0.08, "bfloat16": 0.62}
SCORED = Sampling(temperature=0.0, prompt_logprobs=0)


def device(folder: Path, **options: Any) -> Device:
    rule = "linear" if folder.name == "chatglm2-32k-tiny" else "auto"
    fields = {"device": "cuda:0", "rope_rule": rule, "max_len": 2048, "max_batch": 16}
    return device_of(folder, **{**fields, **options})


def cases(name: str) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """(prompt, greedy continuation, log-probability of each of its tokens) of each prompt case."""
    golden = load_file(GOLDEN / name / "golden.safetensors")
    found = []
    for case in json.loads((GOLDEN / name / "cases.json").read_text())["cases"]:
        at = case["case"]
        if case["kind"] != "prompt" or f"{at}.decode_tokens" not in golden:
            continue
        tokens = golden[f"{at}.decode_tokens"].long()
        scores = golden[f"{at}.decode_logits"].log_softmax(-1)
        chosen = scores.gather(1, tokens[:, None]).flatten()
        found.append((golden[f"{at}.input_ids"].tolist(), tokens.tolist(), chosen))
    assert found
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_ids_in_float32(name: str) -> None:
    driver = Driver(device(GOLDEN / name, dtype="float32"))
    known = cases(name)
    results = driver.run([driver.submit(prompt, len(ids)) for prompt, ids, _ in known])
    assert [result.tokens for result in results] == [ids for _, ids, _ in known]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", FOLDERS)
def test_log_probabilities(name: str, dtype: str) -> None:
    driver = Driver(device(GOLDEN / name, dtype=dtype), step_tokens=64)
    for prompt, ids, wanted in cases(name):
        [result] = driver.run([driver.submit(prompt + ids, 0, SCORED)])
        scores = [
            score for entry in result.prompt_logprobs for score in unpack_floats(entry.chosen)
        ]
        got = torch.tensor(scores[-len(ids) :])
        assert float((got - wanted).abs().max()) < TOLERANCES[dtype]


@pytest.mark.parametrize("quant", ["int8", "bnb-int8", "nf4"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantized(tmp_path: Path, quant: str, tied: bool) -> None:
    """Close to the model as it is (a broken kernel is off by whole units), and smaller."""
    if quant != "int8":
        pytest.importorskip("bitsandbytes")
    spec = TinySpec(hidden=256, heads=8, kv_heads=2, intermediate=512, layers=3, tied=tied)
    folder = write_tiny_model(tmp_path, spec)
    prompt = [16 + value % 256 for value in range(7, 7 * 60, 7)]
    scores = {}
    sizes = {}
    for kind in ("none", quant):
        built = device(folder, quant=kind, dtype="float16")
        driver = Driver(built)
        [result] = driver.run([driver.submit(prompt, 0, SCORED)])
        values = [s for entry in result.prompt_logprobs for s in unpack_floats(entry.chosen)]
        scores[kind], sizes[kind] = torch.tensor(values), built.limits.weights_bytes
    assert sizes[quant] < sizes["none"]
    limit = 1.5 if quant == "nf4" else 0.3
    assert float((scores[quant] - scores["none"]).abs().mean()) < limit


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_load_peak(tmp_path: Path, quant: str) -> None:
    """Quantized layer by layer: what a load takes at most is about what stays."""
    if quant == "nf4":
        pytest.importorskip("bitsandbytes")
    spec = TinySpec(hidden=1024, heads=8, kv_heads=8, intermediate=4096, layers=24)
    folder = write_tiny_model(tmp_path, spec)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    built = device(folder, quant=quant, dtype="float16", kv_bytes=64 << 20, max_len=256)
    peak = torch.cuda.max_memory_allocated() - before
    final = built.limits.weights_bytes + built.limits.kv_bytes
    assert peak < 1.15 * final
