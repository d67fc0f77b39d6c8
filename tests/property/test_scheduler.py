"""engine.scheduler over a device that checks every read: any arrival, any abort, any pool.

Tokens are a pure function of the whole text before them, so that whatever the scheduler does with
batches, chunks, caches, victims and steps in flight, each answer must equal that of the oracle,
which computes one sequence alone. Two or three tokens make texts collide often.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine.policy import pooled_slots
from engine.protocol import NO_MEMORY, Limits, Pooling, Sampling, Submit, unpack_tokens
from tests.fakes import (
    Answer,
    Driver,
    check_pool,
    embedding,
    generate,
    logprob,
    make_limits,
    make_submit,
    text_mark,
    told_logprobs,
)

MAX_LEN = 20
VOCAB_SIZE = 3

all_limits = st.builds(
    make_limits,
    max_len=st.just(MAX_LEN),
    vocab_size=st.just(VOCAB_SIZE),
    block_size=st.integers(1, 4),
    num_blocks=st.integers(3, 12),
    max_batch=st.integers(1, 5),
)
samplings = st.builds(
    Sampling,
    logprobs=st.sampled_from([-1, -1, 0, 2]),
    prompt_logprobs=st.sampled_from([-1, -1, -1, 0, 1]),
    min_new=st.sampled_from([0, 0, 3]),
)
prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_LEN)
requests = st.fixed_dictionaries(
    {
        "tokens": prompts,
        "max_new": st.integers(0, 12),
        "sampling": samplings,
        "stop_ids": st.sampled_from([(), (0,), (1, 2)]),
        "salt": st.sampled_from([b"", b"", b"tenant"]),
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
        "num_generated": st.integers(0, 2),
    }
)
poolings = st.builds(Pooling, dimensions=st.sampled_from([0, 0, 2]))
pooled_requests = st.fixed_dictionaries(
    {
        "tokens": prompts,
        "max_new": st.just(0),
        "priority": st.sampled_from([0, 0, -5]),
        "num_generated": st.just(0),
        "pooling": poolings,
    }
)


def submit_of(number: int, fields: dict[str, object]) -> Submit:
    """The last `num_generated` of the tokens are a continuation's."""
    fields = dict(fields)
    generated, tokens = fields.pop("num_generated"), fields["tokens"]
    assert isinstance(generated, int)
    assert isinstance(tokens, list)
    return make_submit(number, num_prompt=max(1, len(tokens) - generated), **fields)  # type: ignore[arg-type]


def fits(submit: Submit, limits: Limits) -> bool:
    """Whether the engine promises to run it."""
    length = len(submit.tokens) // 4
    if length + min(1, submit.max_new) > limits.max_len:
        return False
    end = min(length + submit.max_new, limits.max_len)
    return max(length, end - 1) <= limits.num_blocks * limits.block_size


def check_answer(submit: Submit, answer: Answer, limits: Limits, cut_short: bool = False) -> None:
    """One end, and exactly the oracle's tokens and log-probabilities (or the start of them)."""
    assert len(answer.finishes) == 1
    if not fits(submit, limits):
        assert (answer.reason, answer.tokens, answer.started) == ("error", [], [])
        return
    if submit.pooling is not None:
        check_pooled(submit, answer, cut_short)
        return
    assert answer.embeddings == []
    tokens, reason = generate(submit, limits)
    if answer.reason in ("stop", "length"):
        assert (answer.tokens, answer.reason) == (tokens, reason)
        assert len(answer.started) == 1
    else:
        assert cut_short, f"{submit} ended with {answer.finishes}"
        assert answer.tokens == tokens[: len(answer.tokens)]
    check_logprobs(submit, answer)


def check_pooled(submit: Submit, answer: Answer, cut_short: bool) -> None:
    assert submit.pooling is not None
    assert answer.tokens == []
    if answer.reason == "stop":
        assert answer.embeddings == [embedding(unpack_tokens(submit.tokens), submit.pooling)]
        assert [started.cached for started in answer.started] == [0]
    else:
        assert cut_short, f"{submit} ended with {answer.finishes}"
        assert answer.embeddings == []


def check_logprobs(submit: Submit, answer: Answer) -> None:
    prompt = unpack_tokens(submit.tokens)
    text = prompt + answer.tokens
    told = list(told_logprobs(answer.logprobs))
    positions = range(len(prompt), len(text)) if submit.sampling.logprobs >= 0 else ()
    assert told == [(at, logprob(text_mark(text[: at + 1]))) for at in positions]
    told = list(told_logprobs(answer.prompt_logprobs))
    num_prompt = submit.num_prompt or len(prompt)
    end = num_prompt if submit.sampling.prompt_logprobs >= 0 else 1
    whole = [(at, logprob(text_mark(text[: at + 1]))) for at in range(1, end)]
    if answer.reason in ("stop", "length"):
        assert told == whole
    else:
        assert told == whole[: len(told)]


class SchedulerMachine(RuleBasedStateMachine):
    """Submits, aborts, failing rows and steps with or without running ahead, in any order.

    The driver checks each plan, the fake device each read.
    """

    @initialize(limits=all_limits, step_tokens=st.integers(1, 16), prefix_cache=st.booleans())
    def start(self, limits: Limits, step_tokens: int, prefix_cache: bool) -> None:
        self.driver = Driver(limits, step_tokens=step_tokens, prefix_cache=prefix_cache)
        self.driver.runner.fails = lambda row: "failed" if row.id in self.failing else None
        self.submits: dict[int, Submit] = {}
        self.failing: set[int] = set()
        self.aborted: set[int] = set()

    @rule(fields=requests)
    def submit(self, fields: dict[str, object]) -> None:
        number = len(self.submits)
        self.submits[number] = submit_of(number, fields)
        self.driver.submit(self.submits[number])

    @rule(fields=pooled_requests, count=st.integers(1, 6))
    def submit_texts(self, fields: dict[str, object], count: int) -> None:
        """Several texts to be embedded, as one request brings them."""
        for _ in range(count):
            self.submit(fields)

    @rule(smooth_tokens=st.integers(0, 12))
    def tune(self, smooth_tokens: int) -> None:
        """The loop has learnt how fast the device is."""
        self.driver.smooth_tokens = smooth_tokens

    @rule(fields=requests, count=st.integers(2, 4))
    def submit_choices(self, fields: dict[str, object], count: int) -> None:
        """Several choices of one request: equal prompts at the same moment."""
        for _ in range(count):
            self.submit(fields)

    @rule(fields=requests, data=st.data())
    def submit_next_turn(self, fields: dict[str, object], data: st.DataObject) -> None:
        """A prompt that begins with an earlier prompt and its answer."""
        old = [n for n, answer in self.driver.answers.items() if answer.tokens]
        if not old:
            return
        number = data.draw(st.sampled_from(old))
        earlier = unpack_tokens(self.submits[number].tokens) + self.driver.answers[number].tokens
        tokens = [*earlier, *fields["tokens"]][:MAX_LEN]  # type: ignore[misc]
        salt = self.submits[number].salt
        self.submit({**fields, "tokens": tokens, "salt": salt})

    @rule(overlap=st.sampled_from([0, 1, 1]), count=st.integers(1, 4))
    def step(self, overlap: int, count: int) -> None:
        for _ in range(count):
            self.driver.step(overlap)

    @precondition(lambda self: self.submits)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.submits)))
        self.aborted.add(number)
        self.driver.scheduler.abort((number, number))

    @precondition(lambda self: self.submits)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.failing.add(data.draw(st.sampled_from(sorted(self.submits))))

    @rule(launched=st.booleans(), count=st.integers(1, 3))
    def find_no_memory(self, launched: bool, count: int) -> None:
        """R25: each step that finds none costs one sequence, and the others nothing but time."""
        for _ in range(count):
            before = self.starved
            self.driver.starve(launched=launched)
            assert len(self.starved) <= len(before) + 1

    @property
    def starved(self) -> set[int]:
        return {
            number
            for number, answer in self.driver.answers.items()
            if answer.finishes and answer.finishes[0].detail == NO_MEMORY
        }

    @invariant()
    def the_books_agree(self) -> None:
        scheduler, limits = self.driver.scheduler, self.driver.limits
        running, waiting = scheduler.running, scheduler.waiting
        check_pool(self.driver.pool, [sequence.blocks for sequence in running])
        ids = [sequence.id for sequence in running + waiting]
        assert len(set(ids)) == len(ids), "a sequence in two queues"
        ended = {number for number, answer in self.driver.answers.items() if answer.finishes}
        assert not ended & set(ids)
        slots = [sequence.slot for sequence in running]
        assert len(set(slots)) == len(slots) <= limits.max_batch
        pooled = [sequence for sequence in running if sequence.pooling is not None]
        assert len(pooled) <= pooled_slots(limits.max_batch)
        for queue in (running, waiting):
            assert [s.rank for s in queue] == sorted(s.rank for s in queue)
        for sequence in waiting:
            assert sequence.phase == "waiting"
            assert (sequence.blocks, sequence.scheduled, sequence.computed) == ([], 0, 0)
        for sequence in running:
            assert sequence.phase == "running"
            assert sequence.computed <= sequence.scheduled <= sequence.num_kv
            assert sequence.inflight <= 2
            assert sequence.scheduled <= len(sequence.blocks) * limits.block_size
            assert len(sequence.chain) * limits.block_size <= sequence.max_total + limits.block_size

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.driver.overlap = 1
        answers = self.driver.run(self.the_books_agree)
        assert set(answers) == set(self.submits), "each submit ends"
        for number, submit in self.submits.items():
            cut_short = number in self.aborted | self.failing | self.starved
            check_answer(submit, answers[number], self.driver.limits, cut_short)
        check_pool(self.driver.pool, [])
        assert self.driver.scheduler.plan() is None
        stats = self.driver.scheduler.stats
        assert (stats.blocks_leaked, stats.blocks_held, stats.waiting, stats.running) == (0,) * 4
        event(f"preempted: {stats.preemptions > 0}, copied: {self.driver.runner.num_copied > 0}")


TestScheduler = SchedulerMachine.TestCase


@given(
    limits=all_limits,
    step_tokens=st.sampled_from([1, 2, 7, 64]),
    overlap=st.sampled_from([0, 1]),
    prefix_cache=st.booleans(),
    workload=st.lists(
        st.tuples(st.one_of(requests, requests, pooled_requests), st.integers(0, 3)),
        min_size=1,
        max_size=10,
    ),
)
def test_answers_depend_on_nothing_but_the_request(
    limits: Limits,
    step_tokens: int,
    overlap: int,
    prefix_cache: bool,
    workload: list[tuple[dict[str, object], int]],
) -> None:
    """Batch, pool, chunk, cache and overlap change when a token comes, never which one."""
    driver = Driver(limits, step_tokens=step_tokens, overlap=overlap, prefix_cache=prefix_cache)
    submits = [submit_of(number, fields) for number, (fields, _steps) in enumerate(workload)]
    for submit, (_fields, steps) in zip(submits, workload, strict=True):
        driver.submit(submit)
        for _ in range(steps):
            driver.step()
    answers = driver.run()
    for submit in submits:
        check_answer(submit, answers[submit.id], limits)
    check_pool(driver.pool, [])
    assert driver.scheduler.stats.blocks_leaked == 0


@pytest.mark.parametrize("chunk", range(4))
def test_a_crowd_in_a_small_pool(chunk: int) -> None:
    """Dense workloads from a seed, every mechanism at work in each; no shrinking.

    Prompts are cut from a few shared texts, so that hits, partial hits and equal prompts at the
    same moment are the rule.
    """
    totals = {"preemptions": 0, "copied": 0, "hits": 0}
    for seed in range(chunk * 100, chunk * 100 + 100):
        driver = crowd(random.Random(seed))
        stats = driver.scheduler.stats
        totals["preemptions"] += stats.preemptions
        totals["hits"] += stats.prefix_hit_tokens
        totals["copied"] += driver.runner.num_copied
    assert min(totals.values()) > 100, totals


def crowd(chance: random.Random) -> Driver:
    """Runs one such workload to its end and checks every answer."""
    block_size = chance.choice([1, 2, 3, 4, 4])
    limits = make_limits(
        max_len=MAX_LEN,
        vocab_size=VOCAB_SIZE,
        block_size=block_size,
        num_blocks=chance.randrange(MAX_LEN, 2 * MAX_LEN) // block_size,
        max_batch=chance.randrange(2, 8),
    )
    driver = Driver(limits, step_tokens=chance.choice([1, 3, 8, 40]))
    themes = [[chance.randrange(VOCAB_SIZE) for _ in range(MAX_LEN)] for _ in range(3)]
    submits: dict[int, Submit] = {}
    aborted: set[int] = set()
    for _ in range(25):
        prompt = chance.choice(themes)[: chance.randrange(1, MAX_LEN)]
        for _choice in range(chance.choice([1, 1, 1, 3])):
            submit = make_submit(
                len(submits),
                [*prompt, *([chance.randrange(VOCAB_SIZE)] if len(prompt) < MAX_LEN - 1 else [])],
                chance.randrange(0, 12),
                sampling=Sampling(prompt_logprobs=chance.choice([-1, -1, -1, 0])),
                stop_ids=chance.choice([(), (), (0,)]),
                priority=chance.choice([0, 0, 0, 1]),
            )
            submits[submit.id] = submit
            driver.submit(submit)
        if chance.random() < 0.4:
            text = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(1, MAX_LEN))]
            submit = make_submit(len(submits), text, 0, pooling=Pooling())
            submits[submit.id] = submit
            driver.submit(submit)
        driver.smooth_tokens = chance.choice([1, 8, 40])
        for _step in range(chance.randrange(6)):
            driver.step(chance.choice([0, 1, 1]))
        if chance.random() < 0.2:
            victim = chance.choice(sorted(submits))
            aborted.add(victim)
            driver.scheduler.abort([victim])
        check_pool(driver.pool, [sequence.blocks for sequence in driver.scheduler.running])
    answers = driver.run()
    for submit in submits.values():
        check_answer(submit, answers[submit.id], limits, submit.id in aborted)
    check_pool(driver.pool, [])
    assert driver.scheduler.stats.blocks_leaked == 0
    return driver


def test_a15_ten_thousand_aborts_leak_nothing() -> None:
    """sglang#36475 and imp#1115: a disconnect, or every request, that keeps a block for ever."""
    chance = random.Random(0)
    driver = Driver(make_limits(num_blocks=24, max_batch=6), step_tokens=16)
    live: list[int] = []
    for number in range(10_000):
        prompt = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(1, 30))]
        driver.submit(make_submit(number, prompt, 12))
        live.append(number)
        for _ in range(chance.randrange(3)):
            driver.step(chance.choice([0, 1]))
        while len(live) > chance.randrange(12):
            driver.scheduler.abort([live.pop(chance.randrange(len(live)))])
    answers = driver.run()
    assert len(answers) == 10_000
    assert sum(answer.reason == "abort" for answer in answers.values()) > 5_000
    check_pool(driver.pool, [])
    assert driver.scheduler.plan() is None
    assert driver.scheduler.stats.blocks_leaked == 0
