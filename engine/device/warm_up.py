"""The steps that an engine runs before it is ready. Owns nothing."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.plan import Admit, Row, RunnerLike, StepPlan
from engine.protocol import Sampling


def warm_up(runner: RunnerLike, num_tokens: int, config: EngineConfig) -> None:
    """Runs a prompt and a decode step: the first request must not pay for kernels and pages.

    What it leaves in slot 0 and in the first blocks is overwritten before anything reads it.
    """
    blocks = list(range(-(-(num_tokens + 1) // config.block_size)))
    admit = Admit(0, [0] * num_tokens, num_tokens, blocks, Sampling(temperature=0.0), ())
    prompt = Row(slot=0, id=0, start=0, count=num_tokens, samples=True)
    runner.launch(StepPlan(0, [prompt], [admit], [], [])).result()
    runner.launch(StepPlan(0, [Row(0, 0, num_tokens, 1, samples=True)], [], [], [])).result()
