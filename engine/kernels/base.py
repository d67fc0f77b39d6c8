"""Operations of a forward pass that a card does better in one kernel than torch in several.

Owns nothing, imports no torch. Without an implementation (no card, no Triton) the parts of the
model use torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]


class Fused(Protocol):
    """Chosen once in the device's builder."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., size] -> the same shape and type; see `engine.models.parts.RmsNorm`."""
        ...

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """[n, 2 * size], gates first -> activation(gate) * up, [n, size]."""
        ...

    def embed(self, ids: Tensor, table: Tensor, scale: float) -> Tensor:
        """Rows `ids` of the table, times scale."""
        ...
