"""Measures the ways to compute a product, one at a time, in moments when nothing else is done.

Owns the times of the product under measurement, and what it will keep. Which way wins is
`product_choice`'s decision, what runs is `fast_products`' affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.quant.fast_products import (
    FastProducts,
    Layer,
    add_product,
    gated_product,
    multiply,
)
from engine.quant.product_choice import Product, Way, entry_name, winner
from engine.quant.product_file import ProductFile

# What a measurement gives: seconds of one run, from a function that runs number i of a series.
Timer = Callable[[Callable[[int], object]], float]

_CANNOT_RUN = float("inf")
_LAUNCHES, _REPLAYS = 12, 5
_SCALE = 0.05  # of made-up activations: their sums stay small, and zeros would be too fast


class _Place(NamedTuple):
    product: Product
    size: int


class ProductTuner:
    """Works through what `products` has not measured."""

    def __init__(self, products: FastProducts, timer: Timer, file: ProductFile) -> None:
        self._products = products
        self._timer = timer
        self._file = file
        self._place: _Place | None = None
        self._times_s: dict[Way, float] = {}
        self._kept: dict[str, str] = {}

    @property
    def pending(self) -> bool:
        """Whether something is left to be measured."""
        return bool(self._products.unmeasured)

    def measure_next(self) -> int:
        """Measures one way, while `pending`.

        Returns the number of tokens whose choice changed with it: what was captured for so many,
        and fewer down to the next size, is out of date. 0: nothing changed.
        """
        if self._place is None:
            product = next(iter(self._products.unmeasured))
            self._place = _Place(product, self._products.missing(product)[0])
            self._times_s = {}
        product, size = self._place
        ways = self._products.candidates(product, size)
        way = ways[len(self._times_s)]
        layers = self._products.unmeasured[product]
        self._times_s[way] = self._measured(product, size, way, layers)
        if len(self._times_s) < len(ways):
            return 0
        self._place = None
        best = winner(self._times_s, ways[0])
        self._products.choose(product, size, best)
        if min(self._times_s.values()) < _CANNOT_RUN:
            self._kept[entry_name(product, size)] = best.text
        if self._kept and not self._products.missing(product):
            self._file.save(self._kept)
        return size if best != ways[0] else 0

    def _measured(self, product: Product, size: int, way: Way, layers: Sequence[Layer]) -> float:
        try:
            return self._timer(_runs(product, size, way, layers))
        except Exception:  # noqa: BLE001 - too much memory or too many registers: it loses
            return _CANNOT_RUN


def _runs(
    product: Product, size: int, way: Way, layers: Sequence[Layer]
) -> Callable[[int], object]:
    """A function that computes the product with made-up tokens and layer number i."""
    weight = layers[0].weight
    x = torch.randn(size, product.inputs, dtype=weight.dtype, device=weight.device) * _SCALE
    residual = torch.zeros(
        (size, product.outputs) if product.form == "add" else 0, dtype=x.dtype, device=x.device
    )

    def run(number: int) -> Tensor:
        layer = layers[number % len(layers)]
        if product.form == "add":
            add_product(way, x, layer, residual)
            return residual
        if product.form == "gated":
            return gated_product(way, x, layer, "silu")
        return multiply(way, x, layer)

    return run


class CardTimer:
    """Seconds of one run on the current card: a graph of some, so that launching costs nothing."""

    def __call__(self, run: Callable[[int], object]) -> float:
        """The least of some replays. Raises what `run` raises."""
        run(0)  # compiles
        stream = torch.cuda.current_stream()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for number in range(_LAUNCHES):
                run(number)
        finally:
            graph.capture_end()
        graph.replay()
        times_ms: list[float] = []
        for _ in range(_REPLAYS):
            begin, end = _event(), _event()
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times_ms.append(begin.elapsed_time(end))
        return min(times_ms) / _LAUNCHES / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
