"""Which kernel multiplies so many tokens with such a layer: ways, defaults, the winner. Pure.

Owns the judgement; must not know torch, clocks or files. Times are measured per card and layer
(`product_tuner`), because no rule fits: which of two libraries is faster, and by up to a tenth,
changes with every size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal, NamedTuple

Form = Literal["plain", "add", "gated"]
Kind = Literal["cublas", "cublaslt", "gemv", "skinny"]

# Numbers of tokens that ways are chosen for: a step takes the choice of the next one. Beyond the
# last, cuBLAS multiplies.
SIZES = (1, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024)
# Another way must be so much faster than the default: less is within the noise of a measurement.
_MARGIN = 0.01
_LONG = 8192
_FEW = 16  # up to here our kernel for several tokens is the default


class Product(NamedTuple):
    """x W^T (+ bias) of one kind of layer; `add`: into a residual; `gated`: activation(gate) * up.

    The shape is that of the weights; a gated layer is two in one.
    """

    form: Form
    outputs: int
    inputs: int
    biased: bool
    dtype: str


class Way(NamedTuple):
    """A library, or a kernel of our own with its numbers: `GemvConfig`'s or `SkinnyConfig`'s."""

    kind: Kind
    numbers: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """As it is kept in files."""
        return " ".join((self.kind, *map(str, self.numbers)))


CUBLAS, CUBLASLT = Way("cublas"), Way("cublaslt")

# Measured on an H100: 14 to 41 us for the four layers of a 6B model, 1 to 5 us less than the worst.
_GEMV, _LONG_GEMV, _GATED_GEMV = (4096, 8, 1), (1024, 4, 1), (4096, 4, 1)
_SKINNY, _BIASED_SKINNY, _GATED_SKINNY = (
    (32, 256, 4, 4, 1), (64, 128, 4, 5, 1), (32, 128, 4, 5, 0),
)  # fmt: skip
# Others that were the fastest for some layer of two 6B models on that card.
_GEMVS = ((4096, 4, 2), (2048, 8, 2), (4096, 8, 2), (4096, 4, 1), (4096, 8, 1))
_SKINNIES: Mapping[int, tuple[tuple[int, ...], ...]] = {
    16: ((32, 256, 4, 4, 1), (32, 256, 4, 4, 0), (64, 128, 4, 5, 1), (64, 128, 4, 5, 0)),
    32: ((64, 128, 4, 5, 1), (64, 128, 4, 5, 0)),
    64: ((128, 64, 8, 4, 1), (128, 64, 4, 5, 0)),
}


def size_of(rows: int) -> int:
    """The one of `SIZES` whose choice `rows` tokens take; 0: none."""
    return SIZES[bisect_left(SIZES, rows)] if rows <= SIZES[-1] else 0


def default_way(product: Product, size: int, *, tensor_cores: bool) -> Way:
    """Until something was measured. `tensor_cores`: those that Triton has for 16 bits."""
    gated = product.form == "gated"
    if size == 1:
        return Way("gemv", _GATED_GEMV if gated else _plain_gemv(product))
    if not 0 < size <= _FEW or not tensor_cores:
        return CUBLAS
    if gated:
        return Way("skinny", _GATED_SKINNY)
    wide = product.biased and product.form == "plain"
    return Way("skinny", _BIASED_SKINNY if wide else _SKINNY)


def candidates(product: Product, size: int, *, tensor_cores: bool) -> tuple[Way, ...]:
    """What is worth measuring, the default first."""
    ways = [default_way(product, size, tensor_cores=tensor_cores), CUBLAS, CUBLASLT]
    if size == 1:
        # Gated, a program computes one pair of rows: the last number means nothing.
        some = _GEMVS if product.form != "gated" else _GEMVS[-2:]
        ways += [Way("gemv", numbers) for numbers in some]
    elif tensor_cores:
        ways += [Way("skinny", numbers) for numbers in _SKINNIES.get(max(size, _FEW), ())]
    return tuple(dict.fromkeys(ways))


def winner(times_s: Mapping[Way, float], default: Way) -> Way:
    """The fastest; the default where that gains next to nothing, or nothing could be measured.

    A way that cannot run has the time infinity.
    """
    best = min(times_s, key=times_s.__getitem__, default=default)
    known = times_s.get(default, float("inf"))
    return best if times_s.get(best, known) < known * (1 - _MARGIN) else default


def entry_name(product: Product, size: int) -> str:
    """The name of one choice in files."""
    form, outputs, inputs, biased, dtype = product
    return f"{form}{'+bias' if biased else ''} {outputs}x{inputs} {dtype} {size}"


def known_way(text: str | None, among: tuple[Way, ...]) -> Way | None:
    """The candidate that a file names; None for one that is none (any more)."""
    return next((way for way in among if way.text == text), None)


def _plain_gemv(product: Product) -> tuple[int, ...]:
    return _LONG_GEMV if product.inputs > _LONG else _GEMV
