"""CUDA graphs of whole forward passes, captured when there is time and replayed for ever.

Owns the graphs and their common memory pool. Must not know requests: a shape goes in, the hidden
states of that shape come out. A shape without a graph is launched kernel by kernel, so the first
answers do not wait for captures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.device.step_shape import StepShape

# While requests run, a missing graph is captured only so often: each costs them a pause of tens of
# milliseconds, and the same step launched kernel by kernel is only a little slower.
_CAPTURE_EVERY_S = 0.1

Forward = Callable[[StepShape], Tensor]


class Graphs:
    """Runs `forward` for shapes, by replay where a graph exists."""

    def __init__(
        self,
        forward: Forward,
        wanted: Sequence[StepShape],
        prepare: Callable[[StepShape], object] | None = None,
    ) -> None:
        """`wanted` are captured by `capture_next`, in their order; none: nothing is captured.

        `prepare` runs before each of these: it may load what such steps need besides their graph.
        """
        self._forward = forward
        self._prepare = prepare
        self._wanted = list(wanted)
        self._enabled = bool(wanted)
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # a handle that means something to torch alone
        self._captured_s = float("-inf")

    @property
    def shapes(self) -> frozenset[StepShape]:
        """Those that have a graph."""
        return frozenset(self._graphs)

    def run(self, exact: StepShape, padded: StepShape | None) -> Tensor:
        """Hidden states [exact.tokens or more, hidden_size], valid until the next run.

        `padded` is the shape whose graph serves, if one may: one that is missing is captured, but
        only now and then.
        """
        if padded is not None and self._enabled:
            found = self._graphs.get(padded)
            if found is None and time.monotonic() - self._captured_s > _CAPTURE_EVERY_S:
                found = self._capture(padded)
            if found is not None:
                graph, hidden = found
                graph.replay()
                return hidden
        return self._forward(exact)

    def drop(self, outdated: Callable[[StepShape], bool]) -> None:
        """Forgets graphs whose kernels would be others now; they are wanted again."""
        dropped = [shape for shape in self._graphs if outdated(shape)]
        for shape in dropped:
            del self._graphs[shape]
        self._wanted += dropped
        if not self._graphs:
            self._pool = None  # one that no graph uses is gone

    def capture_next(self) -> bool:
        """Captures one of the wanted shapes; False once all are there.

        What is in the step's buffers is computed on the way, to be computed again.
        """
        while self._wanted:
            shape = self._wanted.pop(0)
            if shape not in self._graphs:
                if self._prepare is not None:
                    self._prepare(shape)
                self._capture(shape)
                return bool(self._wanted)
        return False

    def _capture(self, shape: StepShape) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Kernels are compiled and libraries initialised by a run outside of the capture.
        self._forward(shape)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            hidden = self._forward(shape)
        finally:
            graph.capture_end()
        self._graphs[shape] = (graph, hidden)
        self._captured_s = time.monotonic()
        return graph, hidden
