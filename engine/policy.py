"""The scheduler's judgements, each a function from values to a value.

Owns nothing. Must not know pool, queues or clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.request import Sequence

_RESERVE_SHARE = 100
_COPY_SHARE = 8


def admission_order(sequence: Sequence) -> tuple[int, int]:
    """Sort key of both queues: lower priority number first, then first come, first served."""
    return sequence.rank


def pick_victim(candidates: Iterable[Sequence]) -> Sequence:
    """Who gives its blocks back: the last in admission order. Raises ValueError if there is none.

    Nobody can be overtaken for ever: the first in order is never a victim while others run.
    """
    return max(candidates, key=admission_order)


def split_chunk(left: int, budget: int) -> int:
    """How many of the `left` tokens still to be computed go into a step with `budget` to spare."""
    return min(left, budget)


def admission_reserve(num_blocks: int) -> int:
    """Blocks an admission must leave free, so that it does not cause the next preemption."""
    return -(-num_blocks // _RESERVE_SHARE)


def worth_copying(count: int, block_size: int) -> bool:
    """Is copying `count` cached tokens better than computing them anew with the others?

    A few more tokens in a forward pass are nearly free and a copy is a launch of its own; all
    chats share their first tokens, so tiny hits are the rule.
    """
    return count * _COPY_SHARE >= block_size


def comes_soon(
    sequence: Sequence, number: int, block_size: int, running: Iterable[Sequence]
) -> bool:
    """Is the sequence's block `number`, the first one not cached, being computed by another one?

    Then it does better to wait the step or two until it can share the block: the choices of one
    request and the users of one long prompt arrive together. Who computes the block runs, so that
    the wait ends.
    """
    start, end = number * block_size, (number + 1) * block_size
    if end >= len(sequence.tokens):
        return False
    parent, wanted = sequence.chain[number], sequence.tokens[start:end]
    return any(
        start <= other.computed < end <= len(other.tokens)
        and other.chain[number] == parent
        and other.tokens[start:end] == wanted
        for other in running
    )
