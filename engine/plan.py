"""What the scheduler asks of the device in one step, and what comes back. Values only.

The device keeps state per *slot* (a row of its persistent batch): token ids, block table, sampling
parameters. A sequence owns a slot from `Admit` until its slot is admitted anew. A sampled token is
written into the slot's token row on the device, so the next plan may refer to it unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from engine.protocol import Pooling, Sampling


class Admit(NamedTuple):
    """Put a sequence into `slot`: all its known tokens, its first blocks, how it samples."""

    slot: int
    tokens: list[int]  # prompt and already generated tokens
    num_prompt: int
    blocks: list[int]
    sampling: Sampling
    stop_ids: tuple[int, ...]  # masked while fewer than sampling.min_new tokens are generated
    pooling: Pooling | None = None  # an embedding is wanted once all of the prompt is computed


class Grow(NamedTuple):
    """Append `blocks` to the block table of `slot`, from entry `at` on."""

    slot: int
    at: int
    blocks: list[int]


class Copy(msgspec.Struct, frozen=True, gc=False):
    """Copy the first `count` tokens' keys and values of block `source` into `target`."""

    source: int
    target: int
    count: int


class Row(msgspec.Struct, frozen=True, gc=False):
    """Compute positions [start, start + count) of `slot`; sample after the last if `samples`."""

    slot: int
    id: int
    start: int
    count: int
    samples: bool


class StepMasks(Protocol):
    """What the grammars of a step allow. `rows` are indices among the rows that sample."""

    @property
    def rows(self) -> list[int]: ...

    def bits(self) -> npt.NDArray[np.int32]:
        """[len(rows), words]: bit i % 32 of word i // 32 is set if id i is allowed.

        Computed now: to be called once, while the device computes the step's forward pass.
        """
        ...


class StepPlan(NamedTuple):
    """One forward pass. To be applied in this order: copies, admits, grows, rows, masks."""

    step: int
    rows: list[Row]
    admits: list[Admit]
    grows: list[Grow]
    copies: list[Copy]
    masks: StepMasks | None = None


class TokenLogprobs(NamedTuple):
    """`chosen[i]` of consecutive tokens, and for each its best rivals as (id, logprob)."""

    chosen: list[float]
    top: list[list[tuple[int, float]]]


class Sampled(NamedTuple):
    """Results of a plan. `tokens[i]` belongs to the i-th row that samples.

    `logprobs` maps an index into `tokens`, `prompt_logprobs` an index into `plan.rows`: there the
    first entry is the log-probability of token `start + 1` (the one after the row's first), and
    a row whose chunk ends the prompt gives `count - 1` entries, any other one `count`.
    A row named in `failed` (index into `plan.rows`) gave no valid result; the text says why.
    `embeddings` maps an index into `plan.rows`, of a row that ends a pooled prompt, to its float32
    values.
    """

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: dict[int, TokenLogprobs]
    failed: dict[int, str]
    embeddings: Mapping[int, bytes] = MappingProxyType({})


class Pending(Protocol):
    """A launched step."""

    def result(self) -> Sampled:
        """Wait for the step and read its results."""
        ...


class OutOfMemory(Exception):
    """A step found no memory: nothing of it was computed, and all before it is as it was."""


class RunnerLike(Protocol):
    """What the loop needs of a device: `launch` queues the work and returns at once.

    `launch` and `Pending.result` may raise OutOfMemory; sequences of the plan have to be admitted
    anew then. No plan may be under way at a call of `idle`.
    """

    def launch(self, plan: StepPlan) -> Pending: ...

    def idle(self) -> bool:
        """Do one piece, of a tenth of a second or so, of what waits for a quiet moment.

        False once nothing is left.
        """
        ...
