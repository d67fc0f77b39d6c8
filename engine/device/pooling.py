"""Hidden states -> embeddings: one vector per slot, gathered over the chunks of a prompt.

Owns the vectors in the making. Must not know models or attention. An `Admit` starts a slot's vector
anew, so that a sequence that was preempted begins again at its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.device.sampling import to_host
from engine.plan import Admit, Row
from engine.protocol import Pooling


class _Vector:
    """What is known so far of one sequence's vector, float32 [hidden_size]."""

    __slots__ = ("length", "pooling", "value")

    def __init__(self, pooling: Pooling, length: int) -> None:
        self.pooling = pooling
        self.length = length  # tokens of the whole sequence
        self.value: Tensor | None = None

    def add(self, start: int, hidden: Tensor, final: Callable[[Tensor], Tensor]) -> None:
        """Positions from `start` on, [n, hidden_size] before `final`."""
        match self.pooling.kind:
            case "mean":
                part = final(hidden).float().sum(0) / self.length
                self.value = part if self.value is None else self.value + part
            case "cls":
                if start == 0:
                    self.value = final(hidden[:1])[0].float()
            case "last":
                if start + len(hidden) == self.length:
                    self.value = final(hidden[-1:])[0].float()


class Pooled(NamedTuple):
    """Complete vectors on their way to the host, float32 [len(poolings), hidden_size]."""

    poolings: dict[int, Pooling]
    values: Tensor

    def read(self) -> tuple[dict[int, bytes], dict[int, str]]:
        """Embeddings, cut and scaled as asked, and what failed. No earlier than the step's end."""
        embeddings: dict[int, bytes] = {}
        failed: dict[int, str] = {}
        for (index, pooling), value in zip(self.poolings.items(), self.values, strict=True):
            if pooling.dimensions:
                value = value[: pooling.dimensions]
            if pooling.normalize:  # in float64: no square of a float32 is too large for it
                value = torch.nn.functional.normalize(value.double(), dim=0).float()
            if torch.isfinite(value).all():
                embeddings[index] = value.numpy().astype("<f4").tobytes()
            else:
                failed[index] = "the model produced no finite embedding"
        return embeddings, failed


class SlotPooling:
    """The vectors of all slots that want one."""

    def __init__(self) -> None:
        self._vectors: dict[int, _Vector] = {}

    def admit(self, admits: Iterable[Admit]) -> None:
        """Takes over who wants a vector."""
        for admit in admits:
            if admit.pooling is None:
                self._vectors.pop(admit.slot, None)
            else:
                self._vectors[admit.slot] = _Vector(admit.pooling, len(admit.tokens))

    def add(
        self,
        rows: Sequence[Row],
        last: Sequence[int],
        hidden: Tensor,
        final: Callable[[Tensor], Tensor],
    ) -> Pooled | None:
        """One step: the vectors that are complete, if any; their numbers are indices into `rows`.

        `hidden` is [num_tokens, hidden_size], row i's last token at `last[i]` of it; `final` turns
        rows of it into the states that embeddings are made of.
        """
        done: dict[int, _Vector] = {}
        for index, row in enumerate(rows if self._vectors else ()):
            vector = self._vectors.get(row.slot)
            if vector is None:
                continue
            end = last[index] + 1
            vector.add(row.start, hidden[end - row.count : end], final)
            if row.start + row.count == vector.length:
                done[index] = self._vectors.pop(row.slot)
        if not done:
            return None
        values = [vector.value for vector in done.values() if vector.value is not None]
        poolings = {index: vector.pooling for index, vector in done.items()}
        return Pooled(poolings, to_host(torch.stack(values)))
