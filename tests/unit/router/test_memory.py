from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.checkpoint.facts import Checkpoint, ModelFacts
from router.errors import EXIT_CONFIG, EXIT_NO_MEMORY, StartError
from router.memory import (
    DEFAULT_CONTEXT,
    ENGINE_BYTES,
    GIB,
    MAX_DEFAULT_KV_BYTES,
    MIB,
    Demand,
    free_memory_bytes,
    plan,
)

FACTS = ModelFacts(
    architecture="llama",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    vocab_size=49152,
    context_length=8192,
    tied=True,
)
PER_TOKEN = 2 * 30 * 3 * 64 * 4
EMBEDDING = 49152 * 576
HELD = 134_515_008 + EMBEDDING  # a CPU holds the tied output layer besides, in its own layout


def demand(**changes: Any) -> Demand:
    checkpoint = Checkpoint(Path("m"), FACTS, FACTS.num_parameters, 98_000_000)
    return dataclasses.replace(Demand("m", checkpoint), **changes)


def test_numbers_of_one_engine() -> None:
    (engine,) = plan([demand()], {"cpu": 8 * GIB}).engines
    assert engine.weights_bytes == HELD * 4
    assert engine.kv_bytes_per_token == PER_TOKEN
    assert engine.kv_bytes == engine.num_blocks * 32 * PER_TOKEN
    assert engine.max_len == 8192
    assert engine.total_bytes == engine.weights_bytes + engine.kv_bytes + ENGINE_BYTES


def test_sixteen_bits_halve_it() -> None:
    whole, half = plan([demand(), demand(dtype="bfloat16")], {"cpu": 64 * GIB}).engines
    assert half.weights_bytes * 2 == whole.weights_bytes
    assert half.kv_bytes_per_token * 2 == whole.kv_bytes_per_token


@pytest.mark.parametrize(("quant", "bits"), [("int8", 8), ("bnb-int8", 8), ("nf4", 4.5)])
def test_quantized_models_keep_their_embedding(quant: str, bits: float) -> None:
    layers = 134_515_008 - EMBEDDING
    (engine,) = plan([demand(quant=quant)], {"cpu": 8 * GIB}).engines
    want = EMBEDDING * 4 + layers * bits / 8 + EMBEDDING  # the tied head is a copy in 8 bits
    assert want < engine.weights_bytes < 1.01 * want  # scales
    untied = dataclasses.replace(FACTS, tied=False)
    stored = Checkpoint(Path("m"), untied, untied.num_parameters, 98_000_000)
    (engine,) = plan([demand(quant=quant, checkpoint=stored)], {"cpu": 8 * GIB}).engines
    assert want < engine.weights_bytes < 1.01 * want  # the same layers, the same head
    (engine,) = plan([demand(quant=quant, device="cuda:0")], {}).engines
    assert want - EMBEDDING * 2 < engine.weights_bytes < 1.01 * want - EMBEDDING * 2


def test_encoders_have_no_output_layer() -> None:
    facts = dataclasses.replace(FACTS, encoder=True, tied=True)
    found = demand(checkpoint=Checkpoint(Path("m"), facts, FACTS.num_parameters, 98_000_000))
    (engine,) = plan([found], {"cpu": 8 * GIB}).engines
    assert engine.weights_bytes == 134_515_008 * 4
    layers = 134_515_008 - EMBEDDING
    (engine,) = plan([dataclasses.replace(found, quant="int8")], {"cpu": 8 * GIB}).engines
    assert engine.weights_bytes == pytest.approx(EMBEDDING * 4 + layers, rel=0.01)


@pytest.mark.parametrize("asked", [{}, {"kv_bytes": GIB}, {"num_blocks": 100}, {"max_len": 9000}])
def test_encoders_have_no_cache(asked: dict[str, int]) -> None:
    """What is asked for is meant for the models beside it."""
    facts = dataclasses.replace(FACTS, encoder=True, context_length=512)
    given = demand(checkpoint=Checkpoint(Path("m"), facts, 10, 20), **asked)
    for free in ({"cpu": 8 * GIB}, {}):
        (engine,) = plan([given], free).engines
        assert (engine.kv_bytes, engine.num_blocks, engine.max_len) == (0, 0, 512)


def test_models_without_weights_are_estimated() -> None:
    empty = Checkpoint(Path("m"), FACTS, 0, 0)
    (engine,) = plan([Demand("m", empty)], {"cpu": 8 * GIB}).engines
    assert engine.weights_bytes == HELD * 4


def test_the_default_cache_is_bounded() -> None:
    (engine,) = plan([demand()], {"cpu": 1000 * GIB}).engines
    assert engine.kv_bytes <= MAX_DEFAULT_KV_BYTES
    (engine,) = plan([demand(max_batch=1)], {"cpu": 1000 * GIB}).engines
    assert engine.num_blocks == 8192 // 32  # one whole sequence, though few are wanted


def test_engines_share_a_device() -> None:
    both = plan([demand(), demand()], {"cpu": 8 * GIB})
    assert both.needed_bytes("cpu") == sum(engine.total_bytes for engine in both.engines)
    assert both.needed_bytes("cpu") <= 8 * GIB
    (alone,) = plan([demand()], {"cpu": 8 * GIB}).engines
    assert both.engines[0].kv_bytes < alone.kv_bytes


def test_a_small_machine_gets_a_shorter_context_unless_asked() -> None:
    free = HELD * 4 + ENGINE_BYTES + 200 * MIB
    (engine,) = plan([demand()], {"cpu": free}).engines
    assert DEFAULT_CONTEXT <= engine.max_len < 8192
    with pytest.raises(StartError) as caught:
        plan([demand(max_len=8192)], {"cpu": free})
    assert caught.value.code == EXIT_NO_MEMORY
    assert "1.6 GB" in caught.value.message
    assert "1.4 GB are free" in caught.value.message
    fitting = int(caught.value.message.rsplit("--max-len ", 1)[1])
    (engine,) = plan([demand(max_len=fitting)], {"cpu": free}).engines
    assert engine.max_len == fitting


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(StartError, match="try --dtype bfloat16") as caught:
        plan([demand()], {"cpu": 500 * MIB})
    assert caught.value.code == EXIT_NO_MEMORY
    with pytest.raises(StartError, match="try fewer engines"):
        plan([demand(dtype="bfloat16")], {"cpu": 500 * MIB})


def test_a_given_cache_is_kept() -> None:
    (engine,) = plan([demand(kv_bytes=100 * MIB)], {"cpu": 8 * GIB}).engines
    assert 99 * MIB < engine.kv_bytes <= 100 * MIB
    assert engine.max_len == engine.num_blocks * 32
    (engine,) = plan([demand(num_blocks=10)], {"cpu": 8 * GIB}).engines
    assert (engine.num_blocks, engine.max_len) == (10, 320)
    with pytest.raises(StartError, match="less than --max-len") as caught:
        plan([demand(num_blocks=10, max_len=321)], {"cpu": 8 * GIB})
    assert caught.value.code == EXIT_NO_MEMORY
    with pytest.raises(StartError, match="smaller --kv-memory"):
        plan([demand(kv_bytes=100 * GIB)], {"cpu": 8 * GIB})


def test_a_length_beyond_the_model() -> None:
    with pytest.raises(StartError, match="8192 tokens") as caught:
        plan([demand(max_len=8193)], {"cpu": 8 * GIB})
    assert caught.value.code == EXIT_CONFIG


def test_devices_that_are_not_known_decide_for_themselves() -> None:
    (engine,) = plan([demand(device="cuda:0")], {"cpu": 1}).engines
    assert (engine.num_blocks, engine.kv_bytes, engine.max_len) == (0, 0, 8192)
    assert engine.dtype == "bfloat16"


def test_a_known_gpu_is_used_up() -> None:
    (engine,) = plan([demand(device="0")], {"0": 15 * GIB}).engines
    assert 11 * GIB < engine.kv_bytes < 13 * GIB
    assert engine.max_len == 8192
    with pytest.raises(StartError, match="try fewer engines"):
        plan([demand(device="0")], {"0": 600 * MIB})


def test_models_of_unknown_shape_are_left_to_the_engine() -> None:
    facts = dataclasses.replace(FACTS, num_layers=0, context_length=0)
    odd = Demand("odd", Checkpoint(Path("m"), facts, 1000, 1000))
    (engine,) = plan([odd], {"cpu": GIB}).engines
    assert (engine.num_blocks, engine.kv_bytes) == (0, 0)


@given(
    free=st.integers(0, 64 * GIB),
    engines=st.integers(1, 5),
    max_len=st.sampled_from([0, 1, 33, 4096, 8192]),
    max_batch=st.integers(1, 256),
)
def test_a_plan_fits_or_is_refused(free: int, engines: int, max_len: int, max_batch: int) -> None:
    demands = [demand(max_len=max_len, max_batch=max_batch)] * engines
    try:
        result = plan(demands, {"cpu": free})
    except StartError as error:
        refusal = error.code
    else:
        refusal = 0
    if refusal:
        assert refusal == EXIT_NO_MEMORY
        return
    assert result.needed_bytes("cpu") <= free
    for engine in result.engines:
        assert engine.max_len <= engine.num_blocks * 32
        assert engine.max_len == max_len or not max_len


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="ascii")


def test_free_memory_of_a_machine(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path) == 0
    write(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemAvailable:   80 kB\nSwapFree: 9 kB\n")
    assert free_memory_bytes(tmp_path) == 80 * 1024


def test_free_memory_of_a_control_group(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemAvailable:   1000000 kB\n")
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.current", "5\n")
    assert free_memory_bytes(tmp_path) == 1000000 * 1024
    write(tmp_path, "sys/fs/cgroup/a/memory.max", "5000\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.current", "3000\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 500\n")
    assert free_memory_bytes(tmp_path) == 2500


def test_free_memory_of_an_older_control_group(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/docker/x\n3:cpu:/docker/x\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9000\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "10000\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.stat", "total_inactive_file 400\n")
    assert free_memory_bytes(tmp_path) == 0


def test_free_memory_here() -> None:
    assert free_memory_bytes() > 0
