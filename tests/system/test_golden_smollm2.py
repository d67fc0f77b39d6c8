"""Greedy ids of the demo model equal the golden ones, however they are scheduled."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from engine.device.build import Device
from engine.protocol import Sampling, unpack_floats, unpack_tokens
from tests.demo_model import GOLDEN, demo_model
from tests.generation import Driver, Generated, device_of

pytestmark = pytest.mark.slow

_ITEMS: list[dict[str, Any]] = json.loads((GOLDEN / "smollm2/greedy.json").read_text())["items"]
_MAX_NEW, _FEWER = 32, 16  # all golden ids; enough of them where the schedule is what counts


@pytest.fixture(scope="module")
def device() -> Device:
    return device_of(demo_model())


def firm(item: dict[str, Any]) -> int:
    """How many ids are firm: up to the first step whose margin is below 0.005."""
    margins = item["top1_top2_margin_float32"]
    return next((at for at, margin in enumerate(margins) if margin < 0.005), len(margins))


def assert_golden(results: list[Generated], max_new: int = _FEWER) -> None:
    for item, result in zip(_ITEMS, results, strict=True):
        end = min(firm(item), max_new)
        assert result.finish is not None
        assert result.finish.reason == "length"
        assert len(result.tokens) == max_new
        assert result.tokens[:end] == item["greedy_ids_float32"][:end], item["messages"]


def prompts(driver: Driver, max_new: int = _FEWER) -> list[Any]:
    return [driver.submit(item["prompt_ids"], max_new) for item in _ITEMS]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_alone(device: Device, prefix_cache: bool) -> None:
    driver = Driver(device, prefix_cache=prefix_cache)
    results = [driver.run([submit])[0] for submit in prompts(driver, _MAX_NEW)]
    assert_golden(results, _MAX_NEW)
    assert (driver.stats.prefix_hit_tokens > 0) == prefix_cache


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("step_tokens", [7, 64, 512])
def test_together(device: Device, step_tokens: int, prefix_cache: bool) -> None:
    driver = Driver(device, step_tokens=step_tokens, prefix_cache=prefix_cache)
    assert_golden(driver.run(prompts(driver)))


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("overlap", [0, 1])
def test_after_forced_preemption(device: Device, overlap: int, prefix_cache: bool) -> None:
    longest = max(len(item["prompt_ids"]) for item in _ITEMS) + _MAX_NEW
    tight = -(-longest // device.limits.block_size) + 3
    driver = Driver(device, num_blocks=tight, prefix_cache=prefix_cache)
    assert_golden(driver.run(prompts(driver, _MAX_NEW), overlap), _MAX_NEW)
    assert driver.stats.preemptions > 0


def test_again_from_the_cache(device: Device) -> None:
    driver = Driver(device)
    first = driver.run(prompts(driver))
    again = driver.run(prompts(driver))
    assert [result.tokens for result in again] == [result.tokens for result in first]
    for item, result in zip(_ITEMS, again, strict=True):
        assert result.cached >= (len(item["prompt_ids"]) - 1) // 32 * 32
    assert sum(result.cached for result in again) > 32 * len(_ITEMS)


def test_logprobs(device: Device) -> None:
    driver = Driver(device)
    sampling = Sampling(temperature=0.0, logprobs=3)
    results = driver.run([driver.submit(item["prompt_ids"], 8, sampling) for item in _ITEMS])
    for item, result in zip(_ITEMS, results, strict=True):
        entries = result.logprobs
        assert [entry.start for entry in entries] == [len(item["prompt_ids"]) + i for i in range(8)]
        for at in range(min(8, firm(item))):
            [chosen] = unpack_floats(entries[at].chosen)
            assert math.isclose(chosen, item["logprobs_float32"][at], abs_tol=2e-3)
            assert unpack_tokens(entries[at].top_ids)[0] == result.tokens[at]
            assert unpack_floats(entries[at].top)[0] == chosen


def test_prompt_logprobs_do_not_depend_on_chunks(device: Device) -> None:
    item = _ITEMS[0]
    whole, parts = (
        _prompt_scores(Driver(device, step_tokens=step_tokens), item["prompt_ids"])
        for step_tokens in (512, 7)
    )
    assert len(whole) == len(parts) == len(item["prompt_ids"]) - 1
    assert max(abs(a - b) for a, b in zip(whole, parts, strict=True)) < 1e-3
    assert all(score <= 0 for score in whole)


def _prompt_scores(driver: Driver, prompt: list[int]) -> list[float]:
    sampling = Sampling(temperature=0.0, prompt_logprobs=0)
    [result] = driver.run([driver.submit(prompt, 0, sampling)])
    assert result.finish is not None
    assert result.finish.reason == "length"
    assert result.tokens == []
    return [score for entry in result.prompt_logprobs for score in unpack_floats(entry.chosen)]
