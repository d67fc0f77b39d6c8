"""The BERT family: token ids to hidden states in both directions, for embeddings.

Owns the weights. Must not know requests, scheduling or pooling. Blocks are attention and MLP, each
followed by a layer norm of its sum with the residual (Devlin et al., arXiv 1810.04805); positions
are absolute and learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelError
from engine.models.config_keys import ConfigKeys
from engine.models.registry import ShapesOnly, Target, TensorSource, architecture_of
from engine.quant.base import DenseLinear, Linear

EncoderActivation = Literal["gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, EncoderActivation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class EncoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in values. A text of n tokens has positions [position_offset, position_offset + n)."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_layers: int
    max_len: int
    norm_eps: float
    activation: EncoderActivation
    position_offset: int = 0
    token_types: int = 0


class EncoderNames(NamedTuple):
    """What a family calls its weights, without `.weight` and `.bias`; "" is one it does not have.

    `prefixes` are what may stand before all of them: a model saved with a head has one.
    """

    prefixes: tuple[str, ...] = ("", "bert.")
    words: str = "embeddings.word_embeddings"
    positions: str = "embeddings.position_embeddings"
    types: str = "embeddings.token_type_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    layer: str = "encoder.layer.{}."
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"


class _Family(NamedTuple):
    read: Callable[[ConfigKeys], EncoderSpec]
    names: EncoderNames


def _bert(config: ConfigKeys) -> EncoderSpec:
    config.expect("position_embedding_type", "absolute")
    config.expect("is_decoder", False)
    config.expect("add_cross_attention", False)
    return EncoderSpec(
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        ffn_size=config.size("intermediate_size"),
        num_heads=config.size("num_attention_heads"),
        num_layers=config.size("num_hidden_layers"),
        max_len=config.size("max_position_embeddings"),
        norm_eps=config.number("layer_norm_eps", 1e-12),
        activation=config.choice("hidden_act", _ACTIVATIONS, "gelu"),
        token_types=config.size("type_vocab_size", 2),
    )


def _roberta(config: ConfigKeys) -> EncoderSpec:
    """Positions are counted from the one behind the padding token's."""
    spec = _bert(config)
    pad = config.number("pad_token_id", 1)
    if pad < 0 or pad + 1 >= spec.max_len or pad != int(pad):
        raise config.wrong("pad_token_id", f"an id below max_position_embeddings {spec.max_len}")
    offset = int(pad) + 1
    return msgspec.structs.replace(spec, position_offset=offset, max_len=spec.max_len - offset)


def _distilbert(config: ConfigKeys) -> EncoderSpec:
    return EncoderSpec(
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("dim"),
        ffn_size=config.size("hidden_dim"),
        num_heads=config.size("n_heads"),
        num_layers=config.size("n_layers"),
        max_len=config.size("max_position_embeddings"),
        norm_eps=1e-12,
        activation=config.choice("activation", _ACTIVATIONS, "gelu"),
    )


_BERT = _Family(_bert, EncoderNames())
_ROBERTA = _Family(_roberta, EncoderNames(prefixes=("", "roberta.")))
_DISTILBERT = _Family(
    _distilbert,
    EncoderNames(
        prefixes=("", "distilbert."),
        types="",
        layer="transformer.layer.{}.",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        mlp_norm="output_layer_norm",
    ),
)
_FAMILIES: dict[str, _Family] = {
    "BertModel": _BERT,
    "BertForMaskedLM": _BERT,
    "RobertaModel": _ROBERTA,
    "RobertaForMaskedLM": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "XLMRobertaForMaskedLM": _ROBERTA,
    "CamembertModel": _ROBERTA,
    "CamembertForMaskedLM": _ROBERTA,
    "DistilBertModel": _DISTILBERT,
    "DistilBertForMaskedLM": _DISTILBERT,
}


def is_encoder(config: Mapping[str, Any]) -> bool:
    """config.json's object describes a model of this file."""
    return architecture_of(config) in _FAMILIES


def encoder_architectures() -> tuple[str, ...]:
    """All architectures of this file, sorted."""
    return tuple(sorted(_FAMILIES))


def read_encoder_spec(config: Mapping[str, Any]) -> EncoderSpec:
    """config.json's object -> spec. Raises `ModelError` naming the architecture or key."""
    name = architecture_of(config)
    if name not in _FAMILIES:
        known = ", ".join(encoder_architectures())
        raise ModelError(f"architecture {name or '(none named)'} is no encoder of ours ({known})")
    keys = ConfigKeys(config)
    spec = _FAMILIES[name].read(keys)
    if spec.hidden_size % spec.num_heads:
        raise ModelError(
            f"config.json: {spec.num_heads} attention heads do not divide a hidden size of "
            f"{spec.hidden_size}"
        )
    return spec


class TextGroup(NamedTuple):
    """Tokens [begin, end) of a step: `num_texts` texts, each padded to `length` for attention.

    `places` is int64 [num_texts * length]: which of the group's tokens stands where, pads being any
    token of the group; `mask` is float [num_texts, 1, 1, length], 0 or -inf; `kept` is int64
    [end - begin]: where each token is found in the padded order. All None where nothing is padded.
    """

    begin: int
    end: int
    num_texts: int
    length: int
    places: Tensor | None = None
    mask: Tensor | None = None
    kept: Tensor | None = None


class LayerNorm(NamedTuple):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        return self.weight.nbytes + self.bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> the same shape and type."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class EncoderLayer(NamedTuple):
    """Weights of one block. `qkv` is packed: all queries, then all keys, then all values."""

    qkv: Linear
    output: Linear
    attention_norm: LayerNorm
    up: Linear
    down: Linear
    mlp_norm: LayerNorm

    @property
    def nbytes(self) -> int:
        """Memory held by this block's weights."""
        return sum(part.nbytes for part in self)


class EncoderEnds(NamedTuple):
    """What stands before the blocks; row i of `positions` is that of a text's token i."""

    words: Tensor
    positions: Tensor
    norm: LayerNorm


class Encoder:
    """One model. Texts of a step lie one behind the other, without padding between them."""

    def __init__(self, spec: EncoderSpec, ends: EncoderEnds, layers: list[EncoderLayer]) -> None:
        self._spec = spec
        self._ends = ends
        self._layers = layers

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        return sum(part.nbytes for part in self._ends) + sum(layer.nbytes for layer in self._layers)

    def forward(self, ids: Tensor, positions: Tensor, groups: list[TextGroup]) -> Tensor:
        """int64 [num_tokens] ids and positions in their texts -> [num_tokens, hidden_size].

        `groups` cover all tokens in order. Memory on top of the weights for t tokens, in values: in
        attention t * 12 * hidden_size (residual, packed projections and their padded copy, results
        before and after they are put in place), in the MLP t * 2 * (hidden_size + ffn_size).
        Attention itself works in tiles: no scores of whole texts are kept.
        """
        hidden = F.embedding(ids, self._ends.words)
        hidden = self._ends.norm(hidden.add_(F.embedding(positions, self._ends.positions)))
        for layer in self._layers:
            mixed = self._attend(layer.qkv(hidden), groups)
            hidden = layer.attention_norm(layer.output.add(mixed, hidden))
            inner = self._activate(layer.up(hidden))
            hidden = layer.mlp_norm(layer.down.add(inner, hidden))
        return hidden

    def _attend(self, qkv: Tensor, groups: list[TextGroup]) -> Tensor:
        """[num_tokens, 3 * hidden_size] -> [num_tokens, hidden_size]: each text sees itself."""
        heads, size = self._spec.num_heads, self._spec.hidden_size
        mixed = torch.empty((qkv.shape[0], size), dtype=qkv.dtype, device=qkv.device)
        for group in groups:
            rows = qkv[group.begin : group.end]
            if group.places is not None:
                rows = rows[group.places]
            parts = rows.view(group.num_texts, group.length, 3, heads, size // heads)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(query, key, value, group.mask)
            out = out.transpose(1, 2).reshape(-1, size)
            mixed[group.begin : group.end] = out if group.kept is None else out[group.kept]
        return mixed

    def _activate(self, x: Tensor) -> Tensor:
        match self._spec.activation:
            case "gelu":
                return F.gelu(x)
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "relu":
                return F.relu(x, inplace=True)


def build_encoder(
    config: Mapping[str, Any], source: TensorSource, target: Target, *, made_up: bool = False
) -> Encoder:
    """Checks that all weights are there as the config asks, then reads them, layer by layer.

    Weights that are `made_up` are not checked. Raises `ModelError` before anything is read.
    """
    spec, names = read_encoder_spec(config), _FAMILIES[architecture_of(config)].names
    prefix = _prefix(names, source)
    if not made_up:
        checking = Target(torch.device("meta"), target.dtype, DenseLinear)
        _Builder(spec, names, prefix, ShapesOnly(source), checking).encoder()
    return _Builder(spec, names, prefix, source, target).encoder()


def _prefix(names: EncoderNames, source: TensorSource) -> str:
    found = (p for p in names.prefixes if source.shape(f"{p}{names.words}.weight") is not None)
    return next(found, names.prefixes[0])


class _Builder:
    """Reads one model's weights into place."""

    def __init__(
        self,
        spec: EncoderSpec,
        names: EncoderNames,
        prefix: str,
        source: TensorSource,
        target: Target,
    ) -> None:
        self._spec = spec
        self._names = names
        self._prefix = prefix
        self._source = source
        self._target = target

    def encoder(self) -> Encoder:
        spec, at = self._spec, self._names
        size, end = spec.hidden_size, spec.position_offset + spec.max_len
        words = self._read(f"{at.words}.weight", spec.vocab_size, size)
        positions = self._read(f"{at.positions}.weight", end, size)[spec.position_offset :]
        if spec.token_types:  # all tokens are of type 0
            positions = positions + self._read(f"{at.types}.weight", spec.token_types, size)[0]
        norm = self._norm(at.embedding_norm)
        layers = [self._layer(at.layer.format(number)) for number in range(spec.num_layers)]
        return Encoder(spec, EncoderEnds(words, positions, norm), layers)

    def _layer(self, at: str) -> EncoderLayer:
        spec, names = self._spec, self._names
        size, ffn = spec.hidden_size, spec.ffn_size
        qkv = [at + name for name in names.qkv]
        weight = torch.cat([self._read(f"{name}.weight", size, size) for name in qkv])
        bias = torch.cat([self._read(f"{name}.bias", size) for name in qkv])
        return EncoderLayer(
            qkv=self._target.method(weight, bias),
            output=self._linear(at + names.output, size, size),
            attention_norm=self._norm(at + names.attention_norm),
            up=self._linear(at + names.up, ffn, size),
            down=self._linear(at + names.down, size, ffn),
            mlp_norm=self._norm(at + names.mlp_norm),
        )

    def _linear(self, name: str, rows: int, columns: int) -> Linear:
        weight = self._read(f"{name}.weight", rows, columns)
        return self._target.method(weight, self._read(f"{name}.bias", rows))

    def _norm(self, name: str) -> LayerNorm:
        """Checkpoints converted from TensorFlow call the two gamma and beta."""
        old = self._source.shape(f"{self._prefix}{name}.gamma") is not None
        weight, bias = ("gamma", "beta") if old else ("weight", "bias")
        size = self._spec.hidden_size
        return LayerNorm(
            self._read(f"{name}.{weight}", size),
            self._read(f"{name}.{bias}", size),
            self._spec.norm_eps,
        )

    def _read(self, name: str, *shape: int) -> Tensor:
        stored = self._source.get(self._prefix + name, shape)
        return stored.to(self._target.device, self._target.dtype)
