"""Graphs of shapes: replayed, forgotten when their kernels change, captured again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.device.graphs import Graphs
from engine.device.step_shape import StepShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [StepShape(tokens, tokens, 0, 16) for tokens in (1, 2, 4)]


def test_dropped_graphs_are_captured_again() -> None:
    device = torch.device("cuda:0")
    with torch.cuda.stream(torch.cuda.Stream(device)), torch.inference_mode():  # type: ignore[no-untyped-call]
        factor = [2.0]
        source = torch.arange(8, dtype=torch.float32, device=device)

        def forward(shape: StepShape) -> Tensor:
            return source[: shape.tokens] * factor[0]

        graphs = Graphs(forward, SHAPES)
        while graphs.capture_next():
            pass
        assert graphs.shapes == set(SHAPES)
        factor[0] = 3.0
        for outdated in (SHAPES[1:2], SHAPES):  # some, then all: their common memory goes, too
            graphs.drop(outdated.__contains__)
            assert graphs.shapes == set(SHAPES) - set(outdated)
            while graphs.capture_next():
                pass
            assert graphs.shapes == set(SHAPES)
            assert graphs.run(SHAPES[1], SHAPES[1]).tolist() == [0.0, 3.0]
        assert graphs.run(SHAPES[2], SHAPES[2]).tolist() == [0.0, 3.0, 6.0, 9.0]
