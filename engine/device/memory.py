"""How many KV blocks an engine gets: arithmetic over what the router planned and what is free.

And what happens when a step finds no memory in spite of it: see `Guarded`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from engine.config import EngineConfig, NotEnoughMemory
from engine.plan import OutOfMemory, Pending, RunnerLike, Sampled, StepPlan

T = TypeVar("T")

# Without a plan an engine on the CPU takes at most this much, so that a desktop stays usable.
_CPU_KV_BYTES = 1 << 30
# On a GPU the rest of what the weights leave is for activations.
_GPU_KV_SHARE = 0.85
SMALL_TOKENS = 64  # of a step
MOST_SMALL_FAILURES = 3
# How torch and oneDNN say on the CPU, in a RuntimeError, that malloc failed. (A primitive
# *descriptor* that cannot be created is a product that oneDNN does not have.)
_CPU_WORDS = re.compile(
    r"DefaultCPUAllocator|not enough memory|std::bad_alloc"
    r"|could not (create|execute) a primitive(?! descriptor)|could not create a memory object"
)


def num_blocks(config: EngineConfig, block_bytes: int, max_len: int) -> int:
    """Blocks of the KV cache. Raises `NotEnoughMemory` if one full-length sequence does not fit."""
    per_sequence = -(-max_len // config.block_size)
    if config.num_blocks:
        return config.num_blocks
    budget = config.kv_bytes or _unplanned_bytes(config.device)
    blocks = min(budget // block_bytes, per_sequence * config.max_batch)
    if blocks < per_sequence:
        need, have = per_sequence * block_bytes / 1e9, budget / 1e9
        raise NotEnoughMemory(
            f"the KV cache of one sequence of {max_len} tokens needs {need:.2f} GB, it is given "
            f"{have:.2f} GB; pass --max-len {blocks * config.block_size} or a larger --kv-memory"
        )
    return blocks


def _unplanned_bytes(device: str) -> int:
    if device == "cpu":
        return min(_CPU_KV_BYTES, free_bytes() // 4)
    free, _total = torch.cuda.mem_get_info(device)
    return int(free * _GPU_KV_SHARE)


def free_bytes() -> int:
    """Memory that new allocations may use, by the kernel's estimate."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


class Guarded:
    """A runner whose lack of memory is OutOfMemory, whatever it was that lacked it.

    What a step that failed leaves behind (kernels that were made for its shape, a heap that has
    grown) may be all there was. An engine like that would refuse everybody for ever, so the third
    small step in a row that finds no memory raises NotEnoughMemory, which ends the engine.
    """

    def __init__(self, runner: RunnerLike) -> None:
        self._runner = runner
        self._small_failures = 0  # in a row

    def launch(self, plan: StepPlan) -> Pending:
        """See `engine.plan.RunnerLike`."""
        is_small = sum(row.count for row in plan.rows) <= SMALL_TOKENS
        return _GuardedStep(
            self, self._guard(lambda: self._runner.launch(plan), is_small), is_small
        )

    def idle(self) -> bool:
        """See `engine.plan.RunnerLike`."""
        return self._runner.idle()

    def finish(self, pending: Pending, *, is_small: bool) -> Sampled:
        """The results of a step."""
        sampled = self._guard(pending.result, is_small)
        self._small_failures = 0
        return sampled

    def _guard(self, call: Callable[[], T], is_small: bool) -> T:
        """Raises OutOfMemory once nothing holds the memory of the failed step any more."""
        try:
            return call()
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._small_failures += is_small
        if self._small_failures == MOST_SMALL_FAILURES:
            raise NotEnoughMemory(
                f"{MOST_SMALL_FAILURES} steps in a row, of at most {SMALL_TOKENS} tokens each, "
                "found no memory"
            )
        raise OutOfMemory


class _GuardedStep:
    __slots__ = ("_guarded", "_is_small", "_pending")

    def __init__(self, guarded: Guarded, pending: Pending, is_small: bool) -> None:
        self._guarded = guarded
        self._pending = pending
        self._is_small = is_small

    def result(self) -> Sampled:
        return self._guarded.finish(self._pending, is_small=self._is_small)


def lacks_memory(error: Exception) -> bool:
    """Whether memory is all that was missing."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return _CPU_WORDS.search(str(error)) is not None
