"""ChatGLM2, ChatGLM3 and GLM-4 against THUDM's own code: logits and greedy ids of the golden data.

Computed as traffic is: paged, in uneven chunks, mixed batches, from the prefix cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor

from engine.config import ModelError, RopeRule
from engine.device.batch import Batch
from engine.device.kv import KvCache
from engine.device.weights import open_model
from engine.models.registry import build_decoder, read_spec, shape_of, weight_names_of
from engine.models.spec import ModelSpec
from engine.plan import Admit, Row, StepPlan
from engine.protocol import Sampling
from tests.decoding import BLOCK, CPU, float32_target, model_logits
from tests.generation import Driver, device_of

GOLDEN = Path(__file__).parent.parent / "golden"
# folder -> (golden data, what its rope_ratio means)
FOLDERS: dict[str, tuple[str, RopeRule]] = {
    "chatglm2-tiny": ("chatglm2-tiny", "auto"),
    "chatglm2-tiny-bin": ("chatglm2-tiny", "auto"),
    "chatglm2-kvch-tiny": ("chatglm2-kvch-tiny", "auto"),
    "chatglm2-32k-tiny": ("chatglm2-32k-tiny", "linear"),
    "chatglm3-tiny": ("chatglm3-tiny", "auto"),
    "chatglm3-32k-tiny": ("chatglm3-32k-tiny", "auto"),
    "glm4-9b-tiny": ("glm4-9b-tiny", "auto"),
}
TOLERANCE, FAR_TOLERANCE = 1e-4, 5e-3
MAX_POSITION = 32_768


class Case(NamedTuple):
    """A prompt; logits of its last positions; the greedy continuation with its logits."""

    prompt: list[int]
    prompt_logits: Tensor
    tokens: list[int]
    logits: Tensor


def golden(folder: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / FOLDERS[folder][0] / "golden.safetensors")


def prompt_cases(data: dict[str, Tensor]) -> list[Case]:
    return [
        Case(
            data[f"{name}.input_ids"].tolist(),
            data[f"{name}.prefill_logits"],
            data[f"{name}.decode_tokens"].tolist(),
            data[f"{name}.decode_logits"],
        )
        for name in sorted({key.split(".")[0] for key in data if key.startswith("case")})
    ]


class Loaded:
    """A decoder of one folder, with the spec changed where a control asks for it."""

    def __init__(self, folder: str, **changes: Any) -> None:
        config, source = open_model(GOLDEN / folder, "auto")
        self.spec: ModelSpec = replace(read_spec(config, FOLDERS[folder][1]), **changes)
        target = float32_target(MAX_POSITION)
        self.decoder = build_decoder(self.spec, weight_names_of(config), source, target)
        self.shape = shape_of(self.spec)

    def logits(self, prompts: list[list[int]]) -> list[Tensor]:
        """Of every position, chunked and mixed."""
        return model_logits(self.decoder, self.shape, prompts)

    @torch.inference_mode()
    def logits_at(self, ids: list[int], positions: Tensor) -> Tensor:
        """Of every id, with these rotary positions."""
        cache = KvCache(self.shape, len(ids), BLOCK, torch.float32, CPU)
        batch = Batch(1, len(ids), BLOCK, CPU, torch.float32, self.shape.windows)
        blocks = list(range(-(-len(ids) // BLOCK)))
        admit = Admit(0, ids, len(ids), blocks, Sampling(), ())
        batch.apply(StepPlan(0, [], [admit], [], []))
        inputs = batch.inputs([Row(0, 0, 0, len(ids), samples=False)])
        hidden = self.decoder.forward(inputs.ids, positions.long(), cache.layers, inputs.attention)
        return self.decoder.logits(hidden)


def differences(loaded: Loaded, cases: list[Case]) -> Iterator[float]:
    whole = loaded.logits([case.prompt + case.tokens[:-1] for case in cases])
    for case, got in zip(cases, whole, strict=True):
        end = len(case.prompt)
        yield float((got[end - len(case.prompt_logits) : end] - case.prompt_logits).abs().max())
        yield float((got[end - 1 :] - case.logits).abs().max())


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits(folder: str) -> None:
    cases = prompt_cases(golden(folder))
    assert len(cases) >= 4
    assert max(differences(Loaded(folder), cases)) < TOLERANCE


@pytest.mark.parametrize("folder", FOLDERS)
def test_far_positions(folder: str) -> None:
    data, loaded = golden(folder), Loaded(folder)
    names = sorted({key.split(".")[0] for key in data if key.startswith("far")})
    assert names
    for name in names:
        ids, positions = data[f"{name}.input_ids"].tolist(), data[f"{name}.position_ids"]
        got = loaded.logits_at(ids, positions)
        assert float((got - data[f"{name}.prefill_logits"]).abs().max()) < FAR_TOLERANCE, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_padded_batch(folder: str) -> None:
    """The golden's rows are padded, ours are not: what stands at real positions is the same."""
    data = golden(folder)
    rows = zip(data["batch.input_ids"], data["batch.attention_mask"].bool(), strict=True)
    got = Loaded(folder).logits([ids[mask].tolist() for ids, mask in rows])
    for logits, mask, wanted in zip(
        got, data["batch.attention_mask"].bool(), data["batch.logits"], strict=True
    ):
        assert float((logits - wanted[mask]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("folder", FOLDERS)
def test_greedy_ids_as_served(folder: str) -> None:
    """All prompts together, in small steps; then once more, with prompts from the prefix cache."""
    cases = prompt_cases(golden(folder))
    device = device_of(
        GOLDEN / folder, max_len=512, max_batch=16, block_size=8, rope_rule=FOLDERS[folder][1]
    )
    driver = Driver(device, step_tokens=24)
    for again in (False, True):
        results = driver.run([driver.submit(case.prompt, len(case.tokens)) for case in cases])
        assert [result.tokens for result in results] == [case.tokens for case in cases]
        assert any(result.cached for result in results) == again


def _mistakes(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """Of the golden README's list those that a field of the spec stands for."""
    [rope] = spec.ropes
    wrong_ratio = {
        "linear": replace(rope, scaling="none", theta=rope.theta * rope.factor),
        "none": replace(rope, theta=10_000.0),
    }[rope.scaling]
    mistakes: dict[str, dict[str, Any]] = {
        "eps": {"norm_eps": 1e-2},
        "half-split rotation": {"ropes": (replace(rope, interleaved=False),)},
        "rotation on all values": {"ropes": (replace(rope, dim=spec.head_dim),)},
        "no qkv bias": {"qkv_bias": False},
        "GELU": {"activation": "gelu"},
        "tied head": {"tied_head": True},
        "score divided by the number of layers": {
            "attention_scale": spec.attention_scale / len(spec.layers)
        },
    }
    if wrong_ratio != rope:
        mistakes["rope_ratio ignored or of the other kind"] = {"ropes": (wrong_ratio,)}
    return mistakes


@pytest.mark.parametrize("folder", FOLDERS)
def test_single_mistakes_are_seen(folder: str) -> None:
    data = golden(folder)
    cases = prompt_cases(data)
    for name, changes in _mistakes(Loaded(folder).spec).items():
        loaded = Loaded(folder, **changes)
        far = loaded.logits_at(data["far00.input_ids"].tolist(), data["far00.position_ids"])
        seen = float((far - data["far00.prefill_logits"]).abs().max())
        assert max(seen, *differences(loaded, cases)) > 0.5, name


def test_the_published_names_are_refused_when_a_shard_lacks_one(tmp_path: Path) -> None:
    """Before any weight is read, with its name and the shape that the config asks for."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((GOLDEN / "chatglm2-tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 4}))
    weights = GOLDEN / "chatglm2-tiny" / "model.safetensors"
    (folder / "model.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(ModelError, match=r"layers\.3\.input_layernorm\.weight \[128\] is missing"):
        device_of(folder)
