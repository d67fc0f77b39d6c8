"""The Triton kernels between the linear layers, as the decoder asks for them. Owns nothing."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.base import Activation
from engine.kernels.gated import embed, gated
from engine.kernels.norm import rms_norm


class TritonKernels:
    """See `engine.kernels.base.Fused`."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return gated(gate_up, activation)

    def embed(self, ids: Tensor, table: Tensor, scale: float) -> Tensor:
        return embed(ids, table, scale)
