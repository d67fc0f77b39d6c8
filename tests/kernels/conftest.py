"""Kernel tests run compiled on a CUDA device, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

# Triton reads this when a kernel is defined: before any test module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def mend_interpreter() -> None:
    """Loop bounds that are run-time values: NumPy 2.4 makes no int of an array of one value."""
    if importlib.util.find_spec("triton") is None or "TRITON_INTERPRET" not in os.environ:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


mend_interpreter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    pytest.importorskip("triton")
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
