"""LLM.int8() and NF4 through bitsandbytes' functional interface: no modules, no transformers.

Owns the quantized weights of one layer. bitsandbytes is imported when a method is asked for, so
that machines without it can import this file.

Sources: LLM.int8() (arXiv 2208.07339): int8 products of rows and output channels, values of 6 and
more in the weights' own type. NF4 (arXiv 2305.14314): 4 bits and a float32 scale per 64 values.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelError, QuantName
from engine.quant.base import LinearMethod

REMEDY = "pip install 'llm-router[bitsandbytes]'"

_OUTLIER = 6.0
_NF4_GROUP = 64  # values under one scale
# Weights are quantized, and on a CPU widened, so many values at a time: 2 MB of float32.
_BLOCK_VALUES = 1 << 19


def bnb_method(quant: QuantName) -> LinearMethod:
    """The method of `bnb-int8` or `nf4`. Raises `ModelError` if bitsandbytes is not usable."""
    functional = _functional(quant)
    linear = LlmInt8Linear if quant == "bnb-int8" else Nf4Linear

    def method(weight: Tensor, bias: Tensor | None) -> LlmInt8Linear | Nf4Linear:
        return linear(functional, weight, bias)

    return method


class LlmInt8Linear:
    """See `engine.quant.base.Linear`: activations are quantized too, but for outlier columns."""

    def __init__(self, functional: Any, weight: Tensor, bias: Tensor | None) -> None:
        self._functional = functional
        self._values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self._maxima = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        for some in _row_blocks(*weight.shape):
            quantized = functional.int8_vectorwise_quant(_as_quantizable(weight[some]))
            self._values[some], self._maxima[some] = quantized[:2]
        self._bias = bias

    @property
    def nbytes(self) -> int:
        own = self._values.nbytes + self._maxima.nbytes
        return own + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # the CUDA kernels take no strides: they would read other values
        digits, maxima, outliers = self._functional.int8_vectorwise_quant(
            _as_quantizable(x), threshold=_OUTLIER
        )
        product = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        y: Tensor = product(x, digits, self._values, maxima, self._maxima, outliers, None)[0]
        return y if self._bias is None else y.add_(self._bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual.add_(self(x))


class Nf4Linear:
    """See `engine.quant.base.Linear`. Kept in blocks of rows, each with its own scales.

    On a GPU there is one block and bitsandbytes' product (for rows of whole groups); on a CPU,
    where that would widen the whole weight, blocks are widened one after the other.
    """

    def __init__(self, functional: Any, weight: Tensor, bias: Tensor | None) -> None:
        self._functional = functional
        self._rows, self._columns = weight.shape
        blocks = _row_blocks(self._rows, self._columns, multiple=_NF4_GROUP)
        if weight.is_cuda:
            blocks = [slice(0, self._rows)]
        self._blocks = [(some, *self._quantize(weight[some])) for some in blocks]
        self._bias = bias

    @property
    def nbytes(self) -> int:
        own: int = sum(values.nbytes + state.absmax.nbytes for _, values, state in self._blocks)
        return own + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.shape[-1] % _NF4_GROUP == 0:
            [(_, values, state)] = self._blocks
            product = importlib.import_module("bitsandbytes").matmul_4bit
            whole: Tensor = product(x.contiguous(), values.t(), quant_state=state, bias=self._bias)
            return whole
        y = x.new_empty(len(x), self._rows)
        for some, values, state in self._blocks:
            groups = self._functional.dequantize_4bit(values, state)
            used = (some.stop - some.start) * self._columns
            y[:, some] = F.linear(x, groups.flatten()[:used].view(-1, self._columns))
        return y if self._bias is None else y.add_(self._bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual.add_(self(x))

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Any]:
        if not weight.is_cuda:
            # As rows of one group each: 0.50's CPU code widens other rows wrongly, such as of 96.
            weight = F.pad(weight.flatten(), (0, -weight.numel() % _NF4_GROUP)).view(-1, _NF4_GROUP)
        quantize = self._functional.quantize_4bit
        values, state = quantize(weight.contiguous(), blocksize=_NF4_GROUP, quant_type="nf4")
        return values, state


def _as_quantizable(x: Tensor) -> Tensor:
    """bitsandbytes' CUDA kernel takes float16 only."""
    return x.to(torch.float16 if x.is_cuda else torch.float32)


def _row_blocks(rows: int, columns: int, multiple: int = 1) -> list[slice]:
    step = max(1, _BLOCK_VALUES // columns // multiple) * multiple
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def _functional(quant: QuantName) -> Any:
    """bitsandbytes.functional, imported so that it fetches nothing and says nothing.

    On some CPUs its import downloads and runs a binary if a package named `kernels` is installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    hidden = modules.get("kernels")
    modules["kernels"] = None
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ModuleNotFoundError as error:
        raise ModelError(
            f"quant {quant!r} needs {error.name}, which is not installed: {REMEDY}"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(f"quant {quant!r} needs bitsandbytes, which fails: {error}") from error
    finally:
        if hidden is None:
            del modules["kernels"]
        else:
            modules["kernels"] = hidden
