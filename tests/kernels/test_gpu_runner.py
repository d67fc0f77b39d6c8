"""The GPU's runner and kernels, whole: a tiny model served as on a card, against the CPU's runner.

On a machine without a card the kernels are interpreted; graphs are captured on a card only.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from engine.device.build import Device
from engine.device.kv import KvCache
from engine.device.weights import open_model
from engine.models.registry import Target, build_decoder, read_spec, shape_of, weight_names_of
from engine.protocol import Sampling
from engine.quant.base import DenseLinear
from tests.generation import GREEDY, Driver, Generated, device_of
from tools.tiny_model import TinySpec, write_tiny_model

pytest.importorskip("triton")

from engine.attention.paged_prefill import prefill_tile
from engine.device.gpu_batch import GpuBatch
from engine.device.gpu_runner import GpuRunner, RunnerSettings
from engine.kernels.fused import TritonKernels

pytestmark = pytest.mark.slow  # interpreted, where there is no card

BLOCKS, BLOCK, MAX_LEN, MAX_BATCH = 48, 8, 128, 6
PROMPTS = [
    [20 + (7 * i + n) % 200 for i in range(length)] for n, length in enumerate([5, 1, 21, 9])
]
SEEDED = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=11, logprobs=2)
PENALIZED = Sampling(
    temperature=0.0, frequency_penalty=0.8, repetition_penalty=1.3, logit_bias=((30, 2.0),)
)


def gpu_device(folder: Path, device: torch.device) -> Device:
    """What `build_device` makes on a card, on any device."""
    if device.type == "cuda":
        options = {"device": "cuda:0", "dtype": "float32", "max_len": MAX_LEN, "block_size": BLOCK}
        return device_of(folder, max_batch=MAX_BATCH, num_blocks=BLOCKS, **options)
    reference = cpu_device(folder)
    config, source = open_model(folder, "auto", device)
    spec, dtype = read_spec(config), torch.float32
    target = Target(device, dtype, DenseLinear, MAX_LEN, None, TritonKernels())
    model = build_decoder(spec, weight_names_of(config), source, target)
    tile = prefill_tile(spec.head_dim, dtype, (9, 0))
    settings = RunnerSettings(
        device=device,
        multiprocessors=4,
        max_batch=MAX_BATCH,
        max_len=MAX_LEN,
        block_size=BLOCK,
        pad_kv_slot=BLOCKS * BLOCK,
        long_tile=tile,
        text_ids=0,
        graphs=False,
    )
    cache = KvCache(shape_of(spec), BLOCKS + 1, BLOCK, dtype, device)
    batch = GpuBatch(MAX_BATCH, MAX_LEN, 64, BLOCK, tile, device)
    runner = GpuRunner(model, shape_of(spec), cache, batch, settings)
    return Device(runner, reference.limits)


def cpu_device(folder: Path) -> Device:
    return device_of(
        folder, max_len=MAX_LEN, block_size=BLOCK, max_batch=MAX_BATCH, num_blocks=BLOCKS
    )


def run(device: Device, overlap: int, sampling: Sampling) -> list[Generated]:
    new = 6 if torch.cuda.is_available() else 4  # a token takes a second, interpreted
    driver = Driver(device, step_tokens=16)
    return driver.run(
        [
            driver.submit(prompt, new, msgspec.structs.replace(sampling, seed=sampling.seed + i))
            for i, prompt in enumerate(PROMPTS)
        ],
        overlap,
    )


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALIZED], ids=["greedy", "seeded", "edits"])
def test_equals_the_cpu(tmp_path: Path, device: torch.device, sampling: Sampling) -> None:
    folder = write_tiny_model(tmp_path, TinySpec())
    wanted = run(cpu_device(folder), 0, sampling)
    served = gpu_device(folder, device)
    while device.type == "cuda" and served.runner.idle():
        pass
    for overlap in (0, 1):
        got = run(served, overlap, sampling)
        assert [result.tokens for result in got] == [result.tokens for result in wanted]
        assert [len(result.logprobs) for result in got] == [len(w.logprobs) for w in wanted]


def test_prompt_logprobs_and_prefix_hits(tmp_path: Path, device: torch.device) -> None:
    folder = write_tiny_model(tmp_path, TinySpec())
    scored = Sampling(temperature=0.0, prompt_logprobs=1)
    driver = Driver(gpu_device(folder, device), step_tokens=16)
    wanted = Driver(cpu_device(folder), step_tokens=16)
    prompt = PROMPTS[2]
    [told] = driver.run([driver.submit(prompt, 4, scored)])
    [known] = wanted.run([wanted.submit(prompt, 4, scored)])
    assert told.tokens == known.tokens
    assert [entry.chosen[:8] for entry in told.prompt_logprobs] != []
    [again] = driver.run([driver.submit([*prompt, 33], 4)])
    [fresh] = wanted.run([wanted.submit([*prompt, 33], 4)])
    assert again.cached >= 16
    assert again.tokens == fresh.tokens
