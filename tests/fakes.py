"""Stand-ins shared by tests: a device without arithmetic that checks every read and write.

`FakeRunner` keeps what a real device keeps (token rows and block tables by slot, contents by
block) and computes its tokens from nothing but that memory. For each position of each block it
stores which text was there when the position was written, so that a stale, foreign or missing key
and value is an AssertionError at the first row that would read it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from engine.blocks import BlockPool
from engine.plan import Copy, Row, Sampled, StepMasks, StepPlan, TokenLogprobs
from engine.prefix import PrefixIndex
from engine.protocol import (
    Finish,
    Limits,
    Logprobs,
    Pooling,
    Sampling,
    Started,
    StepOutput,
    Submit,
    pack_floats,
    pack_tokens,
    unpack_floats,
    unpack_tokens,
)
from engine.scheduler import Scheduler
from tests.grammars import matcher_of

KEY = b"key of the tests"


def extend_mark(mark: int, token: int) -> int:
    """The fingerprint of a text from that of all but its last token."""
    data = mark.to_bytes(8, "little") + token.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def text_mark(text: Iterable[int]) -> int:
    """A fingerprint of a whole text, as the KV of its last position depends on all of it."""
    return functools.reduce(extend_mark, text, 0)


def next_token(mark: int, vocab_size: int, banned: Iterable[int] = ()) -> int:
    """The model: what follows the text with this mark. A pure function of all of the text."""
    token = mark % vocab_size
    banned = set(banned)
    while token in banned and len(banned) < vocab_size:
        token = (token + 1) % vocab_size
    return token


def logprob(mark: int) -> float:
    """The model's log-probability of the last token of a text: exact in float32."""
    return -float(mark % 4096) / 16


def rivals(mark: int, count: int) -> list[tuple[int, float]]:
    """The best rivals of the last token of a text."""
    return [(index, logprob(extend_mark(mark, index))) for index in range(count)]


EMBEDDING_SIZE = 3


def embedding(tokens: Iterable[int], pooling: Pooling) -> bytes:
    """The model's vector of a text: it depends on all of it."""
    mark = text_mark(tokens)
    values = [float(mark >> shift & 0xFFFF) for shift in (0, 16, 32)]
    return pack_floats(values[: pooling.dimensions or EMBEDDING_SIZE])


@dataclass
class SlotState:
    """One row of the device's persistent batch."""

    tokens: list[int]
    num_prompt: int
    blocks: list[int]
    sampling: Sampling
    stop_ids: tuple[int, ...]
    pooling: Pooling | None = None
    num_pooled: int = 0  # positions whose hidden states went into the vector
    marks: list[int] = field(default_factory=list)  # marks[i] is that of tokens[: i + 1]

    def __post_init__(self) -> None:
        self.marks = list(itertools.accumulate(self.tokens, extend_mark, initial=0))[1:]

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.marks.append(extend_mark(self.marks[-1], token))


@dataclass
class Ready:
    """A launched step; `result` may be asked for late, as of a device that runs behind."""

    sampled: Sampled

    def result(self) -> Sampled:
        return self.sampled


@dataclass
class FakeRunner:
    """Executes plans in order, asserting that each is executable and reads only true KV.

    `fails` may name the reason why a row yields nothing. Each block holds one text mark per
    position, None where nothing was written.
    """

    limits: Limits
    fails: Callable[[Row], str | None] = lambda row: None
    slots: dict[int, SlotState] = field(default_factory=dict)
    marks: list[list[int | None]] = field(default_factory=list)
    num_positions: int = 0  # computed so far
    num_copied: int = 0  # tokens copied from block to block
    last_step: int = 0

    def __post_init__(self) -> None:
        size = self.limits.block_size
        self.marks = [[None] * size for _ in range(self.limits.num_blocks)]

    def idle(self) -> bool:
        return False

    def launch(self, plan: StepPlan) -> Ready:
        """Runs the whole step now: one stream is in order, so nobody can tell the difference."""
        assert plan.rows, "an empty step"
        assert plan.step == self.last_step + 1
        self.last_step = plan.step
        self._copy(plan.copies)
        admitted = [admit.slot for admit in plan.admits]
        assert len(set(admitted)) == len(admitted), "a slot was admitted twice in one step"
        for admit in plan.admits:
            assert 0 <= admit.slot < self.limits.max_batch
            self.slots[admit.slot] = SlotState(
                list(admit.tokens),
                admit.num_prompt,
                list(admit.blocks),
                admit.sampling,
                admit.stop_ids,
                admit.pooling,
            )
        for grow in plan.grows:
            blocks = self.slots[grow.slot].blocks
            assert grow.at == len(blocks), "a block table grew with a gap or an overlap"
            blocks += grow.blocks
        return Ready(self._forward(plan))

    def _copy(self, copies: list[Copy]) -> None:
        sources = {copy.source for copy in copies}
        targets = [copy.target for copy in copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        assert not sources & set(targets), "copies that depend on their order"
        for copy in copies:
            kept = self.marks[copy.source][: copy.count]
            assert 0 < copy.count < self.limits.block_size
            assert None not in kept, f"{copy} reads what was never written"
            self.marks[copy.target] = kept + [None] * (self.limits.block_size - copy.count)
            self.num_copied += copy.count

    def _forward(self, plan: StepPlan) -> Sampled:
        rows = plan.rows
        banned = {} if plan.masks is None else forbidden(plan.masks, self.limits.vocab_size)
        assert len({row.slot for row in rows}) == len(rows), "two rows of one slot"
        for row in rows:  # before any write: nobody may depend on another row of this step
            self._check(row, row.start)
        for row in rows:
            self._write(row)
        for row in rows:  # nobody wrote over what another row reads
            self._check(row, row.start + row.count)
        embeddings: dict[int, bytes] = {}
        sampled = Sampled([], {}, {}, {}, embeddings)
        for index, row in enumerate(rows):
            failure = self.fails(row)
            if failure is not None:
                sampled.failed[index] = failure
            self._prompt_logprobs(sampled, index, row)
            self._pool(embeddings, index, row)
            if row.samples:
                self._sample(sampled, row, banned.get(len(sampled.tokens), set()))
        return sampled

    def _place(self, state: SlotState, position: int) -> tuple[list[int | None], int]:
        number, offset = divmod(position, self.limits.block_size)
        assert number < len(state.blocks), f"position {position} has no block"
        return self.marks[state.blocks[number]], offset

    def _check(self, row: Row, end: int) -> None:
        state = self.slots[row.slot]
        assert end <= len(state.tokens), f"{row} needs a token that nobody has sampled"
        for position in range(end):
            marks, offset = self._place(state, position)
            assert marks[offset] == state.marks[position], (
                f"{row} reads wrong KV at position {position}"
            )

    def _write(self, row: Row) -> None:
        assert row.count > 0
        assert row.start + row.count <= self.limits.max_len
        state = self.slots[row.slot]
        assert row.start + row.count <= len(state.tokens)
        for position in range(row.start, row.start + row.count):
            marks, offset = self._place(state, position)
            marks[offset] = state.marks[position]
        self.num_positions += row.count

    def _prompt_logprobs(self, sampled: Sampled, index: int, row: Row) -> None:
        state = self.slots[row.slot]
        best = state.sampling.prompt_logprobs
        end = min(row.start + row.count, state.num_prompt - 1)
        if best >= 0 and end > row.start:
            marks = state.marks[row.start + 1 : end + 1]
            sampled.prompt_logprobs[index] = TokenLogprobs(
                [logprob(mark) for mark in marks], [rivals(mark, best) for mark in marks]
            )

    def _pool(self, embeddings: dict[int, bytes], index: int, row: Row) -> None:
        state = self.slots[row.slot]
        if state.pooling is None:
            return
        assert not row.samples
        assert row.start == state.num_pooled, f"{row} leaves hidden states out"
        state.num_pooled += row.count
        if state.num_pooled == len(state.tokens):
            embeddings[index] = embedding(state.tokens, state.pooling)

    def _sample(self, sampled: Sampled, row: Row, forbidden: set[int]) -> None:
        state = self.slots[row.slot]
        assert row.start + row.count == len(state.tokens), f"{row} samples in mid-text"
        num_generated = len(state.tokens) - state.num_prompt
        early = state.stop_ids if num_generated < state.sampling.min_new else ()
        banned = forbidden.union(early)
        assert len(banned) < self.limits.vocab_size, "nothing may be sampled"
        state.append(next_token(state.marks[-1], self.limits.vocab_size, banned))
        best = state.sampling.logprobs
        if best >= 0:
            mark = state.marks[-1]
            values = TokenLogprobs([logprob(mark)], [rivals(mark, best)])
            sampled.logprobs[len(sampled.tokens)] = values
        sampled.tokens.append(state.tokens[-1])


def forbidden(masks: StepMasks, vocab_size: int) -> dict[int, set[int]]:
    """The ids that a step's grammars forbid, for each of their rows among those that sample."""
    words = masks.bits().tolist()
    return {
        row: {i for i in range(vocab_size) if not line[i // 32] >> i % 32 & 1}
        for row, line in zip(masks.rows, words, strict=True)
    }


def make_limits(
    *,
    max_len: int = 64,
    vocab_size: int = 3,
    block_size: int = 4,
    num_blocks: int = 32,
    max_batch: int = 4,
) -> Limits:
    """Small limits for tests; the tiny vocabulary makes prefixes collide often."""
    return Limits(
        max_len, vocab_size, block_size, num_blocks, max_batch, embedding_size=EMBEDDING_SIZE
    )


def make_pool(limits: Limits, *, prefix_cache: bool = True) -> BlockPool:
    """The pool that belongs to `limits`."""
    index = PrefixIndex(KEY) if prefix_cache else None
    return BlockPool(limits.num_blocks, limits.block_size, index)


def make_submit(
    sequence_id: int,
    tokens: Iterable[int],
    max_new: int = 4,
    *,
    sampling: Sampling | None = None,
    stop_ids: tuple[int, ...] = (),
    salt: bytes = b"",
    priority: int = 0,
    num_prompt: int = 0,
    pooling: Pooling | None = None,
    grammar: str = "",
) -> Submit:
    """A `Submit` from plain token ids."""
    return Submit(
        epoch=1,
        id=sequence_id,
        tokens=pack_tokens(tokens),
        sampling=sampling or Sampling(),
        max_new=max_new,
        stop_ids=stop_ids,
        salt=salt,
        priority=priority,
        num_prompt=num_prompt,
        pooling=pooling,
        grammar=grammar,
    )


def generate(submit: Submit, limits: Limits) -> tuple[list[int], str]:
    """The oracle: the same model, one sequence, no cache. Returns new tokens and finish reason."""
    tokens = unpack_tokens(submit.tokens)
    num_prompt = submit.num_prompt or len(tokens)
    new: list[int] = []
    while len(new) < submit.max_new and len(tokens) < limits.max_len:
        num_generated = len(tokens) - num_prompt
        banned = submit.stop_ids if num_generated < submit.sampling.min_new else ()
        token = next_token(text_mark(tokens), limits.vocab_size, banned)
        tokens.append(token)
        new.append(token)
        if token in submit.stop_ids and num_generated + 1 >= submit.sampling.min_new:
            return new, "stop"
    return new, "length"


@dataclass
class Answer:
    """All that the router was told about one sequence."""

    tokens: list[int] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    embeddings: list[bytes] = field(default_factory=list)

    @property
    def reason(self) -> str | None:
        """Of its only end."""
        assert len(self.finishes) <= 1, "ended twice"
        return self.finishes[0].reason if self.finishes else None


class Driver:
    """Scheduler and runner joined by the loop's order of calls, and a record of what came out."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        step_tokens: int = 8,
        prefix_cache: bool = True,
        overlap: int = 0,
    ) -> None:
        self.limits = limits or make_limits()
        self.step_tokens = step_tokens
        self.overlap = overlap
        self.pool = make_pool(self.limits, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.pool, self.limits, step_tokens=step_tokens, epoch=1)
        self.runner = FakeRunner(self.limits)
        self.smooth_tokens = step_tokens
        self.answers: dict[int, Answer] = {}
        self.plans: list[StepPlan] = []
        self.outputs: list[StepOutput] = []
        self._flying: list[tuple[StepPlan, Ready]] = []

    def submit(self, *submits: Submit) -> None:
        for submit in submits:
            self.scheduler.add(submit, matcher_of(submit) if submit.grammar else None)

    def step(self, overlap: int | None = None) -> None:
        """Plan and launch one step, commit all but the `overlap` youngest, collect the output."""
        ahead = self.overlap if overlap is None else overlap
        had_work = bool(self.scheduler.waiting or self.scheduler.running)
        plan = self.scheduler.plan(self.smooth_tokens)
        if plan is not None:
            assert sum(row.count for row in plan.rows) <= self.step_tokens
            self.plans.append(plan)
            self._flying.append((plan, self.runner.launch(plan)))
            self._check_shares(plan)
            assert not {row.id for row in plan.rows} & {s.id for s in self.scheduler.waiting}
        else:
            assert self._flying or not had_work, "work, and nothing planned"
            ahead = 0
        while len(self._flying) > ahead:
            done, pending = self._flying.pop(0)
            self.scheduler.commit(done, pending.result())
        self.collect()

    def starve(self, *, launched: bool) -> None:
        """One step finds no memory: when it is launched, or as late as when its result is read."""
        plan = self.scheduler.plan(self.smooth_tokens)
        if plan is None:
            return
        if launched:
            self.runner.launch(plan)
            self._flying.clear()
        else:
            self.runner.last_step = plan.step
            while self._flying:
                done, pending = self._flying.pop(0)
                self.scheduler.commit(done, pending.result())
        self.scheduler.withdraw()
        self.collect()

    def _check_shares(self, plan: StepPlan) -> None:
        """Pooled sequences start and run last, in what a smooth step leaves and a few tokens."""
        if any(admit.pooling is not None for admit in plan.admits):
            assert all(sequence.pooling is not None for sequence in self.scheduler.waiting)
        is_pooled = [self.runner.slots[row.slot].pooling is not None for row in plan.rows]
        assert is_pooled == sorted(is_pooled)
        if any(sequence.pooling is None for sequence in self.scheduler.running):
            rows = list(zip(plan.rows, is_pooled, strict=True))
            pooled = sum(row.count for row, yes in rows if yes)
            others = sum(row.count for row, yes in rows if not yes)
            assert pooled <= max(8, self.smooth_tokens - others)

    def run(self, check: Callable[[], None] = lambda: None) -> dict[int, Answer]:
        """Step until nothing is left to do, and `check` after each step."""
        for _ in range(10_000):
            if not self.scheduler.busy:
                self.collect()
                return self.answers
            self.step()
            check()
        raise AssertionError("the work never ended")

    def collect(self) -> None:
        """Take the output and check it against what was told before."""
        output = self.scheduler.take_output()
        if output is None:
            return
        self.outputs.append(output)
        assert not output.counts
        for started in output.started:
            answer = self._open(started.id)
            assert not answer.started, "started twice"
            answer.started.append(started)
        for sequence_id, token in zip(output.ids, unpack_tokens(output.tokens), strict=True):
            self._open(sequence_id).tokens.append(token)
        for values in output.logprobs:
            self._open(values.id).logprobs.append(values)
        for values in output.prompt_logprobs:
            self._open(values.id).prompt_logprobs.append(values)
        for vector in output.embeddings:
            self._open(vector.id).embeddings.append(vector.values)
        for finish in output.finished:
            self._open(finish.id).finishes.append(finish)

    def _open(self, sequence_id: int) -> Answer:
        answer = self.answers.setdefault(sequence_id, Answer())
        assert not answer.finishes, f"news of sequence {sequence_id} after its end"
        return answer


def told_logprobs(parts: Iterable[Logprobs]) -> Iterator[tuple[int, float]]:
    """(position, log-probability) of all parts, in the order of arrival."""
    for part in parts:
        yield from enumerate(unpack_floats(part.chosen), part.start)


def check_pool(pool: BlockPool, holders: Iterable[list[int]]) -> None:
    """Every invariant of the pool, `holders` being all block tables there are."""
    counts = [0] * pool.num_blocks
    for table in holders:
        assert len(set(table)) == len(table), "a block twice in one table"
        for block in table:
            counts[block] += 1
    assert pool._counts == counts, "reference counts are not the numbers of holders"
    blank, cached = pool._blank, list(pool._cached)
    free = blank + cached
    assert sorted(free) == [block for block, count in enumerate(counts) if count == 0]
    assert (pool.num_free, pool.num_cached) == (len(free), len(cached))
    assert pool.num_held + pool.num_free == pool.num_blocks
    index = pool._index
    if index is None:
        assert not cached
        return
    assert all(block in index for block in cached)
    assert not any(block in index for block in blank)
    check_index(index)


def check_index(index: PrefixIndex) -> None:
    """Digest → block, block → entry and parent → children agree."""
    entries = index._entries
    full = {entry.digest: block for block, entry in entries.items() if entry.digest is not None}
    assert index._full == full
    children: dict[bytes, list[tuple[bytes, int]]] = {}
    for block, entry in entries.items():
        children.setdefault(entry.parent, []).append((entry.tokens, block))
    assert index._children == {parent: sorted(found) for parent, found in children.items()}
