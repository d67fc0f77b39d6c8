"""Which sequence computes what in the next step, and what its results mean.

Owns the sequences, the waiting and the running queue, the slots and the counters; decides together
with `blocks.BlockPool` and `policy`. Must not know torch, the clock, the socket or the log.

    add, abort      what the router wants
    plan            the next step, or None if nothing can be computed now
    commit          the results of a planned step, in the order of the plans
    withdraw        the planned steps found no memory
    take_output     what the router must hear of all that

One more `plan` may be made before the `commit` of the one before it (the host runs ahead by one
step). Invariants:

* Exactly one `Finish` per `Submit`; nothing raises for a bad one.
* Both queues are in admission order, and every running sequence comes before every waiting one of
  its priority. A victim is always behind the sequence that needs its block, so the first running
  sequence is never preempted while it has company.
* Work is never stuck: `add` admits only what fits into the whole pool, so the first of the order,
  if alone, always gets its blocks: nobody else holds any.
* A sequence's tokens leave through `commit` alone, once each, whatever was recomputed.
* A sequence with a grammar is planned only up to the tokens that are committed: its next mask
  follows from the last of them. With the host one step ahead it takes part in every second step.
* Sequences with pooling are background work: last in both queues, computed in what others leave of
  a step, without reuse of blocks in either direction (each hidden state is needed, and texts to be
  embedded would only push prompts out of the cache). One that runs gives way to any other sequence
  that lacks a slot or blocks.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable

from engine.blocks import MISS, BlockPool, Hit
from engine.grammar import Matcher, StepMasks
from engine.outbox import Outbox, logprobs_of
from engine.plan import Admit, Copy, Grow, Row, Sampled, StepPlan, TokenLogprobs
from engine.policy import (
    StepSizes,
    comes_soon,
    pick_victim,
    pooled_budget,
    split_chunk,
    worth_copying,
)
from engine.protocol import (
    NO_MEMORY,
    BadFrame,
    Embedding,
    FinishReason,
    Limits,
    Stats,
    StepOutput,
    Submit,
    unpack_tokens,
)
from engine.queues import Queues, slot_of
from engine.refusal import refusal
from engine.request import Sequence
from engine.stats import Counters
from engine.stop import finish_reason

_MAX_LAUNCHED = 2  # plans without a commit: the one on the device and the one queued behind it

_DETAILS: dict[FinishReason, str] = {"error": "its grammar cannot be followed any further"}


class _Draft:
    """A plan in the making."""

    __slots__ = ("admits", "budget", "copies", "grows", "preempted", "rows", "sequences")

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that still fit
        self.rows: list[Row] = []
        self.sequences: list[Sequence] = []  # of the rows
        self.admits: list[Admit] = []
        self.grows: list[Grow] = []
        self.copies: list[Copy] = []
        self.preempted = False

    def shrink(
        self, sizes: StepSizes, behind: Iterable[Sequence], waiting: Iterable[Sequence]
    ) -> None:
        """Beside the sequences that decode, prompts get a part of the step only."""
        decoding = len(self.rows)
        if decoding == 0 or sizes.beside[0] == sizes.alone:
            return
        tokens = sum(len(s.tokens) - s.scheduled for each in (behind, waiting) for s in each)
        self.budget = min(self.budget, max(sizes.limit(decoding, tokens) - decoding, 0))

    def chunks(self, sequences: Iterable[Sequence]) -> None:
        """A row for each, as long as there is budget."""
        for sequence in sequences:
            if self.budget == 0:
                break
            self.chunk(sequence)

    def chunk(self, sequence: Sequence) -> None:
        """A row with as many of the sequence's uncomputed tokens as fit."""
        start = sequence.scheduled
        left = len(sequence.tokens) - start
        count = split_chunk(left, self.budget)
        samples = count == left and sequence.generates
        self.rows.append(Row(slot_of(sequence), sequence.id, start, count, samples))
        self.sequences.append(sequence)
        self.budget -= count
        sequence.scheduled = start + count

    def plan(self, step: int) -> StepPlan:
        """All of it."""
        return StepPlan(step, self.rows, self.admits, self.grows, self.copies, self._masks())

    def _masks(self) -> StepMasks | None:
        """Of the rows that sample and have a grammar; None if there are none."""
        sampling = (s for row, s in zip(self.rows, self.sequences, strict=True) if row.samples)
        found = [(i, s.matcher) for i, s in enumerate(sampling) if s.matcher is not None]
        if not found:
            return None
        return StepMasks([i for i, _ in found], [matcher for _, matcher in found])


class Scheduler:
    """Continuous batching over one block pool."""

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        *,
        step_tokens: int,
        mixed_tokens: int = 0,
        epoch: int = 0,
    ) -> None:
        """`step_tokens` and `mixed_tokens`: most positions in one step (see `policy.StepSizes`).

        Raises ValueError if nothing could ever run, or if the pool is not the one of `limits`.
        """
        _check_sizes(pool, limits, step_tokens)
        self.counters = Counters()
        self._queues = Queues(pool, limits.max_batch)
        self.running = self._queues.running  # to be read only by others, as is `waiting`
        self.waiting = self._queues.waiting
        self._pool = pool
        self._limits = limits
        self._epoch = epoch
        self._sizes = StepSizes.of(step_tokens, mixed_tokens)
        self._sequences: dict[int, Sequence] = {}
        self._launched: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._arrivals = 0
        self._step = 0
        self._outbox = Outbox()

    @property
    def busy(self) -> bool:
        """Is there a sequence that has not ended, or a step that is not committed?"""
        return bool(self._sequences or self._launched)

    # -- what the router wants

    def add(self, submit: Submit, matcher: Matcher | None = None) -> None:
        """Take a sequence (and its grammar's matcher); one that can never run ends with `error`."""
        try:
            tokens = unpack_tokens(submit.tokens)
        except BadFrame as error:
            self._outbox.finish(submit.id, "error", f"bad token list: {error}")
            return
        max_total = min(len(tokens) + submit.max_new, self._limits.max_len)
        problem = refusal(submit, tokens, self._limits)
        if submit.id in self._sequences:
            problem = "this id is in use"
        if problem is None and submit.grammar and matcher is None:
            problem = "its grammar was not compiled"
        if problem is not None:
            self._outbox.finish(submit.id, "error", problem)
            return
        if matcher is not None and matcher.complete:
            self._outbox.finish(submit.id, "stop")
            return
        root = self._pool.root(submit.salt)
        sequence = Sequence(submit, tokens, max_total, self._arrivals, root, matcher)
        self._arrivals += 1
        self._sequences[sequence.id] = sequence
        self._queues.wait(sequence)

    def abort(self, ids: Iterable[int]) -> None:
        """End these sequences now; what the device still computes for them is thrown away."""
        for sequence_id in ids:
            sequence = self._sequences.get(sequence_id)
            if sequence is not None:
                self._end(sequence, "abort")

    # -- the next step

    def plan(self, smooth_tokens: int = sys.maxsize) -> StepPlan | None:
        """The next step: decode rows, then prompt chunks, then newcomers, within the budget.

        What is left goes to pooled sequences: all of it if nothing else runs, otherwise so much
        that the step stays at about `smooth_tokens`. None if there is nothing to compute before the
        next commit or at all. The caller launches every plan. Raises RuntimeError if two plans are
        not committed yet.
        """
        if len(self._launched) >= _MAX_LAUNCHED:
            raise RuntimeError("a third step must not be planned before the first is committed")
        if not self._sequences and self._pool.num_held:
            self.counters.blocks_leaked += self._pool.reclaim()  # healed, and seen in the metrics
        draft = _Draft(self._sizes.alone)
        behind = self._plan_decodes(draft)
        draft.shrink(self._sizes, behind, self.waiting)
        draft.chunks(behind)
        while self._can_admit(draft, pooled=False) and self._admit(draft):
            pass
        self._plan_pooled(draft, smooth_tokens)
        # Until here the sources could not be evicted; from here on the device is ahead of it.
        self._pool.release([copy.source for copy in draft.copies])
        if not draft.rows:
            return None
        self._step += 1
        plan = draft.plan(self._step)
        self._launched.append((plan, draft.sequences))
        return plan

    def _plan_decodes(self, draft: _Draft) -> list[Sequence]:
        """One row for each running sequence that lacks one position; returns those behind.

        Those with pooling, at the end of the list, are left out.
        """
        behind: list[Sequence] = []
        rows, sequences = draft.rows, draft.sequences
        block_size, budget = self._pool.block_size, draft.budget
        # Preemption removes sequences from the end of the list, which the loop has not reached.
        for place, sequence in enumerate(self.running):
            if sequence.pooling is not None:
                break
            start = sequence.scheduled
            known = len(sequence.tokens) - start
            if known > 1:
                behind.append(sequence)
                continue
            if start >= sequence.num_kv:
                continue  # all is launched: its last tokens are in flight
            if known < 1 and sequence.matcher is not None:
                continue  # what its grammar allows next depends on the token in flight
            if budget == 0:
                break
            if start == len(sequence.blocks) * block_size and not self._grow(draft, place):
                break
            rows.append(Row(slot_of(sequence), sequence.id, start, 1, sequence.generates))
            sequences.append(sequence)
            sequence.scheduled = start + 1
            budget -= 1
        draft.budget = budget
        return behind

    def _grow(self, draft: _Draft, place: int) -> bool:
        """One more block for the sequence at `place`; False if it had to go itself."""
        sequence = self.running[place]
        while self._pool.num_free == 0:
            victim = pick_victim(self.running[place:])
            if victim is sequence and len(self.running) == 1:  # `add` makes this impossible
                self._end(sequence, "error", "the KV cache cannot hold this sequence")
                return False
            self._preempt(victim)
            draft.preempted = True
            if victim is sequence:
                return False
        blocks = self._pool.take(1)
        draft.grows.append(Grow(slot_of(sequence), len(sequence.blocks), blocks))
        sequence.blocks += blocks
        return True

    def _can_admit(self, draft: _Draft, *, pooled: bool) -> bool:
        """Is the first waiting sequence of this kind, and is there budget for it?"""
        if not self.waiting or draft.budget <= 0:
            return False
        # Who was preempted in this plan may have a token in flight that an `Admit` would lack.
        return not draft.preempted and pooled == (self.waiting[0].pooling is not None)

    def _plan_pooled(self, draft: _Draft, smooth_tokens: int) -> None:
        """Pooled sequences, in what is left; newcomers only when nobody else waits."""
        first = self._queues.first_pooled
        if first:
            used = sum(row.count for row in draft.rows)
            draft.budget = pooled_budget(draft.budget, used, smooth_tokens)
        draft.chunks(s for s in self.running[first:] if s.scheduled < s.num_kv)
        while self._can_admit(draft, pooled=True) and self._admit(draft):
            pass

    def _admit(self, draft: _Draft) -> bool:
        """Start the first waiting sequence if its known tokens fit into the pool now."""
        sequence = self.waiting[0]
        hit = MISS
        if self._reuses(sequence) and not sequence.wants_prompt_logprobs:
            hit = self._pool.match(sequence.tokens, sequence.chain, len(sequence.tokens) - 1)
            if not worth_copying(hit.num_copied, self._pool.block_size):
                hit = Hit(hit.blocks, None, 0)
            if comes_soon(sequence, len(hit.blocks), self._pool.block_size, self.running):
                return False
        while (used := self._queues.admit(hit)) is None:
            if not self._displace(sequence):
                return False
        self._start(draft, sequence, used)
        draft.chunk(sequence)
        return True

    def _reuses(self, sequence: Sequence) -> bool:
        return self._pool.reuses and sequence.pooling is None

    def _displace(self, newcomer: Sequence) -> bool:
        """Preempts a pooled sequence for one without pooling; False if there is none.

        It is not admitted anew in this plan: what the newcomer leaves is less than it had.
        """
        if newcomer.pooling is not None or not self.running or self.running[-1].pooling is None:
            return False
        self._preempt(self.running[-1])
        return True

    def _start(self, draft: _Draft, sequence: Sequence, hit: Hit) -> None:
        blocks, cached = sequence.blocks, sequence.scheduled
        if hit.source is not None:
            draft.copies.append(Copy(hit.source, blocks[len(hit.blocks)], hit.num_copied))
        draft.admits.append(_admit_of(sequence))
        if not sequence.started:
            sequence.started = True
            queried = len(sequence.tokens) if self._reuses(sequence) else 0
            self.counters.started(sequence.num_prompt, queried, cached)
            self._outbox.start(sequence.id, cached)

    def _preempt(self, victim: Sequence) -> None:
        self.counters.preemptions += 1
        self._queues.preempt(victim)

    # -- the results

    def commit(self, plan: StepPlan, sampled: Sampled) -> None:
        """Apply the results of the oldest plan that has none yet.

        Rows of sequences that ended meanwhile are void. Raises RuntimeError for any other plan.
        """
        if not self._launched or self._launched[0][0] is not plan:
            raise RuntimeError(f"step {plan.step} is not the one to be committed next")
        _plan, sequences = self._launched.popleft()
        outbox, block_size = self._outbox, self._pool.block_size
        failed, logprobs = sampled.failed, sampled.logprobs
        at = -1  # of this row's token in `sampled.tokens`
        for index, (row, sequence) in enumerate(zip(plan.rows, sequences, strict=True)):
            if row.samples:
                at += 1
            if sequence.ended:
                continue
            if failed and index in failed:
                self._end(sequence, "error", failed[index])
                continue
            start = row.start
            end = start + row.count
            if sequence.slot is not None:  # preempted: the blocks are gone, the token is good
                sequence.computed = end
                if end // block_size > start // block_size:
                    _seal(self._pool, sequence, start, end)
            if index in sampled.prompt_logprobs:
                _report_prompt(outbox, sequence, start + 1, sampled.prompt_logprobs[index])
            if row.samples:
                token = sampled.tokens[at]
                outbox.ids.append(sequence.id)
                outbox.tokens.append(token)
                self.counters.generated_tokens += 1
                if at in logprobs:
                    outbox.logprobs.append(
                        logprobs_of(sequence.id, len(sequence.tokens), logprobs[at])
                    )
                sequence.append(token)
                reason = finish_reason(sequence)
            else:
                reason = _computed(outbox, sequence, end, sampled.embeddings.get(index))
            if reason is not None:
                self._end(sequence, reason, _DETAILS.get(reason, ""))
        self.counters.steps += 1
        outbox.news = True

    def withdraw(self) -> None:
        """No plan without a commit was computed, for lack of memory: its largest row's sequence
        ends, the others run again from what is committed. Each call ends one, if there is any."""
        launched, self._launched = self._launched, deque()
        planned = [pair for plan, group in launched for pair in zip(plan.rows, group, strict=True)]
        rows = [(row.count, sequence) for row, sequence in planned if not sequence.ended]
        if rows:
            self._end(max(rows, key=lambda row: row[0])[1], "error", NO_MEMORY)
        for _, sequence in rows:
            if sequence.slot is not None:
                self._preempt(sequence)

    # -- the ends

    def _end(self, sequence: Sequence, reason: FinishReason, detail: str = "") -> None:
        """The one way out of the queues."""
        self._queues.remove(sequence, failed=reason == "error")
        sequence.ended = True
        del self._sequences[sequence.id]
        self._outbox.finish(sequence.id, reason, detail)

    # -- what the router must hear

    @property
    def stats(self) -> Stats:
        """Gauges and totals of now."""
        pool = self._pool
        return self.counters.snapshot(
            (len(self.waiting), len(self.running)),
            (pool.num_blocks, pool.num_held, pool.num_cached),
        )

    def take_output(self) -> StepOutput | None:
        """All that happened since the last call as one message; None if nothing did."""
        outbox = self._outbox
        if not outbox.news:
            return None
        self._outbox = Outbox()
        return outbox.message(self._epoch, self.counters.steps, self.stats)


def _check_sizes(pool: BlockPool, limits: Limits, step_tokens: int) -> None:
    if step_tokens < 1 or limits.max_batch < 1:
        raise ValueError("step_tokens and max_batch must be at least 1")
    if (pool.num_blocks, pool.block_size) != (limits.num_blocks, limits.block_size):
        raise ValueError("the pool's size is not the one announced in limits")


def _admit_of(sequence: Sequence) -> Admit:
    """What the device must know of a sequence that has just got its slot and blocks."""
    return Admit(
        slot_of(sequence),
        list(sequence.tokens),
        sequence.num_prompt,
        list(sequence.blocks),
        sequence.sampling,
        sequence.stop_ids if sequence.matcher is None else (),  # its masks see to `min_new`
        sequence.pooling,
    )


def _computed(
    outbox: Outbox, sequence: Sequence, end: int, embedding: bytes | None
) -> FinishReason | None:
    """Positions below `end` are computed and nothing was sampled: is that the end?"""
    if end < sequence.num_kv:
        return None
    if sequence.pooling is None:  # nothing was to be generated
        return "length"
    if embedding is None:
        raise RuntimeError(f"the device gave no embedding of sequence {sequence.id}")
    outbox.embeddings.append(Embedding(sequence.id, embedding))
    return "stop"


def _seal(pool: BlockPool, sequence: Sequence, start: int, end: int) -> None:
    if sequence.pooling is None:
        for number in range(start // pool.block_size, end // pool.block_size):
            pool.seal(sequence.tokens, sequence.chain, number, sequence.blocks[number])


def _report_prompt(outbox: Outbox, sequence: Sequence, start: int, values: TokenLogprobs) -> None:
    """`values` begin with position `start`; positions told before a preemption are left out."""
    first = sequence.prompt_reported
    end = min(start + len(values.chosen), sequence.num_prompt)
    if sequence.sampling.prompt_logprobs >= 0 and start <= first < end:
        part = slice(first - start, end - start)
        values = TokenLogprobs(values.chosen[part], values.top[part])
        outbox.prompt_logprobs.append(logprobs_of(sequence.id, first, values))
        sequence.prompt_reported = end
