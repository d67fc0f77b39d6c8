"""How our Triton kernels are launched on a card: what its capability allows.

Owns nothing. Imports no Triton, so that machines without it can ask.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch

_HOPPER = (9, 0)


def has_triton() -> bool:
    """Triton is installed; whether it can compile for a card shows at the first launch."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Kernels run in Triton's interpreter, on the CPU: in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of CUDA device `index`; that of an H100 for -1 (the interpreter)."""
    return _HOPPER if index < 0 else torch.cuda.get_device_capability(index)


@cache
def pdl_options(index: int) -> dict[str, Any]:
    """Launch options for programmatic dependent launch on CUDA device `index` (-1: none).

    With them a kernel may start while its predecessor ends; it must wait (`gdc_wait`) before it
    reads what that one wrote.
    """
    if index < 0 or interpreted() or capability(index) < _HOPPER:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def index_of(device: torch.device) -> int:
    """The argument of `pdl_options` and `capability`: a CUDA device's index, -1 for others."""
    if device.type != "cuda":
        return -1
    return device.index
