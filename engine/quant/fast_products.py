"""Products of a layer's weights with so many tokens, each by the way that was chosen for it.

Owns the choices, and meanwhile some layers' weights to measure with.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.base import Activation
from engine.kernels.gated import gated
from engine.kernels.gemv import Epilogue, GemvConfig, gemv, gemv_gated
from engine.kernels.skinny import SkinnyConfig, skinny, skinny_gated
from engine.quant.product_choice import (
    SIZES,
    Form,
    Product,
    Way,
    candidates,
    default_way,
    entry_name,
    known_way,
    size_of,
)

# For older cards Triton 3.6 compiles products of several tokens without tensor cores, and with
# spilled registers (seen in what it makes for a T4).
_TENSOR_CORES = (8, 0)
# Weights that a measurement reads by turns, so that none is still in the card's cache.
_SAMPLE_BYTES = 256 << 20


class Layer(NamedTuple):
    """Weights [out, in] and bias [out] of one layer."""

    weight: Tensor
    bias: Tensor | None


class FastProducts:
    """x [n, in], weight [out, in], bias [out] or None."""

    def __init__(
        self,
        capability: tuple[int, int] = _TENSOR_CORES,
        known: Mapping[str, str] | None = None,
    ) -> None:
        """`known`: choices by `entry_name`, as text."""
        self._tensor_cores = capability >= _TENSOR_CORES
        self._known = known or {}
        self._ways: dict[tuple[Product, int], Way] = {}
        self._unmeasured: dict[Product, list[Layer]] = {}

    # -- products

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b."""
        way = self._way("plain", len(x), weight, bias)
        return multiply(way, x, Layer(weight, bias))

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
        """residual += x W^T + b."""
        way = self._way("add", len(x), weight, bias)
        add_product(way, x, Layer(weight, bias), residual)

    def gated(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        """activation(gate) * up of x W^T + b, the gate's rows first."""
        way = self._way("gated", len(x), weight, bias)
        return gated_product(way, x, Layer(weight, bias), activation)

    # -- choices

    @property
    def unmeasured(self) -> Mapping[Product, list[Layer]]:
        """Products that were asked for and have sizes without a choice, with layers to try."""
        return self._unmeasured

    def candidates(self, product: Product, size: int) -> tuple[Way, ...]:
        """See `product_choice.candidates`."""
        return candidates(product, size, tensor_cores=self._tensor_cores)

    def missing(self, product: Product) -> list[int]:
        """Sizes of the product that have no choice yet."""
        return [size for size in SIZES if (product, size) not in self._ways]

    def choose(self, product: Product, size: int, way: Way) -> None:
        """From now on `way` computes it."""
        self._ways[product, size] = way
        if not self.missing(product):
            self._unmeasured.pop(product, None)

    def chosen(self, product: Product) -> dict[int, Way]:
        """The product's choices by size."""
        return {size: self._ways[product, size] for size in SIZES if (product, size) in self._ways}

    def _way(self, form: Form, rows: int, weight: Tensor, bias: Tensor | None) -> Way:
        outputs, inputs = weight.shape
        dtype = str(weight.dtype).removeprefix("torch.")
        product, size = Product(form, outputs, inputs, bias is not None, dtype), size_of(rows)
        found = self._ways.get((product, size))
        if product in self._unmeasured or (found is None and size):
            self._meet(product, Layer(weight, bias))
            found = self._ways.get((product, size))
        return found or default_way(product, size, tensor_cores=self._tensor_cores)

    def _meet(self, product: Product, layer: Layer) -> None:
        """Takes over what is known of the product, and the layer as a sample for what is not."""
        samples = self._unmeasured.get(product)
        if samples is None:
            for size in SIZES:
                text = self._known.get(entry_name(product, size))
                way = known_way(text, self.candidates(product, size))
                if way is not None:
                    self._ways[product, size] = way
            if not self.missing(product):
                return
            samples = self._unmeasured[product] = []
        if len(samples) * layer.weight.nbytes >= _SAMPLE_BYTES:
            return
        if all(layer.weight is not sample.weight for sample in samples):
            samples.append(layer)


def multiply(way: Way, x: Tensor, layer: Layer) -> Tensor:
    """x W^T + b."""
    weight, bias = layer
    if way.kind == "gemv":
        return gemv(x, weight, Epilogue(bias), GemvConfig(*way.numbers))
    if way.kind == "skinny":
        return skinny(x, weight, Epilogue(bias), _skinny_config(way))
    with _library(way, x):
        return F.linear(x, weight, bias)


def add_product(way: Way, x: Tensor, layer: Layer, residual: Tensor) -> None:
    """residual += x W^T + b."""
    weight, bias = layer
    if way.kind == "gemv":
        gemv(x, weight, Epilogue(bias, residual), GemvConfig(*way.numbers))
        return
    if way.kind == "skinny":
        skinny(x, weight, Epilogue(bias, residual), _skinny_config(way))
        return
    with _library(way, x):
        residual.addmm_(x, weight.t())
    if bias is not None:
        residual.add_(bias)


def gated_product(way: Way, x: Tensor, layer: Layer, activation: Activation) -> Tensor:
    """activation(gate) * up of x W^T + b, the gate's rows first."""
    weight, bias = layer
    if way.kind == "gemv":
        return gemv_gated(x, weight, activation, Epilogue(bias), GemvConfig(*way.numbers))
    if way.kind == "skinny":
        return skinny_gated(x, weight, activation, Epilogue(bias), _skinny_config(way))
    return gated(multiply(way, x, layer), activation)


def _skinny_config(way: Way) -> SkinnyConfig:
    outputs, inputs, num_warps, num_stages, flipped = way.numbers
    return SkinnyConfig(outputs, inputs, num_warps, num_stages, bool(flipped))


@contextmanager
def _library(way: Way, x: Tensor) -> Generator[None]:
    """torch's products come from cuBLASLt inside, if that is the way; from its default outside."""
    if way.kind != "cublaslt" or not x.is_cuda:
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)
