"""Which sequence computes what in the next step, and what its results mean.

Owns the sequences, the waiting and the running queue, the slots and the counters; decides together
with `blocks.BlockPool` and `policy`. Must not know torch, the clock, the socket or the log.

    add, abort      what the router wants
    plan            the next step, or None if nothing can be computed now
    commit          the results of a planned step, in the order of the plans
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
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

from engine.blocks import MISS, BlockPool, Hit
from engine.plan import Admit, Copy, Grow, Row, Sampled, StepPlan, TokenLogprobs
from engine.policy import (
    admission_order,
    admission_reserve,
    comes_soon,
    pick_victim,
    split_chunk,
    worth_copying,
)
from engine.protocol import (
    BadFrame,
    Finish,
    FinishReason,
    Limits,
    Logprobs,
    Started,
    Stats,
    StepOutput,
    Submit,
    pack_floats,
    pack_tokens,
    unpack_tokens,
)
from engine.request import Sequence
from engine.stats import Counters
from engine.stop import finish_reason

_MAX_LAUNCHED = 2  # plans without a commit: the one on the device and the one queued behind it


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

    def chunk(self, sequence: Sequence) -> None:
        """A row with as many of the sequence's uncomputed tokens as fit."""
        start = sequence.scheduled
        left = len(sequence.tokens) - start
        count = split_chunk(left, self.budget)
        samples = count == left and sequence.generates
        self.rows.append(Row(_slot(sequence), sequence.id, start, count, samples))
        self.sequences.append(sequence)
        self.budget -= count
        sequence.scheduled = start + count


class _Outbox:
    """What the router has not been told yet, in the columns of `StepOutput`."""

    __slots__ = ("finished", "ids", "logprobs", "news", "prompt_logprobs", "started", "tokens")

    def __init__(self) -> None:
        self.ids: list[int] = []  # one entry per token
        self.tokens: list[int] = []
        self.finished: list[Finish] = []
        self.started: list[Started] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.news = False  # a step without tokens is news too: it shows progress

    def finish(self, sequence_id: int, reason: FinishReason, detail: str) -> None:
        self.finished.append(Finish(sequence_id, reason, detail))
        self.news = True

    def start(self, sequence_id: int, cached: int) -> None:
        self.started.append(Started(sequence_id, cached))
        self.news = True

    def message(self, epoch: int, step: int, stats: Stats) -> StepOutput:
        return StepOutput(
            epoch=epoch,
            step=step,
            ids=tuple(self.ids),
            counts=(),
            tokens=pack_tokens(self.tokens),
            finished=tuple(self.finished),
            stats=stats,
            started=tuple(self.started),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
        )


class Scheduler:
    """Continuous batching over one block pool."""

    def __init__(
        self, pool: BlockPool, limits: Limits, *, step_tokens: int, epoch: int = 0
    ) -> None:
        """`step_tokens`: most positions computed in one step, over all sequences.

        Raises ValueError if nothing could ever run, or if the pool is not the one of `limits`.
        """
        if step_tokens < 1 or limits.max_batch < 1:
            raise ValueError("step_tokens and max_batch must be at least 1")
        if (pool.num_blocks, pool.block_size) != (limits.num_blocks, limits.block_size):
            raise ValueError("the pool's size is not the one announced in limits")
        self.counters = Counters()
        self.running: list[Sequence] = []  # to be read only by others, as is `waiting`
        self.waiting: list[Sequence] = []
        self._pool = pool
        self._limits = limits
        self._epoch = epoch
        self._step_tokens = step_tokens
        self._reserve = admission_reserve(pool.num_blocks)
        self._sequences: dict[int, Sequence] = {}
        self._free_slots = list(range(limits.max_batch - 1, -1, -1))
        self._launched: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._arrivals = 0
        self._step = 0
        self._outbox = _Outbox()

    @property
    def busy(self) -> bool:
        """Is there a sequence that has not ended, or a step that is not committed?"""
        return bool(self._sequences or self._launched)

    # -- what the router wants

    def add(self, submit: Submit) -> None:
        """Take a sequence; one that can never run ends at once with an `error`."""
        try:
            tokens = unpack_tokens(submit.tokens)
        except BadFrame as error:
            self._outbox.finish(submit.id, "error", f"bad token list: {error}")
            return
        max_total = min(len(tokens) + submit.max_new, self._limits.max_len)
        problem = _problem(submit, tokens, max_total, self._limits)
        if submit.id in self._sequences:
            problem = "this id is in use"
        if problem is not None:
            self._outbox.finish(submit.id, "error", problem)
            return
        root = self._pool.root(submit.salt)
        sequence = Sequence(submit, tokens, max_total, self._arrivals, root)
        self._arrivals += 1
        self._sequences[sequence.id] = sequence
        insort(self.waiting, sequence, key=admission_order)

    def abort(self, ids: Iterable[int]) -> None:
        """End these sequences now; what the device still computes for them is thrown away."""
        for sequence_id in ids:
            sequence = self._sequences.get(sequence_id)
            if sequence is not None:
                self._end(sequence, "abort")

    # -- the next step

    def plan(self) -> StepPlan | None:
        """The next step: decode rows, then prompt chunks, then newcomers, within the budget.

        None if there is nothing to compute before the next commit or at all. The caller launches
        every plan. Raises RuntimeError if two plans are not committed yet.
        """
        if len(self._launched) >= _MAX_LAUNCHED:
            raise RuntimeError("a third step must not be planned before the first is committed")
        if not self._sequences and self._pool.num_held:
            self.counters.blocks_leaked += self._pool.reclaim()  # healed, and seen in the metrics
        draft = _Draft(self._step_tokens)
        for sequence in self._plan_decodes(draft):
            if draft.budget == 0:
                break
            draft.chunk(sequence)
        while self._can_admit(draft) and self._admit(draft):
            pass
        # Until here the sources could not be evicted; from here on the device is ahead of it.
        self._pool.release([copy.source for copy in draft.copies])
        if not draft.rows:
            return None
        self._step += 1
        plan = StepPlan(self._step, draft.rows, draft.admits, draft.grows, draft.copies)
        self._launched.append((plan, draft.sequences))
        return plan

    def _plan_decodes(self, draft: _Draft) -> list[Sequence]:
        """One row for each running sequence that lacks one position; returns those behind."""
        behind: list[Sequence] = []
        rows, sequences = draft.rows, draft.sequences
        block_size, budget = self._pool.block_size, draft.budget
        # Preemption removes sequences from the end of the list, which the loop has not reached.
        for place, sequence in enumerate(self.running):
            start = sequence.scheduled
            if len(sequence.tokens) - start > 1:
                behind.append(sequence)
                continue
            if start >= sequence.num_kv:
                continue  # all is launched: its last tokens are in flight
            if budget == 0:
                break
            if start == len(sequence.blocks) * block_size and not self._grow(draft, place):
                break
            rows.append(Row(_slot(sequence), sequence.id, start, 1, sequence.generates))
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
        draft.grows.append(Grow(_slot(sequence), len(sequence.blocks), blocks))
        sequence.blocks += blocks
        return True

    def _can_admit(self, draft: _Draft) -> bool:
        # Who was preempted in this plan may have a token in flight that an `Admit` would lack.
        return bool(self.waiting and self._free_slots and draft.budget > 0 and not draft.preempted)

    def _admit(self, draft: _Draft) -> bool:
        """Start the first waiting sequence if its known tokens fit into the pool now."""
        pool, sequence = self._pool, self.waiting[0]
        length = len(sequence.tokens)
        hit = MISS
        if pool.reuses and not sequence.wants_prompt_logprobs:
            hit = pool.match(sequence.tokens, sequence.chain, length - 1)
            if not worth_copying(hit.num_copied, pool.block_size):
                hit = Hit(hit.blocks, None, 0)
            if comes_soon(sequence, len(hit.blocks), pool.block_size, self.running):
                return False
        needed = -(-length // pool.block_size)
        reserve = self._reserve if self.running else 0
        blocks = pool.acquire(hit, needed, reserve)
        if blocks is None and hit.source is not None:
            hit = Hit(hit.blocks, None, 0)  # the source itself may be the block that is missing
            blocks = pool.acquire(hit, needed, reserve)
        if blocks is None:
            return False
        del self.waiting[0]
        self._start(draft, sequence, hit, blocks)
        draft.chunk(sequence)
        return True

    def _start(self, draft: _Draft, sequence: Sequence, hit: Hit, blocks: list[int]) -> None:
        cached = len(hit.blocks) * self._pool.block_size + hit.num_copied
        slot = self._free_slots.pop()
        sequence.slot = slot
        sequence.blocks = blocks
        sequence.scheduled = sequence.computed = cached
        insort(self.running, sequence, key=admission_order)
        if hit.source is not None:
            draft.copies.append(Copy(hit.source, blocks[len(hit.blocks)], hit.num_copied))
        draft.admits.append(
            Admit(
                slot,
                list(sequence.tokens),
                sequence.num_prompt,
                list(blocks),
                sequence.sampling,
                sequence.stop_ids,
            )
        )
        if not sequence.started:
            sequence.started = True
            queried = len(sequence.tokens) if self._pool.reuses else 0
            self.counters.started(sequence.num_prompt, queried, cached)
            self._outbox.start(sequence.id, cached)

    def _preempt(self, victim: Sequence) -> None:
        self.counters.preemptions += 1
        _remove(self.running, victim)
        self._vacate(victim)
        insort(self.waiting, victim, key=admission_order)

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
                    self._seal(sequence, start, end)
            if index in sampled.prompt_logprobs:
                self._report_prompt(sequence, start + 1, sampled.prompt_logprobs[index])
            if row.samples:
                token = sampled.tokens[at]
                outbox.ids.append(sequence.id)
                outbox.tokens.append(token)
                self.counters.generated_tokens += 1
                if at in logprobs:
                    outbox.logprobs.append(
                        _logprobs(sequence.id, len(sequence.tokens), logprobs[at])
                    )
                sequence.tokens.append(token)
                reason = finish_reason(sequence)
            else:  # nothing is to be generated, and the whole prompt is computed
                reason = "length" if end == sequence.num_kv else None
            if reason is not None:
                self._end(sequence, reason)
        self.counters.steps += 1
        outbox.news = True

    def _seal(self, sequence: Sequence, start: int, end: int) -> None:
        size = self._pool.block_size
        for number in range(start // size, end // size):
            self._pool.seal(sequence.tokens, sequence.chain, number, sequence.blocks[number])

    def _report_prompt(self, sequence: Sequence, start: int, values: TokenLogprobs) -> None:
        """`values` begin with position `start`; positions told before a preemption are left out."""
        first = sequence.prompt_reported
        end = min(start + len(values.chosen), sequence.num_prompt)
        if sequence.sampling.prompt_logprobs >= 0 and start <= first < end:
            part = slice(first - start, end - start)
            values = TokenLogprobs(values.chosen[part], values.top[part])
            self._outbox.prompt_logprobs.append(_logprobs(sequence.id, first, values))
            sequence.prompt_reported = end

    # -- the ends

    def _end(self, sequence: Sequence, reason: FinishReason, detail: str = "") -> None:
        """The one way out of the queues."""
        if sequence.slot is None:
            _remove(self.waiting, sequence)
        else:
            _remove(self.running, sequence)
            if reason == "error":
                self._pool.forget(sequence.blocks)  # they may be why it failed
                sequence.computed = 0
            self._vacate(sequence)
        sequence.ended = True
        del self._sequences[sequence.id]
        self._outbox.finish(sequence.id, reason, detail)

    def _vacate(self, sequence: Sequence) -> None:
        """Give slot and blocks back; what is computed stays cached, the head longest."""
        computed, blocks = sequence.computed, sequence.blocks
        if computed % self._pool.block_size:
            last = blocks[computed // self._pool.block_size]
            self._pool.keep(sequence.tokens, sequence.chain, computed, last)
        self._pool.release(reversed(blocks))
        self._free_slots.append(_slot(sequence))
        sequence.slot = None
        sequence.blocks = []
        sequence.scheduled = sequence.computed = 0

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
        self._outbox = _Outbox()
        return outbox.message(self._epoch, self.counters.steps, self.stats)


def _problem(submit: Submit, tokens: list[int], max_total: int, limits: Limits) -> str | None:
    """Why this sequence can never run, if it cannot; `max_total` is its length at the end."""
    vocab_size, length = limits.vocab_size, len(tokens)
    named = (*submit.stop_ids, *(token for token, _bias in submit.sampling.logit_bias))
    if not tokens:
        return "there are no tokens"
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        return f"a token id is outside the vocabulary of {vocab_size}"
    if named and (min(named) < 0 or max(named) >= vocab_size):
        return f"a stop or bias token id is outside the vocabulary of {vocab_size}"
    if not 0 <= submit.num_prompt <= length:
        return f"{submit.num_prompt} prompt tokens in a list of {length}"
    if submit.max_new < 0:
        return "max_new is negative"
    if length + min(submit.max_new, 1) > limits.max_len:
        return f"{length} tokens leave no room in a context of {limits.max_len}"
    positions, room = max(length, max_total - 1), limits.num_blocks * limits.block_size
    if positions > room:
        return f"{positions} positions do not fit into a KV cache of {room}"
    return None


def _slot(sequence: Sequence) -> int:
    slot = sequence.slot
    if slot is None:
        raise RuntimeError(f"sequence {sequence.id} runs without a slot")
    return slot


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    at = bisect_left(queue, admission_order(sequence), key=admission_order)
    if at == len(queue) or queue[at] is not sequence:
        raise RuntimeError(f"sequence {sequence.id} is not in its queue")
    del queue[at]


def _logprobs(sequence_id: int, start: int, values: TokenLogprobs) -> Logprobs:
    rivals = [rival for best in values.top for rival in best]
    return Logprobs(
        sequence_id,
        start,
        pack_floats(values.chosen),
        pack_tokens(token for token, _value in rivals),
        pack_floats(value for _token, value in rivals),
    )
