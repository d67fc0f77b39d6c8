"""The mask kernel, and the GPU's runner with grammars, against plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.device.sampling import mask_logits
from engine.protocol import Sampling
from tests.generation import Driver, Generated, device_of
from tests.grammars import DIGITS, PEOPLE, byte_vocabulary, json_grammar
from tests.kernels.test_gpu_runner import BLOCK, BLOCKS, MAX_BATCH, MAX_LEN, gpu_device
from tools.tiny_model import EOS_ID, TinySpec, decode_tokens, encode_text, write_tiny_model

pytest.importorskip("triton")

from engine.device.gpu_batch import upload_masks
from engine.kernels.masks import mask_rows

pytestmark = pytest.mark.slow  # interpreted, where there is no card


@pytest.mark.parametrize("vocab", [31, 5000])
def test_equals_torch(device: torch.device, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator)
    words = (vocab + 1 + 31) // 32
    bits = np.random.default_rng(vocab).integers(0, 1 << 32, (3, words), dtype=np.uint32)
    rows = [3, 0, 4]
    wanted = logits.clone()
    mask_logits(wanted, rows, bits.view(np.int32))
    got = logits.to(device)
    mask_rows(got, *upload_masks(rows, bits.view(np.int32), device))
    assert torch.equal(got.cpu(), wanted)
    assert torch.equal(wanted[1], logits[1])
    assert int((wanted[3] == float("-inf")).sum()) > 0


def test_broken_rows_stay_broken(device: torch.device) -> None:
    logits = torch.zeros(2, 40)
    logits[0, 7], logits[1, 8] = float("nan"), float("inf")
    got = logits.to(device)
    nothing = np.zeros((2, 2), dtype=np.int32)
    mask_rows(got, *upload_masks([0, 1], nothing, device))
    assert bool(got[0, 7].isnan())
    assert float(got[1, 8]) == float("inf")
    assert int((got == float("-inf")).sum()) == 78


COMPACT = json_grammar(PEOPLE | {"x-guidance": {"whitespace_flexible": False}})


def run(driver: Driver, overlap: int) -> list[Generated]:
    driver.learn(byte_vocabulary(0))

    def sampling(number: int) -> Sampling:
        return Sampling(temperature=1.0, seed=number, logprobs=1 if number % 2 else -1)

    return driver.run(
        [
            driver.submit(
                encode_text(f"prompt {number}"), 12, sampling(number),
                stop_ids=(EOS_ID,), grammar=grammar,
            )
            for number, grammar in enumerate([COMPACT, "", DIGITS, COMPACT])
        ],
        overlap,
    )  # fmt: skip


def test_runner_equals_the_cpu(tmp_path: Path, device: torch.device) -> None:
    folder = write_tiny_model(tmp_path, TinySpec())
    options = {"max_len": MAX_LEN, "block_size": BLOCK, "max_batch": MAX_BATCH}
    wanted = run(Driver(device_of(folder, num_blocks=BLOCKS, **options), step_tokens=32), 0)
    served = gpu_device(folder, device)
    for overlap in (0, 1):
        got = run(Driver(served, step_tokens=32), overlap)
        assert [result.tokens for result in got] == [result.tokens for result in wanted]
        assert [len(result.logprobs) for result in got] == [len(w.logprobs) for w in wanted]
        assert decode_tokens(got[2].tokens).isdigit()
        assert got[2].finish is not None
        assert got[2].finish.reason == "stop"
