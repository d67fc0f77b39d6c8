"""Checks of one stored tensor, the same for every format. Owns nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelError

PLAIN_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


def refuse_packed(name: str, type_name: str) -> ModelError:
    """The error for a weight whose numbers are not plain floats."""
    return ModelError(
        f"weight {name} is stored as {type_name}, not as float32, float16 or bfloat16: weights "
        "quantized before are not supported, take the original checkpoint and pass --quant"
    )


def with_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor itself. Raises `ModelError` if it is shaped otherwise."""
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"weight {name} has shape {list(tensor.shape)}, the config asks for {list(shape)}"
        )
    return tensor


def missing(name: str, where: str) -> ModelError:
    """The error for a weight that no file has."""
    return ModelError(f"weight {name} is missing from the {where}")
