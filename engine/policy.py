"""The scheduler's judgements, each a function from values to a value.

Owns nothing. Must not know pool, queues or clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.request import Sequence

_RESERVE_SHARE = 100
_COPY_SHARE = 8
# Sizes of a step beside decode rows: from where a card still waits for its weights, in steps of a
# tile of its products. Chosen by simulating closed loops with step times measured on an H100.
_LEAST_BESIDE, _BESIDE_STEP = 256, 128
_STEPS_TO_CATCH_UP = 3
_CROWD = 80  # steps that a crowd of prompts would take
# Slots that sequences with pooling leave free, so that a chat finds one.
_KEPT_SLOTS_SHARE = 4
# Tokens that pooled sequences get in any step: a few more in a forward pass are nearly free.
_FEW_TOKENS = 8


def admission_order(sequence: Sequence) -> tuple[bool, int, int]:
    """Sort key of both queues: those with pooling last, whatever their priority number; then lower
    priority number first, then first come, first served."""
    return sequence.rank


def pooled_slots(max_batch: int) -> int:
    """Most slots that sequences with pooling may have at once."""
    return max(1, max_batch - -(-max_batch // _KEPT_SLOTS_SHARE))


def pooled_budget(left: int, used: int, smooth_tokens: int) -> int:
    """Tokens for pooled sequences in a step of which others use `used` and `left` could be used.

    `smooth_tokens` is the size of a step that running streams do not feel.
    """
    return min(left, max(smooth_tokens - used, _FEW_TOKENS))


def pick_victim(candidates: Iterable[Sequence]) -> Sequence:
    """Who gives its blocks back: the last in admission order. Raises ValueError if there is none.

    Nobody can be overtaken for ever: the first in order is never a victim while others run.
    """
    return max(candidates, key=admission_order)


class StepSizes(NamedTuple):
    """Tokens that one step may compute, decode rows included.

    `alone` with no sequence decoding. Else the smallest of `beside` that is done with the waiting
    prompts in a few steps: up to about the first a step takes as long as reading the weights, and
    prompt tokens are nearly free; those beyond cost their full time, as a pause of the sequences
    that decode. `crowded` only when so much waits that many would wait for long.
    """

    alone: int
    beside: tuple[int, ...]
    crowded: int

    @staticmethod
    def of(step_tokens: int, mixed_tokens: int) -> StepSizes:
        """`mixed_tokens`: the largest of `beside`; 0: all steps may have `step_tokens`."""
        if not mixed_tokens:
            return StepSizes(step_tokens, (step_tokens,), step_tokens)
        usual = min(mixed_tokens, step_tokens)
        beside = (*range(_LEAST_BESIDE, usual, _BESIDE_STEP), usual)
        return StepSizes(step_tokens, beside, min(usual * 8 // 5, step_tokens))

    def limit(self, decode_rows: int, waiting_tokens: int) -> int:
        """Most tokens of the next step."""
        if decode_rows == 0:
            return self.alone
        usual = self.beside[-1]
        if waiting_tokens > _CROWD * usual:
            return self.crowded
        wanted = decode_rows + -(-waiting_tokens // _STEPS_TO_CATCH_UP)
        return next((size for size in self.beside if size >= wanted), usual)


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
    the wait ends. Blocks of sequences with pooling are never shared.
    """
    start, end = number * block_size, (number + 1) * block_size
    if end >= len(sequence.tokens):
        return False
    parent, wanted = sequence.chain[number], sequence.tokens[start:end]
    return any(
        start <= other.computed < end <= len(other.tokens)
        and other.pooling is None
        and other.chain[number] == parent
        and other.tokens[start:end] == wanted
        for other in running
    )
