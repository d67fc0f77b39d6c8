"""Who waits, who runs, and which slot and blocks each running sequence has.

Owns both queues and the slots; takes blocks from the pool and gives them back. Must not know plans,
results, the clock or who is to be chosen: the scheduler decides.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from engine.blocks import BlockPool, Hit
from engine.policy import admission_order, admission_reserve, pooled_slots
from engine.request import Sequence


class Queues:
    """Both in admission order. `waiting` and `running` are to be read only by others."""

    def __init__(self, pool: BlockPool, max_batch: int) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._pool = pool
        self._reserve = admission_reserve(pool.num_blocks)
        self._free_slots = list(range(max_batch - 1, -1, -1))
        self._pooled_slots = pooled_slots(max_batch)

    @property
    def first_pooled(self) -> int:
        """Index in `running` of the first sequence with pooling: all behind it are such, too."""
        return bisect_left(self.running, True, key=lambda sequence: sequence.pooling is not None)

    def wait(self, sequence: Sequence) -> None:
        """A new sequence."""
        insort(self.waiting, sequence, key=admission_order)

    def admit(self, hit: Hit) -> Hit | None:
        """The first waiting sequence gets a slot and blocks, those of `hit` among them, and runs.

        Returns the part of the hit that was used; None if slot or blocks are not free now.
        """
        pool, sequence = self._pool, self.waiting[0]
        if not self._has_slot(sequence):
            return None
        needed = -(-len(sequence.tokens) // pool.block_size)
        reserve = self._reserve if self.running else 0
        blocks = pool.acquire(hit, needed, reserve)
        if blocks is None and hit.source is not None:
            hit = Hit(hit.blocks, None, 0)  # the source itself may be the block that is missing
            blocks = pool.acquire(hit, needed, reserve)
        if blocks is None:
            return None
        del self.waiting[0]
        sequence.slot = self._free_slots.pop()
        sequence.blocks = blocks
        sequence.scheduled = sequence.computed = len(hit.blocks) * pool.block_size + hit.num_copied
        insort(self.running, sequence, key=admission_order)
        return hit

    def _has_slot(self, sequence: Sequence) -> bool:
        if sequence.pooling is None:
            return bool(self._free_slots)
        num_pooled = len(self.running) - self.first_pooled
        return bool(self._free_slots) and num_pooled < self._pooled_slots

    def preempt(self, victim: Sequence) -> None:
        """A running sequence waits again, without slot and blocks."""
        _remove(self.running, victim)
        self._vacate(victim)
        insort(self.waiting, victim, key=admission_order)

    def remove(self, sequence: Sequence, *, failed: bool) -> None:
        """The sequence has ended; what a failed one computed is never reused."""
        if sequence.slot is None:
            _remove(self.waiting, sequence)
            return
        _remove(self.running, sequence)
        if failed:
            self._pool.forget(sequence.blocks)  # they may be why it failed
            sequence.computed = 0
        self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        """Give slot and blocks back; what is computed stays cached, the head longest."""
        computed, blocks, pool = sequence.computed, sequence.blocks, self._pool
        if computed % pool.block_size and sequence.pooling is None:
            last = blocks[computed // pool.block_size]
            pool.keep(sequence.tokens, sequence.chain, computed, last)
        pool.release(reversed(blocks))
        self._free_slots.append(slot_of(sequence))
        sequence.slot = None
        sequence.blocks = []
        sequence.scheduled = sequence.computed = 0


def slot_of(sequence: Sequence) -> int:
    """Raises RuntimeError if it has none."""
    slot = sequence.slot
    if slot is None:
        raise RuntimeError(f"sequence {sequence.id} runs without a slot")
    return slot


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    at = bisect_left(queue, admission_order(sequence), key=admission_order)
    if at == len(queue) or queue[at] is not sequence:
        raise RuntimeError(f"sequence {sequence.id} is not in its queue")
    del queue[at]
