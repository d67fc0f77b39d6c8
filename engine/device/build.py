"""Builds the device of an engine: model files -> model, KV memory, batch, runner.

Owns nothing that lasts. The one place that chooses device, type, backend and kind of model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace

from engine.config import DTypeName, EngineConfig, ModelError
from engine.device.batch import Batch
from engine.device.encoding import build_encoder_device
from engine.device.heap import giving_back
from engine.device.kv import KvCache
from engine.device.memory import num_blocks
from engine.device.runner import Runner, warm_up
from engine.device.threads import ThreadGovernor
from engine.device.weights import open_model
from engine.models.base import Model, ModelShape
from engine.models.encoder import is_encoder
from engine.models.registry import (
    Target,
    TensorSource,
    build_decoder,
    is_native,
    read_spec,
    shape_of,
    weight_names_of,
)
from engine.plan import RunnerLike
from engine.protocol import Limits
from engine.quant.methods import head_method, linear_method

_WARM_UP_TOKENS = 63
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Device(NamedTuple):
    """A loaded model, ready to run plans, and the facts that only it knows."""

    runner: RunnerLike
    limits: Limits


def build_device(config: EngineConfig) -> Device:
    """Loads the model and takes the KV memory. Raises `ModelError` or `NotEnoughMemory`."""
    began_s = time.monotonic()
    torch.set_num_threads(config.threads)
    device = compute_device(config.device)
    dtype = compute_dtype(config.dtype, device)
    model_config, source = open_model(Path(config.model), config.load_format, device)
    with giving_back(), torch.inference_mode():
        method = linear_method(config.quant, device, dtype)
        head = head_method(config.quant, device, dtype)
        target = Target(device, dtype, method, config.max_len, head)
        if is_encoder(model_config):
            built = Device(*build_encoder_device(config, model_config, source, target))
        else:
            model, shape = _causal_model(config, model_config, source, target)
            built = _with_memory(config, shape, model, target)
    return built._replace(limits=replace(built.limits, load_s=time.monotonic() - began_s))


def compute_device(name: str) -> torch.device:
    """The device called cpu or cuda:N. Raises `ModelError` if it is not there or not known."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is not known (cpu and cuda:N are)") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ModelError(f"device {name!r} is not supported (cpu and cuda:N are)")
    if not torch.cuda.is_available():
        build = torch.version.cuda or "no CUDA at all"
        raise ModelError(
            f"device {name!r} cannot be used: torch {torch.__version__} (built for {build}) finds "
            "no GPU; check the driver with nvidia-smi"
        )
    return device


def compute_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU, bfloat16 on a GPU that has it and float16 on one that has not."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return _DTYPES[name]


def _causal_model(
    config: EngineConfig, model_config: Mapping[str, Any], source: TensorSource, target: Target
) -> tuple[Model, ModelShape]:
    """The generic decoder where it covers the architecture, else transformers' own classes."""
    if not is_native(model_config):
        from engine.device.fallback import load_fallback  # needs the optional transformers

        return load_fallback(config, model_config, target)
    spec = read_spec(model_config, config.rope_rule)
    served = target._replace(max_len=min(config.max_len or spec.max_len, spec.max_len))
    names, made_up = weight_names_of(model_config), config.load_format == "dummy"
    model = build_decoder(spec, names, source, served, made_up=made_up)
    return model, shape_of(spec)


def _with_memory(config: EngineConfig, shape: ModelShape, model: Model, target: Target) -> Device:
    device, dtype = target.device, target.dtype
    max_len = min(config.max_len or shape.max_len, shape.max_len)
    block_bytes = config.block_size * shape.kv_bytes_per_token(dtype.itemsize)
    blocks = num_blocks(config, block_bytes, max_len)
    cache = KvCache(shape, blocks, config.block_size, dtype, device)
    batch = Batch(config.max_batch, max_len, config.block_size, device, dtype, shape.windows)
    threads = ThreadGovernor(config.threads)
    runner = Runner(model, cache, batch, threads, config.text_ids)
    warm_up(runner, min(_WARM_UP_TOKENS, max_len - 1, blocks * config.block_size - 1), config)
    limits = Limits(
        max_len=max_len,
        vocab_size=shape.vocab_size,
        block_size=config.block_size,
        num_blocks=blocks,
        max_batch=config.max_batch,
        weights_bytes=model.nbytes,
        kv_bytes=cache.nbytes,
        device=config.device,
        dtype=str(dtype).removeprefix("torch."),
        embedding_size=shape.hidden_size,
        quant=config.quant,
    )
    return Device(runner, limits)
