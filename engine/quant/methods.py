"""The one choice of how linear layers are stored and multiplied. Owns nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.config import ModelError, QuantName
from engine.quant.base import LinearMethod
from engine.quant.bnb import bnb_method
from engine.quant.dense_gpu import dense_gpu_method
from engine.quant.int8 import int8_method
from engine.quant.packed import cpu_method

if TYPE_CHECKING:
    from engine.quant.fast_products import FastProducts


def linear_method(
    quant: QuantName,
    device: torch.device,
    dtype: torch.dtype,
    products: FastProducts | None = None,
) -> LinearMethod:
    """`products`: those of layers that are not quantized, on a card that has any.

    Raises `ModelError` for a kind that this machine cannot do.
    """
    match quant:
        case "none":
            return cpu_method(dtype) if device.type == "cpu" else dense_gpu_method(products)
        case "int8":
            return int8_method(device)
        case "bnb-int8" | "nf4":
            return bnb_method(quant)
        case "fp8":
            raise ModelError("quant 'fp8' is not built in yet: take int8, bnb-int8 or nf4")


def capturable(quant: QuantName) -> bool:
    """Whether a forward pass can be recorded as a CUDA graph: bitsandbytes looks at its results."""
    return quant in ("none", "int8")


def head_method(
    quant: QuantName,
    device: torch.device,
    dtype: torch.dtype,
    products: FastProducts | None = None,
) -> LinearMethod:
    """The output layer's: int8 wherever the others are quantized at all, also when they get 4 bits.

    A tied embedding stays as it is for look-ups and the head is an int8 copy: at a quarter or half
    of the embedding's size it spares each step the reading of the whole. Measured, perplexity of a
    135M model over tests/data/alice.txt: int8 layers +0.31 %, int8 head besides +0.35 %; NF4 layers
    +27 % with an int8 head, +42 % with an NF4 head.
    """
    return linear_method("none" if quant == "none" else "int8", device, dtype, products)
