"""Architectures through transformers' classes over paged attention: served exactly, or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from engine.config import EngineConfig, ModelError
from engine.device.fallback import load_fallback, paged_error
from engine.models import hf
from engine.models.hf import HfModel, build_fallback
from engine.quant.methods import head_method, linear_method
from tests.decoding import CPU, float32_target, model_logits

TOLERANCE = 1e-4
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# model_type -> keys, kv heads, windows. Windows are shorter than the prompts.
SERVED: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "starcoder2": ({"sliding_window": 6}, 2, (6,)),
    "stablelm": ({}, 2, (0,)),
    "cohere2": ({"sliding_window": 6, "head_dim": 16, "logit_scale": 0.7}, 2, (0, 6)),
    "gpt_neox": ({}, 4, (0,)),
    "qwen2_moe": ({**EXPERTS, "shared_expert_intermediate_size": 32}, 2, (0,)),
    "gpt2": ({"scale_attn_by_inverse_layer_idx": True}, 4, (0,)),
    "opt": ({"ffn_dim": 80, "word_embed_proj_dim": 32}, 4, (0,)),
    "phi": ({}, 2, (0,)),
    "olmo3": ({"sliding_window": 6}, 2, (0, 6)),
    "exaone4": ({"sliding_window": 6, "head_dim": 16}, 2, (0, 6)),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, "it keeps a recurrent state"),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 16, "sliding_window": 6}, "s_aux"),
    "bloom": ({}, "it takes no position_ids"),
    "deepseek_v2": ({"first_k_dense_replace": 4}, "keys and values differ in shape"),
    "diffllama": ({}, "layer 0 attends more than once"),
    "bert": ({}, "its attention is not causal"),
    "doge": ({}, "changes its attention mask"),
}


def write_model(folder: Path, model_type: str, keys: dict[str, Any]) -> dict[str, Any]:
    """A folder with random weights, saved by transformers; returns its config.json."""
    torch.manual_seed(0)
    settings = CONFIG_MAPPING[model_type](**(BASE | keys))
    MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)](settings).save_pretrained(folder)
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


def config_of(model_type: str, keys: dict[str, Any]) -> dict[str, Any]:
    """config.json alone."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return {**BASE, **keys, "model_type": model_type, "architectures": [kind.__name__]}


def prompts() -> list[list[int]]:
    """Three of different lengths."""
    made = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=made).tolist() for n in (23, 9, 17)]


@pytest.mark.parametrize("model_type", SERVED)
def test_scores_are_those_of_transformers_alone(model_type: str, tmp_path: Path) -> None:
    keys, kv_heads, windows = SERVED[model_type]
    config = write_model(tmp_path, model_type, keys)
    model, shape = build_fallback(tmp_path, config, float32_target())
    assert (shape.kv_heads, shape.head_dim, shape.windows) == (kv_heads, 16, windows)
    assert (shape.vocab_size, shape.num_layers, shape.max_len) == (97, 4, 64)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    plain = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
    found = model_logits(model, shape, prompts())
    for prompt, scores in zip(prompts(), found, strict=True):
        with torch.inference_mode():
            wanted = plain(torch.tensor([prompt]), use_cache=False).logits[0]
        torch.testing.assert_close(scores, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    with torch.inference_mode():
        ids = torch.tensor(prompts()[0])
        torch.testing.assert_close(
            model.own_logits(ids), plain(ids[None]).logits[0], atol=TOLERANCE, rtol=TOLERANCE
        )


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_paged_attention_cannot_do_is_refused(model_type: str) -> None:
    keys, reason = REFUSED[model_type]
    config = config_of(model_type, keys)
    with pytest.raises(ModelError, match=reason) as caught, torch.inference_mode():
        build_fallback(Path("unused"), config, float32_target(), made_up=True)
    assert config["architectures"][0] in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "an encoder with"),
        (
            {
                "architectures": ["BaichuanForCausalLM"],
                "model_type": "baichuan",
                "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
            },
            "has no 'baichuan' .the model folder's own code is never run",
        ),
        ({"architectures": ["GPT2ForTokenClassification"], "model_type": "gpt2"}, "GPT2LMHead"),
        ({"architectures": ["XForCausalLM"]}, "has no None"),
    ],
)
def test_what_transformers_does_not_have_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        build_fallback(Path("unused"), config, float32_target())


def test_code_of_the_model_folder_is_never_run(tmp_path: Path) -> None:
    config = write_model(tmp_path, "phi", {})
    mark = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.PhiForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _model, shape = build_fallback(tmp_path, config, float32_target())
    assert shape.num_layers == 4
    assert not mark.exists()


def test_without_transformers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"PhiForCausalLM .*llm-router\[transformers\]"):
        build_fallback(Path("unused"), config_of("phi", {}), float32_target())


def test_a_missing_weight_is_refused(tmp_path: Path) -> None:
    config = write_model(tmp_path, "phi", {})
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.fc1.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weight model.layers.1.mlp.fc1.weight is missing"):
        build_fallback(tmp_path, config, float32_target())


def test_longrope_is_served_up_to_its_change() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    config = config_of("starcoder2", {"rope_parameters": rope})
    with pytest.raises(ModelError, match="pass --max-len 32"):
        build_fallback(Path("unused"), config, float32_target(), made_up=True)
    _model, shape = build_fallback(Path("unused"), config, float32_target(32), made_up=True)
    assert shape.max_len == 32


def test_quantized_layers_take_less_memory_and_pass_the_check() -> None:
    config = config_of("starcoder2", {"sliding_window": 6})
    with torch.inference_mode():
        dense, _ = build_fallback(Path("unused"), config, float32_target(), made_up=True)
        target = float32_target()._replace(
            method=linear_method("int8", CPU, torch.float32),
            head_method=head_method("int8", CPU, torch.float32),
        )
        small, shape = build_fallback(Path("unused"), config, target, made_up=True)
    assert small.nbytes < 0.45 * dense.nbytes
    assert paged_error(small, shape, target, exact=False) < 0.05


def test_scores_that_differ_from_the_class_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model_config = config_of("phi", {})
    config = EngineConfig(endpoint="", replica=0, epoch=0, model="unused", load_format="dummy")
    load_fallback(config, model_config, float32_target())
    assert "PhiForCausalLM runs through transformers' own code" in capsys.readouterr().err
    probe = HfModel.probe

    def wrong_probe(self: HfModel, max_len: int) -> Any:
        shape = probe(self, max_len)
        self._rules[2] = self._rules[2]._replace(scale=self._rules[2].scale * 1.5)
        return shape

    monkeypatch.setattr(hf.HfModel, "probe", wrong_probe)
    with pytest.raises(ModelError, match="PhiForCausalLM cannot be served: over paged attention"):
        load_fallback(config, model_config, float32_target())
