"""Builds the device of an engine: model files -> model, KV memory, batch, runner.

Owns nothing that lasts. The one place that chooses device, type, backend and kind of model.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from msgspec.structs import replace

from engine.config import DTypeName, EngineConfig, ModelError
from engine.device.batch import Batch
from engine.device.encoding import build_encoder_device
from engine.device.heap import giving_back
from engine.device.kv import KvCache
from engine.device.memory import Guarded, num_blocks
from engine.device.runner import Runner
from engine.device.threads import ThreadGovernor
from engine.device.warm_up import warm_up
from engine.device.weights import open_model
from engine.kernels.base import Fused
from engine.kernels.launch import has_triton
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
from engine.quant.dense_gpu import fast_products
from engine.quant.methods import capturable, head_method, linear_method
from engine.quant.product_file import ProductFile, default_path

if TYPE_CHECKING:
    from engine.quant.fast_products import FastProducts
    from engine.quant.product_tuner import ProductTuner

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
    if device.type == "cuda":
        # Graphs cannot be captured on the default stream; and it would wait for all others.
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    model_config, source = open_model(Path(config.model), config.load_format, device)
    with giving_back(), torch.inference_mode():
        file = _product_file(device)
        products = fast_products(device, dtype, file.load() if file else None)
        method = linear_method(config.quant, device, dtype, products)
        head = head_method(config.quant, device, dtype, products)
        target = Target(device, dtype, method, config.max_len, head, _fused(device))
        if is_encoder(model_config):
            built = Device(*build_encoder_device(config, model_config, source, target))
        else:
            tuner = _tuner(products, file) if products and file else None
            built = _causal_device(config, model_config, source, target, tuner)
    load_s = time.monotonic() - began_s
    return Device(Guarded(built.runner), replace(built.limits, load_s=load_s))


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


def _fused(device: torch.device) -> Fused | None:
    """Our own kernels, on a card and with a Triton to compile them."""
    if device.type != "cuda" or not has_triton():
        return None
    from engine.kernels.fused import TritonKernels  # imports Triton

    return TritonKernels()


def _product_file(device: torch.device) -> ProductFile | None:
    """What was measured on such a card before, with this software."""
    if device.type != "cuda" or not has_triton():
        return None
    software = f"torch {torch.__version__}, triton {importlib.metadata.version('triton')}"
    label = f"{torch.cuda.get_device_name(device)}, {software}"
    return ProductFile(default_path(os.environ), label, _report)


def _tuner(products: FastProducts, file: ProductFile) -> ProductTuner:
    from engine.quant.product_tuner import CardTimer, ProductTuner  # imports Triton

    return ProductTuner(products, CardTimer(), file)


def _report(line: str) -> None:
    sys.stderr.write(f"engine: {line}\n")


def _causal_device(
    config: EngineConfig,
    model_config: Mapping[str, Any],
    source: TensorSource,
    target: Target,
    tuner: ProductTuner | None,
) -> Device:
    """The generic decoder where it covers the architecture, else transformers' own classes."""
    if not is_native(model_config):
        from engine.device.fallback import load_fallback  # needs the optional transformers

        return _with_memory(config, *load_fallback(config, model_config, target), target)
    spec = read_spec(model_config, config.rope_rule)
    served = target._replace(max_len=min(config.max_len or spec.max_len, spec.max_len))
    names, made_up = weight_names_of(model_config), config.load_format == "dummy"
    model = build_decoder(spec, names, source, served, made_up=made_up)
    native = _Native(capturable(config.quant) and spec.experts is None, tuner)
    return _with_memory(config, model, shape_of(spec), target, native)


def _with_memory(
    config: EngineConfig,
    model: Model,
    shape: ModelShape,
    target: Target,
    native: _Native | None = None,
) -> Device:
    """`native` None: the model is not of our own kernels."""
    max_len = min(config.max_len or shape.max_len, shape.max_len)
    block_bytes = config.block_size * shape.kv_bytes_per_token(target.dtype.itemsize)
    blocks = num_blocks(config, block_bytes, max_len)
    sizes = _Sizes(max_len, blocks)
    if native is None or target.fused is None:
        runner, kv_bytes = _reference_runner(config, shape, model, target, sizes)
    else:
        runner, kv_bytes = _gpu_runner(config, shape, model, target, sizes, native)
    warm_up(runner, min(_WARM_UP_TOKENS, max_len - 1, blocks * config.block_size - 1), config)
    limits = Limits(
        max_len=max_len,
        vocab_size=shape.vocab_size,
        block_size=config.block_size,
        num_blocks=blocks,
        max_batch=config.max_batch,
        weights_bytes=model.nbytes,
        kv_bytes=kv_bytes,
        device=config.device,
        dtype=str(target.dtype).removeprefix("torch."),
        embedding_size=shape.hidden_size,
        quant=config.quant,
    )
    return Device(runner, limits)


class _Native(NamedTuple):
    """Of a model of our own kernels: whether graphs can hold it, who measures its products."""

    graphs: bool
    tuner: ProductTuner | None


class _Sizes(NamedTuple):
    max_len: int
    num_blocks: int


def _reference_runner(
    config: EngineConfig, shape: ModelShape, model: Model, target: Target, sizes: _Sizes
) -> tuple[RunnerLike, int]:
    """Plain torch on any device, and the bytes of its KV cache."""
    device, dtype, block_size = target.device, target.dtype, config.block_size
    cache = KvCache(shape, sizes.num_blocks, block_size, dtype, device)
    batch = Batch(config.max_batch, sizes.max_len, block_size, device, dtype, shape.windows)
    runner = Runner(model, cache, batch, ThreadGovernor(config.threads), config.text_ids)
    return runner, cache.nbytes


def _gpu_runner(
    config: EngineConfig,
    shape: ModelShape,
    model: Model,
    target: Target,
    sizes: _Sizes,
    native: _Native,
) -> tuple[RunnerLike, int]:
    """Our own kernels on a card, and the bytes of their KV cache."""
    from engine.attention.paged_prefill import prefill_tile  # imports Triton, as do the others
    from engine.device.gpu_batch import GpuBatch
    from engine.device.gpu_runner import GpuRunner, RunnerSettings

    device, block_size = target.device, config.block_size
    cache = KvCache(shape, sizes.num_blocks + 1, block_size, target.dtype, device)
    properties = torch.cuda.get_device_properties(device)
    compute = (properties.major, properties.minor)
    settings = RunnerSettings(
        device=device,
        multiprocessors=properties.multi_processor_count,
        max_batch=config.max_batch,
        max_len=sizes.max_len,
        block_size=block_size,
        pad_kv_slot=sizes.num_blocks * block_size,
        long_tile=prefill_tile(shape.head_dim, target.dtype, compute),
        text_ids=config.text_ids,
        graphs=native.graphs,
    )
    tile, step_tokens = settings.long_tile, max(config.step_tokens, config.max_batch)
    batch = GpuBatch(config.max_batch, sizes.max_len, step_tokens, block_size, tile, device)
    runner = GpuRunner(model, shape, cache, batch, settings, native.tuner)
    return runner, cache.nbytes
