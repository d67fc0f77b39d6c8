"""Architectures that the generic decoder does not cover, by transformers' own model classes.

Owns the loaded modules. Only transformers' own code runs: `auto_map` is never followed. The tokens
of a step are one row with explicit positions, and attention reaches our backend through
transformers' attention interface. Its function has no state: it finds the step at the module that
calls, because some classes drop keywords of `forward` on the way.

How each layer attends is learned from one short forward pass, in which every mask that the class
builds notes its window (0: plain causal). What paged attention cannot do is refused. Must not know
requests or scheduling.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attention.base import AttentionRule, StepAttention
from engine.config import ModelError
from engine.models.base import ModelShape
from engine.models.registry import Target, architecture_of
from engine.quant.base import Linear
from engine.weight_files import find_weight_files

REMEDY = "pip install 'llm-router[transformers]'"

# Names of attention implementations. The second builds no masks: transformers leaves them out for
# names that are registered for attention alone.
_PROBING, _SERVING, _OWN = "router_probing", "router_serving", "eager"
_PROBE_TOKENS = 6
# Attributes: of attention modules their model's `_Current`, of a probing mask its window.
_CURRENT, _WINDOW = "router_current", "router_window"
# Masks are looked at over so many positions: longer contexts are not served.
_MAX_LEN = 1 << 20
# Smaller layers are gates and routers: they decide much and weigh little.
_MIN_QUANTIZED_ROWS = 16
# Arguments of an attention call that change nothing in a forward pass without cache or dropout.
_HARMLESS = frozenset(
    (
        "cache_position",
        "is_causal",
        "output_attentions",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "scaling",
        "sliding_window",
        "softcap",
    )
)


class _Unfit(Exception):
    """Why an architecture cannot be served: the end of a sentence."""


class _Call(NamedTuple):
    """One layer's attention: q [1, heads, n, head_dim], k and v [1, kv_heads, n, head_dim]."""

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    extras: dict[str, Any]


class _Step(NamedTuple):
    """What one forward pass hands to attention."""

    rules: list[AttentionRule]
    kv: list[Tensor]
    attention: StepAttention

    def attend(self, call: _Call) -> Tensor:
        """[1, n, heads, head_dim]."""
        layer = call.module.layer_idx
        query = call.query[0].transpose(0, 1)
        keys_values = torch.cat((call.key[0], call.value[0])).transpose(0, 1)
        self.attention.store(keys_values, 0, self.kv[layer], None)
        mixed = self.attention.attend(query, self.kv[layer], self.rules[layer])
        return mixed.view(1, *query.shape)


class _Probe:
    """Takes the place of a step once and writes down how each layer attends."""

    def __init__(self) -> None:
        self.rules: dict[int, AttentionRule] = {}
        self.shapes: set[tuple[int, int]] = set()  # (kv_heads, head_dim)

    def attend(self, call: _Call) -> Tensor:
        """Zeros of the right shape. Raises `_Unfit`."""
        layer = getattr(call.module, "layer_idx", None)
        if not isinstance(layer, int):
            raise _Unfit("its attention does not know which layer it is")
        if layer in self.rules:
            raise _Unfit(f"layer {layer} attends more than once")
        _refuse_extras(call)
        kv_heads, head_dim = call.key.shape[1], call.key.shape[3]
        if call.value.shape != call.key.shape or call.query.shape[3] != head_dim:
            raise _Unfit(
                f"keys and values differ in shape ({list(call.key.shape[1::2])} and "
                f"{list(call.value.shape[1::2])} heads and values)"
            )
        scale = call.extras.get("scaling")
        self.rules[layer] = AttentionRule(
            head_dim**-0.5 if scale is None else float(scale),
            _window_of(call.mask),
            float(call.extras.get("softcap") or 0.0),
        )
        self.shapes.add((kv_heads, head_dim))
        return torch.zeros_like(call.query).transpose(1, 2)

    def found(self) -> tuple[list[AttentionRule], int, int]:
        """Rules by layer, kv heads and head_dim. Raises `_Unfit`."""
        if not self.rules:
            raise _Unfit("it does not attend through transformers' attention interface")
        if sorted(self.rules) != list(range(len(self.rules))):
            raise _Unfit(
                f"only layers {sorted(self.rules)} attend: others keep a state that is not paged"
            )
        if len(self.shapes) > 1:
            raise _Unfit(
                f"its layers differ in kv heads and head_dim ({sorted(self.shapes)}), "
                "the KV cache has one shape"
            )
        kv_heads, head_dim = next(iter(self.shapes))
        return [self.rules[layer] for layer in range(len(self.rules))], kv_heads, head_dim


def _refuse_extras(call: _Call) -> None:
    for name, value in call.extras.items():
        changes = isinstance(value, Tensor) or bool(value)
        if changes and name not in _HARMLESS:
            raise _Unfit(f"its attention takes {name}, which paged attention does not know")
    causal = call.extras.get("is_causal")
    if (getattr(call.module, "is_causal", True) if causal is None else causal) is False:
        raise _Unfit("its attention is not causal")


def _window_of(mask: Tensor | None) -> int:
    """What `_probing_mask` noted; a class that computes another mask from it loses the note."""
    if mask is None:
        raise _Unfit("it builds no mask through transformers' mask interface")
    window: int | None = getattr(mask, _WINDOW, None)
    if window is None:
        raise _Unfit("it changes its attention mask, which paged attention cannot follow")
    return window


class _Current:
    """The step that runs: all attention modules of one model hold the same one."""

    step: _Step | _Probe | None = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for every layer."""
    current: _Current = getattr(module, _CURRENT)
    assert current.step is not None, "attention outside of a step"
    call = _Call(module, query, key, value, attention_mask, extras)
    return current.step.attend(call), None


def _probing_mask(
    *, q_length: int, kv_length: int, mask_function: Callable[..., Any], config: Any, **_: Any
) -> Tensor:
    """Zeros [1, 1, q_length, kv_length] that note the mask's window. Raises `_Unfit` if none fits.

    Two of the last rows over the longest context tell: full rows are causal, others must show the
    same number of last positions.
    """
    length = min(_positions(config), _MAX_LEN)
    columns, zero = torch.arange(length), torch.tensor(0)
    widths: list[int] = []
    for row in (length - 1, length - 2):
        seen = torch.as_tensor(mask_function(zero, zero, torch.tensor(row), columns))
        seen = seen.expand(length)
        width = int(seen.sum())
        if not bool(seen[row + 1 - width : row + 1].all()):
            raise _Unfit("its attention mask is neither causal nor a sliding window")
        widths.append(width)
    if widths == [length, length - 1]:
        window = 0
    elif widths[0] == widths[1]:
        window = widths[0]
    else:
        raise _Unfit("its attention mask is neither causal nor a sliding window")
    mask: Tensor = torch.zeros((1, 1, q_length, kv_length))
    setattr(mask, _WINDOW, window)
    return mask


class _Hidden(tuple[Tensor]):
    """What a base model returns: hidden states, and None of all else that a class may ask for."""

    @property
    def last_hidden_state(self) -> Tensor:
        """float [1, n, hidden_size]."""
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _GivenHidden(nn.Module):
    """Stands where the base model was: the class's own forward then goes from hidden to logits."""

    @property
    def decoder(self) -> _GivenHidden:
        """OPT asks the base model's decoder."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Hidden:
        return _Hidden((inputs_embeds,))


class _LinearModule(nn.Module):
    """A `Linear` in the place of nn.Linear."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.linear(x)
        return self.linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class HfModel:
    """See `engine.models.base.Model`."""

    def __init__(self, causal: Any) -> None:
        """`causal` is transformers' model with its head. Raises `_Unfit`."""
        self._causal = causal
        self._base: Any = causal.base_model
        self._prefix: str = causal.base_model_prefix
        self._given = _GivenHidden()
        if self._base is causal:
            raise _Unfit("it has no base model without a head")
        if "position_ids" not in inspect.signature(self._base.forward).parameters:
            raise _Unfit("it takes no position_ids")
        self._rules: list[AttentionRule] = []
        self._current = _Current()
        for module in self._base.modules():
            setattr(module, _CURRENT, self._current)
        self._nbytes = _nbytes_of(causal)

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        return self._nbytes

    def probe(self, max_len: int) -> ModelShape:
        """Learns how the layers attend; from then on the model serves. Raises `_Unfit`."""
        probe = _Probe()
        self._causal.set_attn_implementation(_PROBING)
        ids = torch.arange(_PROBE_TOKENS, device=self._causal.device)[None]
        hidden = self._run(probe, input_ids=ids)
        rules, kv_heads, head_dim = probe.found()
        # A window that no context exceeds is none.
        self._rules = [r._replace(window=r.window * (r.window < max_len)) for r in rules]
        self._serve()
        return ModelShape(
            vocab_size=self.logits(hidden).shape[-1],
            hidden_size=hidden.shape[-1],
            max_len=max_len,
            num_layers=len(rules),
            kv_heads=kv_heads,
            head_dim=head_dim,
            windows=tuple(sorted({rule.window for rule in self._rules})),
        )

    def own_logits(self, ids: Tensor) -> Tensor:
        """int64 [n] -> float32 [n, vocab_size] of a whole text, with the class's own attention."""
        setattr(self._causal, self._prefix, self._base)
        self._causal.set_attn_implementation(_OWN)
        try:
            scores: Tensor = self._causal(input_ids=ids[None], use_cache=False).logits
            return scores[0].float()
        finally:
            self._serve()

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        kv: list[Tensor],
        attention: StepAttention,
    ) -> Tensor:
        """See `engine.models.base.Model`: hidden states after the final norm."""
        step = _Step(self._rules, kv, attention)
        return self._run(step, input_ids=ids[None], position_ids=positions[None])

    def last_hidden(self, hidden: Tensor) -> Tensor:
        """See `engine.models.base.Model`: the base model has normed it."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See `engine.models.base.Model`."""
        scores: Tensor = self._causal(inputs_embeds=hidden[None], use_cache=False).logits
        return scores[0].float()

    def _run(self, step: _Step | _Probe, **inputs: Tensor) -> Tensor:
        """[1, n] inputs -> [n, hidden_size]."""
        self._current.step = step
        try:
            hidden: Tensor = self._base(**inputs, use_cache=False).last_hidden_state
        finally:
            self._current.step = None
        return hidden[0]

    def _serve(self) -> None:
        self._causal.set_attn_implementation(_SERVING)
        setattr(self._causal, self._prefix, self._given)


def build_fallback(
    folder: Path, model_config: Mapping[str, Any], target: Target, *, made_up: bool = False
) -> tuple[HfModel, ModelShape]:
    """Loads a folder's model through transformers; `made_up` makes random weights.

    Raises `ModelError` naming the architecture and why it cannot be served.
    """
    name = architecture_of(model_config) or "(none named)"
    with refusing(name):
        transformers = _transformers()
        kind, settings = _class_of(transformers, name, model_config)
        max_len = min(target.max_len or _MAX_LEN, _positions(settings), _MAX_LEN)
        _refuse_growing_rope(settings, max_len)
        causal = _load(kind, settings, folder, target, made_up)
        _place(causal, target)
        model = HfModel(causal)
        return model, model.probe(max_len)


@contextlib.contextmanager
def refusing(name: str) -> Generator[None]:
    """Whatever fails inside becomes a `ModelError` that names the architecture; want of memory not.

    transformers' classes raise anything when they are given what they do not expect.
    """
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except _Unfit as reason:
        raise ModelError(f"architecture {name} cannot be served: {reason}") from reason
    except Exception as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(
            f"architecture {name} cannot be served: transformers' code fails under paged "
            f"attention ({what})"
        ) from error


def _transformers() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
        attention: Any = importlib.import_module("transformers.modeling_utils")
        masks: Any = importlib.import_module("transformers.masking_utils")
    except ImportError as error:
        raise _Unfit(f"it needs the package transformers ({error}): {REMEDY}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in (_PROBING, _SERVING):
        attention.AttentionInterface.register(name, _attention)
    masks.AttentionMaskInterface.register(_PROBING, _probing_mask)
    return transformers


def _class_of(transformers: Any, name: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' own class of a causal language model, and its configuration object."""
    model_type = config.get("model_type")
    configs = transformers.CONFIG_MAPPING
    if model_type not in configs:
        code = " (the model folder's own code is never run)" if config.get("auto_map") else ""
        raise _Unfit(f"transformers {transformers.__version__} has no {model_type!r}{code}")
    own = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        settings = configs[model_type].from_dict(own)
    except (TypeError, ValueError, KeyError) as error:
        raise _Unfit(f"config.json is not what transformers expects ({error})") from error
    if settings.is_encoder_decoder:
        raise _Unfit("it is an encoder with a decoder, one KV cache is not enough")
    kinds = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), ())
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    found = next((kind for kind in kinds if kind.__name__ == name), None)
    if found is None:
        known = ", ".join(kind.__name__ for kind in kinds) or "none"
        raise _Unfit(f"transformers' language models of type {model_type!r} are: {known}")
    if found._is_stateful:
        raise _Unfit("it keeps a recurrent state besides keys and values")
    return found, settings


def _positions(settings: Any) -> int:
    """The longest context. Raises `_Unfit` if the configuration does not say."""
    found = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        raise _Unfit("config.json: max_position_embeddings is missing")
    return found


def _refuse_growing_rope(settings: Any, max_len: int) -> None:
    """Longrope takes other frequencies for a whole batch as soon as one text of it is long."""
    rope = getattr(settings, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if not any(part.get("rope_type") == "longrope" for part in kinds):
        return
    given = [part.get("original_max_position_embeddings") for part in kinds]
    short = getattr(settings, "original_max_position_embeddings", None) or next(filter(None, given))
    if max_len > short:
        raise _Unfit(f"its longrope changes beyond {short} positions: pass --max-len {short}")


def _load(kind: Any, settings: Any, folder: Path, target: Target, made_up: bool) -> Any:
    if made_up:
        made = kind._from_config(settings, dtype=target.dtype, attn_implementation=_OWN)
        return made.eval()
    if folder.suffix == ".gguf":
        raise _Unfit("GGUF files of it cannot be read: take the original folder")
    try:
        causal, info = kind.from_pretrained(
            folder,
            config=settings,
            dtype=target.dtype,
            attn_implementation=_OWN,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            use_safetensors=find_weight_files(folder).format == "safetensors",
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise _Unfit(f"transformers cannot load {folder}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise _Unfit(f"weight {missing[0]} is missing in {folder} ({len(missing)} are)")
    return causal


def _place(causal: Any, target: Target) -> None:
    """Linear layers by the target's methods, one by one, and the rest, onto the target's device."""
    head = causal.get_output_embeddings()
    for parent in list(causal.modules()):
        for name, part in list(parent.named_children()):
            weight, bias = _linear_weights(part)
            if weight is None or len(weight) < _MIN_QUANTIZED_ROWS:
                continue
            method = (part is head and target.head_method) or target.method
            weight = weight.detach().to(target.device)
            bias = None if bias is None else bias.detach().to(target.device)
            setattr(parent, name, _LinearModule(method(weight, bias)))
    causal.to(target.device)


def _linear_weights(part: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight [out, in] and bias of nn.Linear and of GPT-2's transposed kind, else nothing."""
    if type(part) is nn.Linear:
        return part.weight, part.bias
    if type(part).__name__ == "Conv1D" and isinstance(weight := part.weight, Tensor):
        bias = part.bias
        return weight.t().contiguous(), bias if isinstance(bias, Tensor) else None
    return None, None


def _nbytes_of(causal: nn.Module) -> int:
    linears = (part.linear for part in causal.modules() if isinstance(part, _LinearModule))
    rest = (*causal.parameters(), *causal.buffers())
    return sum(linear.nbytes for linear in linears) + sum(tensor.nbytes for tensor in rest)
