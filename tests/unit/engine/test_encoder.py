"""The BERT family against transformers on tiny random models, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from engine.config import ModelError
from engine.device.encoding import group_texts
from engine.models.encoder import build_encoder, encoder_architectures, read_encoder_spec
from engine.protocol import Pooling
from tests.decoding import HeldTensors, float32_target
from tests.embedding import embed, embedding_device, largest_difference

TOLERANCE = 1e-5
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
DISTIL: dict[str, Any] = {
    "vocab_size": 97,
    "dim": 48,
    "hidden_dim": 80,
    "n_layers": 3,
    "n_heads": 6,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
# name -> (model_type of transformers, keys, saved with a head)
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "bert": ("bert", BASE, False),
    "bert head": ("bert", BASE, True),
    "bert tanh": ("bert", {**BASE, "hidden_act": "gelu_new"}, False),
    "bert relu": ("bert", {**BASE, "hidden_act": "relu"}, False),
    "bert eps": ("bert", {**BASE, "layer_norm_eps": 0.03}, False),
    "roberta": ("roberta", {**BASE, "pad_token_id": 1}, False),
    "roberta head": ("roberta", {**BASE, "pad_token_id": 1}, True),
    "roberta pad": ("roberta", {**BASE, "pad_token_id": 4}, False),
    "xlm-roberta": ("xlm-roberta", {**BASE, "pad_token_id": 1, "type_vocab_size": 1}, False),
    "xlm-roberta head": ("xlm-roberta", {**BASE, "pad_token_id": 1, "type_vocab_size": 1}, True),
    "camembert": ("camembert", {**BASE, "pad_token_id": 1, "type_vocab_size": 1}, False),
    "camembert head": ("camembert", {**BASE, "pad_token_id": 1, "type_vocab_size": 1}, True),
    "distilbert": ("distilbert", DISTIL, False),
    "distilbert head": ("distilbert", DISTIL, True),
}
# No pad ids within: transformers gives them positions of their own.
TEXTS = [[7 + (31 * n + 17 * i) % 89 for i in range(n)] for n in (5, 1, 34, 6, 5, 12, 13, 2, 30)]


class Saved:
    """A random model of transformers, saved as a folder."""

    def __init__(self, folder: Path, variant: str) -> None:
        kind, keys, with_head = VARIANTS[variant]
        torch.manual_seed(sum(map(ord, variant)))
        config = AutoConfig.for_model(kind, **keys)
        made = (AutoModelForMaskedLM if with_head else AutoModel).from_config(config)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if "LayerNorm" in name or "layer_norm" in name or name.endswith("bias"):
                    weight.add_(torch.randn_like(weight) * 0.2)
        made.eval().save_pretrained(folder)
        self.folder = folder
        self._model = made.base_model

    @torch.no_grad()
    def hidden(self, text: list[int]) -> torch.Tensor:
        states: torch.Tensor = self._model(torch.tensor([text])).last_hidden_state[0]
        return states

    def vectors(
        self, pool: Callable[[torch.Tensor], torch.Tensor], normalize: bool = True
    ) -> list[list[float]]:
        found = [pool(self.hidden(text)) for text in TEXTS]
        return [(v / v.norm() if normalize else v).tolist() for v in found]


@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path, variant)
    device = embedding_device(tmp_path)
    mean = embed(device, TEXTS)
    assert largest_difference(mean, saved.vectors(lambda h: h.mean(0))) < TOLERANCE
    cls = embed(device, TEXTS, Pooling("cls"))
    assert largest_difference(cls, saved.vectors(lambda h: h[0])) < TOLERANCE
    last = embed(device, TEXTS, Pooling("last"))
    assert largest_difference(last, saved.vectors(lambda h: h[-1])) < TOLERANCE
    alone = [embed(device, [text])[0] for text in TEXTS]
    assert largest_difference(mean, alone) < TOLERANCE
    for step_tokens in (1, 20):
        split = embed(device, TEXTS, step_tokens=step_tokens)
        assert largest_difference(mean, split) < TOLERANCE


def test_a_vector_is_cut_before_it_is_scaled(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "bert")
    device = embedding_device(tmp_path)
    raw = embed(device, TEXTS, Pooling(dimensions=7, normalize=False))
    expected = saved.vectors(lambda h: h.mean(0)[:7], normalize=False)
    assert largest_difference(raw, expected) < TOLERANCE
    cut = embed(device, TEXTS, Pooling(dimensions=7))
    assert largest_difference(cut, saved.vectors(lambda h: h.mean(0)[:7])) < TOLERANCE


def test_roberta_serves_as_many_tokens_as_it_has_positions_left(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "roberta")
    device = embedding_device(tmp_path)
    assert device.limits.max_len == 38
    text = [7 + i for i in range(38)]
    expected = saved.hidden(text).mean(0)
    vector = embed(device, [text], Pooling(normalize=False))[0]
    assert largest_difference([vector], [expected.tolist()]) < TOLERANCE


def test_norms_may_be_called_gamma_and_beta(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "bert head")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): weight
        for name, weight in load_file(tmp_path / "model.safetensors").items()
    }
    assert any(name.endswith("gamma") for name in old)
    save_file(old, tmp_path / "model.safetensors")
    vectors = embed(embedding_device(tmp_path), TEXTS)
    assert largest_difference(vectors, saved.vectors(lambda h: h.mean(0))) < TOLERANCE


def test_nan_weights_fail_each_text_and_nothing_else(tmp_path: Path) -> None:
    Saved(tmp_path, "bert")
    weights = load_file(tmp_path / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][50] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    device = embedding_device(tmp_path)
    assert len(embed(device, [[1, 2], [3]])) == 2
    with pytest.raises(AssertionError, match="no finite embedding"):
        embed(device, [[1, 2], [50]])


def test_a_missing_or_misshapen_weight_is_named_before_anything_is_read(tmp_path: Path) -> None:
    Saved(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.2.output.dense.weight"

    class Unread(HeldTensors):
        def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
            raise AssertionError(f"{name} was read")

    held = {**weights, name: weights[name][:, 1:]}
    with pytest.raises(ModelError, match=rf"{name} has shape \[48, 79\].* asks for \[48, 80\]"):
        build_encoder(config, Unread(held), float32_target())
    del held[name]
    with pytest.raises(ModelError, match=rf"{name} \[48, 80\] is missing"):
        build_encoder(config, Unread(held), float32_target())


def test_random_weights_need_no_files(tmp_path: Path) -> None:
    Saved(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    device = embedding_device(tmp_path, load_format="dummy")
    assert len(embed(device, TEXTS)) == len(TEXTS)


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("BertModel", {"position_embedding_type": "relative_key"}, "position_embedding_type 'rel"),
        ("BertModel", {"is_decoder": True}, "is_decoder True is not supported"),
        ("BertModel", {"add_cross_attention": True}, "add_cross_attention True"),
        ("BertModel", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ("BertModel", {"num_attention_heads": 5}, "5 attention heads do not divide .* 48"),
        ("BertModel", {"vocab_size": None}, "vocab_size is missing"),
        ("BertModel", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ("RobertaModel", {"pad_token_id": -1}, "pad_token_id must be an id below .* it is -1"),
        ("RobertaModel", {"pad_token_id": 39}, "pad_token_id must be an id below .* 40, it is 39"),
        ("DistilBertModel", {}, "dim is missing"),
        ("MPNetModel", {}, "architecture MPNetModel is no encoder of ours"),
    ],
)
def test_what_cannot_be_served_is_refused_by_key_and_value(
    architecture: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        read_encoder_spec({"architectures": [architecture], **BASE, **changes})


def test_every_architecture_is_compared_with_transformers(tmp_path: Path) -> None:
    seen: set[str] = set()
    for variant in VARIANTS:
        folder = tmp_path / variant
        Saved(folder, variant)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        seen.update(config["architectures"])
    assert seen == set(encoder_architectures())


def test_groups_cover_all_tokens_and_pad_little() -> None:
    lengths = sorted([1, 1, 2, 3, 3, 8, 9, 10, 11, 100, 120, 126, 400])
    groups = group_texts(lengths, torch.device("cpu"), torch.float32)
    assert [(group.num_texts, group.length) for group in groups] == [
        *((2, 1), (1, 2), (2, 3), (3, 10), (1, 11), (2, 120), (1, 126), (1, 400))
    ]
    assert [group.begin for group in groups] == [0, *(group.end for group in groups[:-1])]
    assert groups[-1].end == sum(lengths)
    for group in groups:
        if group.places is None or group.kept is None:
            continue
        tokens = torch.arange(group.end - group.begin)
        assert torch.equal(tokens[group.places][group.kept], tokens)
