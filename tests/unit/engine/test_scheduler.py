"""engine.scheduler: what is planned, what is told, and the named bugs of other engines."""

from __future__ import annotations

import random

import pytest

from engine.plan import Copy, Row, Sampled
from engine.protocol import Sampling, Started, unpack_floats, unpack_tokens
from engine.scheduler import Scheduler
from tests.fakes import (
    Driver,
    check_pool,
    extend_mark,
    generate,
    logprob,
    make_limits,
    make_pool,
    make_submit,
    rivals,
    text_mark,
    told_logprobs,
)

OVERLAPS = pytest.mark.parametrize("overlap", [0, 1])


def rows_of(driver: Driver) -> list[list[tuple[int, int, int, bool]]]:
    """(id, start, count, samples) of every row of every step."""
    return [[(r.id, r.start, r.count, r.samples) for r in plan.rows] for plan in driver.plans]


def expect(driver: Driver, *submits: object) -> None:
    """Every one of these got exactly the oracle's answer, and all blocks are back."""
    for submit in submits:
        answer = driver.answers[submit.id]  # type: ignore[attr-defined]
        assert (answer.tokens, answer.reason) == generate(submit, driver.limits)  # type: ignore[arg-type]
        assert len(answer.started) == 1
    check_pool(driver.pool, [])
    assert driver.scheduler.stats.blocks_held == 0


# -- plans


def test_an_idle_scheduler_plans_and_tells_nothing() -> None:
    driver = Driver()
    assert not driver.scheduler.busy
    assert driver.scheduler.plan() is None
    assert driver.scheduler.take_output() is None


def test_a_prompt_is_computed_in_chunks_and_only_its_end_samples() -> None:
    driver = Driver(step_tokens=4)
    submit = make_submit(1, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], 2)
    driver.submit(submit)
    driver.run()
    assert rows_of(driver) == [
        [(1, 0, 4, False)],
        [(1, 4, 4, False)],
        [(1, 8, 2, True)],
        [(1, 10, 1, True)],
    ]
    expect(driver, submit)


def test_decode_rows_come_first_and_prompts_fill_the_rest() -> None:
    driver = Driver(make_limits(vocab_size=50), step_tokens=6)
    first, second, third = (
        make_submit(1, [1, 2], 4),
        make_submit(2, [3, 4, 5, 6, 7, 8, 9], 2),
        make_submit(3, [10, 11, 12], 2),
    )
    driver.submit(first, second, third)
    driver.run()
    assert rows_of(driver)[:3] == [
        [(1, 0, 2, True), (2, 0, 4, False)],
        [(1, 2, 1, True), (2, 4, 3, True), (3, 0, 2, False)],
        [(1, 3, 1, True), (2, 7, 1, True), (3, 2, 1, True)],
    ]
    expect(driver, first, second, third)


def test_a_step_refers_to_a_token_that_only_the_device_has_seen() -> None:
    """Depth 1: the second plan exists before the first result, and no length limit is overrun."""
    driver = Driver()
    scheduler = driver.scheduler
    scheduler.add(make_submit(1, [0, 1, 2], 2))
    first, second = scheduler.plan(), scheduler.plan()
    assert first is not None
    assert second is not None
    assert second.rows == [Row(slot=second.rows[0].slot, id=1, start=3, count=1, samples=True)]
    with pytest.raises(RuntimeError, match="third"):
        scheduler.plan()
    with pytest.raises(RuntimeError, match="next"):
        scheduler.commit(second, Sampled([1], {}, {}, {}))
    scheduler.commit(first, Sampled([1], {}, {}, {}))
    assert scheduler.plan() is None, "two tokens are known or on their way, that is all"
    assert scheduler.busy
    scheduler.commit(second, Sampled([1], {}, {}, {}))
    assert not scheduler.busy


def test_a_stop_found_late_voids_the_row_already_launched() -> None:
    driver = Driver(overlap=1)
    prompt = [0, 1, 2]
    stop = generate(make_submit(0, prompt, 1), driver.limits)[0]
    submit = make_submit(1, prompt, 5, stop_ids=(stop[0],))
    driver.submit(submit)
    answers = driver.run()
    assert len(driver.plans) == 2, "one step of slack"
    assert (answers[1].tokens, answers[1].reason) == (stop, "stop")
    expect(driver, submit)


def test_a_slot_and_blocks_are_given_on_while_a_void_row_is_in_flight() -> None:
    """vllm-ascend#14055, mini-sglang#103: blocks freed while a launched step still writes them."""
    driver = Driver(make_limits(num_blocks=2, max_batch=1, vocab_size=9), overlap=1)
    stop = generate(make_submit(0, [0, 1, 2], 1), driver.limits)[0]
    first = make_submit(1, [0, 1, 2], 5, stop_ids=(stop[0],))
    second = make_submit(2, [5, 6, 7, 8], 3)
    driver.submit(first, second)
    driver.run()
    expect(driver, first, second)


def test_priority_decides_who_is_admitted_first() -> None:
    driver = Driver(make_limits(max_batch=1))
    submits = [make_submit(n, [n % 3], 1, priority=p) for n, p in enumerate((1, 0, -1, 0))]
    driver.submit(*submits)
    driver.run()
    assert [started.id for output in driver.outputs for started in output.started] == [2, 1, 3, 0]


def test_more_sequences_than_slots_take_turns() -> None:
    driver = Driver(make_limits(max_batch=2))
    submits = [make_submit(n, [n % 3, 1], 3) for n in range(5)]
    driver.submit(*submits)
    while driver.scheduler.busy:
        driver.step()
        assert len(driver.scheduler.running) <= 2
    expect(driver, *submits)


# -- reuse


def test_the_same_prompt_again_is_nearly_free() -> None:
    driver = Driver(make_limits(vocab_size=50), step_tokens=20)
    prompt = list(range(1, 13))
    first, again = make_submit(1, prompt, 1), make_submit(2, prompt, 1)
    for submit in (first, again):
        driver.submit(submit)
        driver.run()
    assert driver.answers[2].started == [Started(2, 11)]
    assert rows_of(driver)[-1] == [(2, 11, 1, True)]
    assert driver.plans[-1].copies[0].count == 3, "the last block is copied, its last token not"
    stats = driver.scheduler.stats
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (24, 11)
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (24, 2, 2)
    expect(driver, first, again)


def test_the_next_turn_of_a_chat_reuses_the_answer_too() -> None:
    driver = Driver(make_limits(vocab_size=50), step_tokens=20)
    first = make_submit(1, [1, 2, 3, 4, 5], 6)
    driver.submit(first)
    answer = driver.run()[1].tokens
    turn = make_submit(2, [1, 2, 3, 4, 5, *answer, 7, 8], 2)
    driver.submit(turn)
    driver.run()
    assert driver.answers[2].started == [Started(2, 10)], "all but the token never fed back"
    expect(driver, first, turn)


def test_the_start_of_a_text_stays_cached_longest() -> None:
    driver = Driver(make_limits(num_blocks=4, vocab_size=50, max_len=17), step_tokens=20)
    for number, prompt in enumerate(([*range(1, 13)], [30] * 8, [*range(1, 13)])):
        driver.submit(make_submit(number, prompt, 1))
        driver.run()
    assert driver.answers[2].started == [Started(2, 8)], "the one block lost was the last one"


def test_salted_prompts_are_not_shared() -> None:
    driver = Driver(step_tokens=20)
    for number, salt in enumerate((b"a", b"b", b"a")):
        driver.submit(make_submit(number, [1] * 9, 1, salt=salt))
        driver.run()
    assert [driver.answers[n].started[0].cached for n in range(3)] == [0, 0, 8]


def test_a_tiny_shared_start_is_computed_rather_than_copied() -> None:
    limits = make_limits(vocab_size=99, block_size=32, max_len=99)
    driver = Driver(limits, step_tokens=200)
    for number, shared in enumerate((0, 3, 4)):
        prompt = list(range(1, 40)) if not number else [*range(1, shared + 1), 90, 91]
        driver.submit(make_submit(number, prompt, 1))
        driver.run()
    assert [driver.answers[n].started[0].cached for n in range(3)] == [0, 0, 4]


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    driver = Driver(make_limits(vocab_size=50, max_batch=8), step_tokens=64)
    submits = [make_submit(n, [*range(1, 14), 20 + n], 3) for n in range(6)]
    driver.submit(*submits)
    driver.run()
    assert [driver.answers[n].started[0].cached for n in range(6)] == [0, *([12] * 5)]
    assert driver.scheduler.stats.steps <= 4
    expect(driver, *submits)


@OVERLAPS
def test_a_block_is_offered_only_after_its_step_is_committed(overlap: int) -> None:
    """nano-vllm#208: a hit on blocks that are not computed yet."""
    driver = Driver(make_limits(vocab_size=50), step_tokens=4, overlap=overlap)
    first, second = make_submit(1, [*range(1, 11)], 2), make_submit(2, [*range(1, 11), 3], 2)
    driver.submit(first)
    driver.step()
    driver.submit(second)
    driver.run()
    expect(driver, first, second)


def test_hits_equal_misses_under_churn_in_a_tiny_pool() -> None:
    """tenstorrent/vllm#415, vllm#39146: output that is wrong only on hits."""
    chance = random.Random(1)
    driver = Driver(make_limits(num_blocks=7, vocab_size=2, max_len=24), step_tokens=9, overlap=1)
    submits = [
        make_submit(n, [chance.randrange(2) for _ in range(chance.randrange(1, 18))], 5)
        for n in range(60)
    ]
    for submit in submits:
        driver.submit(submit)
        driver.step()
    driver.run()
    expect(driver, *submits)
    assert driver.scheduler.stats.prefix_hit_tokens > 50
    assert driver.runner.num_copied > 20


def test_the_last_block_of_the_pool_serves_as_source_only_if_it_can_be_spared() -> None:
    driver = Driver(make_limits(num_blocks=2, max_len=9, vocab_size=50), step_tokens=9)
    first, second = make_submit(1, [1, 2, 3, 4, 5, 6], 1), make_submit(2, [1, 2, 3, 9, 9], 4)
    driver.submit(first)
    driver.run()
    driver.submit(second)
    driver.run()
    assert driver.answers[2].started == [Started(2, 0)]
    expect(driver, first, second)


# -- preemption


@OVERLAPS
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_who_must_go_comes_back_and_repeats_nothing(overlap: int, prefix_cache: bool) -> None:
    """nano-vllm#211, #217: numbers that are stale after preemption."""
    driver = Driver(
        make_limits(num_blocks=5, vocab_size=50, max_len=17),
        overlap=overlap,
        prefix_cache=prefix_cache,
    )
    submits = [make_submit(n, [n, n, n], 12) for n in (1, 2, 3)]
    driver.submit(*submits)
    driver.run()
    assert driver.scheduler.stats.preemptions >= 2
    assert [s.id for o in driver.outputs for s in o.started] == [1, 2, 3]
    finished = [f.id for o in driver.outputs for f in o.finished]
    assert finished == [1, 2, 3], "the first to come is the last to go"
    expect(driver, *submits)


def test_a_token_in_flight_at_preemption_is_kept() -> None:
    driver = Driver(make_limits(num_blocks=5, vocab_size=50, max_len=17), overlap=1, step_tokens=16)
    first, second = make_submit(1, [1] * 6, 11), make_submit(2, [2] * 7, 6)
    driver.submit(first, second)
    for _ in range(3):
        driver.step()
    known = len(driver.answers[2].tokens)
    driver.step()  # the first one needs a fifth block, and the second one's token is on its way
    assert [sequence.id for sequence in driver.scheduler.waiting] == [2]
    assert len(driver.answers[2].tokens) == known + 1
    driver.run()
    expect(driver, first, second)


def test_the_least_important_is_preempted() -> None:
    driver = Driver(make_limits(num_blocks=5, vocab_size=50, max_len=17))
    lazy, urgent = make_submit(1, [1] * 6, 11, priority=1), make_submit(2, [2] * 6, 11)
    driver.submit(lazy)
    driver.step()
    driver.submit(urgent)
    driver.run()
    assert driver.scheduler.stats.preemptions >= 1
    assert [f.id for o in driver.outputs for f in o.finished] == [2, 1]
    expect(driver, lazy, urgent)


def test_an_admission_leaves_a_reserve_for_those_who_run() -> None:
    driver = Driver(make_limits(num_blocks=4, vocab_size=50, max_len=16))
    driver.submit(make_submit(1, [1] * 7, 8), make_submit(2, [2] * 8, 1))
    driver.step()
    assert [sequence.id for sequence in driver.scheduler.waiting] == [2]
    driver.run()
    assert driver.scheduler.stats.preemptions == 0


def test_a_sequence_that_fills_the_whole_pool_runs_alone() -> None:
    driver = Driver(make_limits(num_blocks=3, max_len=13))
    submit = make_submit(1, [1, 2], 11)
    driver.submit(submit, make_submit(2, [2] * 11, 2))
    driver.run()
    expect(driver, submit)
    assert driver.answers[2].reason == "length"


# -- ends


def test_generation_ends_at_the_context_limit() -> None:
    driver = Driver(make_limits(max_len=8))
    submit = make_submit(1, [1, 2, 0], 100)
    driver.submit(submit)
    answer = driver.run()[1]
    assert (len(answer.tokens), answer.reason) == (5, "length")
    expect(driver, submit)


@OVERLAPS
@pytest.mark.parametrize("length", [1, 4, 9, 64])
def test_nothing_to_generate_still_computes_the_prompt(length: int, overlap: int) -> None:
    driver = Driver(overlap=overlap)
    driver.submit(make_submit(1, [1] * length, 0, sampling=Sampling(prompt_logprobs=0)))
    answer = driver.run()[1]
    assert (answer.tokens, answer.reason) == ([], "length")
    assert len(list(told_logprobs(answer.prompt_logprobs))) == length - 1
    assert not any(row.samples for plan in driver.plans for row in plan.rows)
    check_pool(driver.pool, [])


@OVERLAPS
def test_no_stop_before_min_new_tokens(overlap: int) -> None:
    driver = Driver(make_limits(vocab_size=2), overlap=overlap)
    submit = make_submit(1, [1], 9, stop_ids=(1,), sampling=Sampling(min_new=3))
    driver.submit(submit)
    answer = driver.run()[1]
    assert answer.tokens[:3] == [0, 0, 0]
    expect(driver, submit)


def test_a_continuation_goes_on_as_if_never_interrupted() -> None:
    driver = Driver(make_limits(vocab_size=50))
    whole = make_submit(1, [1, 2, 3], 8, sampling=Sampling(min_new=5), stop_ids=(7,))
    tokens, reason = generate(whole, driver.limits)
    rest = make_submit(
        2,
        [1, 2, 3, *tokens[:3]],
        5,
        sampling=whole.sampling,
        stop_ids=whole.stop_ids,
        num_prompt=3,
    )
    driver.submit(rest)
    answer = driver.run()[2]
    assert (answer.tokens, answer.reason) == (tokens[3:], reason)


BAD = {
    "no tokens": make_submit(1, []),
    "negative id": make_submit(1, [-1]),
    "id too large": make_submit(1, [3]),
    "stop id too large": make_submit(1, [1], stop_ids=(3,)),
    "bias id negative": make_submit(1, [1], sampling=Sampling(logit_bias=((-1, 1.0),))),
    "negative max_new": make_submit(1, [1], -1),
    "num_prompt too large": make_submit(1, [1], num_prompt=2),
    "num_prompt negative": make_submit(1, [1], num_prompt=-1),
    "no room for a token": make_submit(1, [1] * 64, 1),
    "longer than the context": make_submit(1, [1] * 65, 0),
    "odd bytes": make_submit(1, [1]).__class__(1, 1, b"abc", Sampling(), 1),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_submit_costs_itself_only(name: str) -> None:
    driver = Driver()
    good = make_submit(2, [1, 2], 3)
    driver.submit(BAD[name], good)
    answers = driver.run()
    assert answers[1].reason == "error"
    assert answers[1].finishes[0].detail
    expect(driver, good)


@pytest.mark.parametrize(
    ("prompt", "max_new", "fits"), [(12, 0, True), (13, 0, False), (5, 8, True), (5, 9, False)]
)
def test_what_the_pool_can_never_hold_is_refused(prompt: int, max_new: int, fits: bool) -> None:
    driver = Driver(make_limits(num_blocks=3))
    driver.submit(make_submit(1, [1] * prompt, max_new))
    assert driver.run()[1].reason == ("length" if fits else "error")


def test_a_duplicate_id_is_refused_and_the_first_one_goes_on() -> None:
    """vllm#10583: the same id twice crashes the engine or mixes the two."""
    driver = Driver()
    scheduler = driver.scheduler
    scheduler.add(make_submit(1, [1, 2], 3))
    scheduler.add(make_submit(1, [2, 2], 3))
    output = scheduler.take_output()
    assert output is not None
    assert [(finish.id, finish.reason) for finish in output.finished] == [(1, "error")]
    driver.run()
    assert (driver.answers[1].tokens, driver.answers[1].reason) == generate(
        make_submit(1, [1, 2], 3), driver.limits
    )


@OVERLAPS
def test_an_id_may_be_used_again_while_its_void_row_is_in_flight(overlap: int) -> None:
    """vllm#23697: what is in flight for the old one must not reach the new one."""
    driver = Driver(make_limits(vocab_size=50), overlap=overlap)
    driver.submit(make_submit(1, [1, 2], 9))
    driver.step()
    driver.step()
    driver.scheduler.abort((1,))
    driver.collect()
    assert driver.answers.pop(1).reason == "abort"
    again = make_submit(1, [3, 4], 9)
    driver.submit(again)
    driver.run()
    expect(driver, again)


@OVERLAPS
@pytest.mark.parametrize("steps", range(5))
def test_an_abort_ends_once_at_any_moment(steps: int, overlap: int) -> None:
    driver = Driver(step_tokens=4, overlap=overlap)
    other = make_submit(2, [2, 1], 6)
    driver.submit(make_submit(1, [0, 1, 2, 0, 1, 2], 6), other)
    for _ in range(steps):
        driver.step()
    driver.scheduler.abort([1, 1, 77])
    driver.scheduler.abort([1])
    check_pool(driver.pool, [sequence.blocks for sequence in driver.scheduler.running])
    answers = driver.run()
    assert answers[1].reason == "abort"
    expect(driver, other)


@OVERLAPS
def test_a_failed_row_ends_its_sequence_and_poisons_no_cache(overlap: int) -> None:
    driver = Driver(make_limits(vocab_size=50), overlap=overlap)
    good = make_submit(2, [9, 8, 7], 6)
    driver.submit(make_submit(1, [1, 2, 3, 4, 5], 6), good)
    driver.step()
    driver.runner.fails = lambda row: "not a number" if row.id == 1 else None
    answers = driver.run()
    assert [(f.reason, f.detail) for f in answers[1].finishes] == [("error", "not a number")]
    assert len(answers[1].tokens) <= 1
    expect(driver, good)
    again = make_submit(3, [1, 2, 3, 4, 5], 2)
    driver.submit(again)
    assert driver.run()[3].started == [Started(3, 0)]


def test_a_sequence_may_fail_after_it_was_preempted() -> None:
    driver = Driver(make_limits(num_blocks=5, vocab_size=50, max_len=17), overlap=1, step_tokens=16)
    first = make_submit(1, [1] * 6, 11)
    driver.submit(first, make_submit(2, [2] * 7, 6))
    driver.runner.fails = lambda row: "broken" if (row.id, row.start) == (2, 8) else None
    for _ in range(4):
        driver.step()
    assert driver.scheduler.stats.preemptions == 1
    assert driver.answers[2].reason == "error"
    driver.run()
    expect(driver, first)


# -- log-probabilities


@OVERLAPS
@pytest.mark.parametrize("best", [0, 2])
def test_logprobs_tell_each_new_token_once(best: int, overlap: int) -> None:
    driver = Driver(overlap=overlap)
    submit = make_submit(1, [1, 2], 5, sampling=Sampling(logprobs=best))
    driver.submit(submit, make_submit(2, [2], 5))
    answer = driver.run()[1]
    text = [1, 2, *answer.tokens]
    marks = [text_mark(text[:end]) for end in range(3, 8)]
    assert list(told_logprobs(answer.logprobs)) == [
        (position, logprob(mark)) for position, mark in enumerate(marks, 2)
    ]
    for part, mark in zip(answer.logprobs, marks, strict=True):
        told = list(zip(unpack_tokens(part.top_ids), unpack_floats(part.top), strict=True))
        assert told == rivals(mark, best)
    assert not driver.answers[2].logprobs


@OVERLAPS
@pytest.mark.parametrize("step_tokens", [1, 3, 4, 64])
def test_prompt_logprobs_are_complete_although_the_prompt_is_cached(
    step_tokens: int, overlap: int
) -> None:
    driver = Driver(make_limits(vocab_size=50), step_tokens=step_tokens, overlap=overlap)
    prompt = list(range(1, 12))
    driver.submit(make_submit(1, prompt, 1))
    driver.run()
    driver.submit(make_submit(2, prompt, 3, sampling=Sampling(prompt_logprobs=1)))
    answer = driver.run()[2]
    assert answer.started == [Started(2, 0)]
    expected = [(end, logprob(text_mark(prompt[: end + 1]))) for end in range(1, 11)]
    assert list(told_logprobs(answer.prompt_logprobs)) == expected


@OVERLAPS
def test_prompt_logprobs_are_told_once_whatever_is_preempted(overlap: int) -> None:
    driver = Driver(
        make_limits(num_blocks=6, vocab_size=50, max_len=20), step_tokens=5, overlap=overlap
    )
    prompt = list(range(20, 32))
    first = make_submit(1, [1, 2, 3], 17)
    second = make_submit(2, prompt, 6, sampling=Sampling(prompt_logprobs=0))
    driver.submit(first, second)
    driver.run()
    assert driver.scheduler.stats.preemptions >= 1
    expected = [(end, logprob(text_mark(prompt[: end + 1]))) for end in range(1, 12)]
    assert list(told_logprobs(driver.answers[2].prompt_logprobs)) == expected
    expect(driver, first, second)


def test_a_continuation_reports_its_prompt_only() -> None:
    driver = Driver(step_tokens=3)
    submit = make_submit(1, [1] * 7, 2, sampling=Sampling(prompt_logprobs=0), num_prompt=5)
    driver.submit(submit)
    told = list(told_logprobs(driver.run()[1].prompt_logprobs))
    assert [position for position, _value in told] == [1, 2, 3, 4]


# -- output and books


def test_a_step_without_tokens_still_shows_progress() -> None:
    driver = Driver(step_tokens=2)
    driver.submit(make_submit(1, [1] * 6, 1))
    driver.run()
    assert [(output.step, output.ids) for output in driver.outputs] == [(1, ()), (2, ()), (3, (1,))]


def test_gauges_follow_the_queues() -> None:
    driver = Driver(make_limits(max_batch=1))
    driver.submit(make_submit(1, [1] * 5, 9), make_submit(2, [1], 9))
    driver.step()
    stats = driver.scheduler.stats
    assert (stats.waiting, stats.running) == (1, 1)
    assert (stats.blocks_total, stats.blocks_held, stats.blocks_cached) == (32, 2, 0)
    driver.run()
    stats = driver.scheduler.stats
    assert (stats.waiting, stats.running, stats.blocks_held) == (0, 0, 0)
    assert stats.generated_tokens == 18


def test_a_leak_is_found_and_healed_when_idle() -> None:
    """sglang#36475: an idle check that finds a leak must not kill the server."""
    driver = Driver()
    driver.submit(make_submit(1, [1] * 5, 2))
    driver.run()
    lost = driver.pool.take(3)
    driver.scheduler.plan()
    assert driver.scheduler.stats.blocks_leaked == len(lost)
    check_pool(driver.pool, [])


def test_a_scheduler_that_could_run_nothing_is_not_built() -> None:
    limits = make_limits()
    with pytest.raises(ValueError, match="step_tokens"):
        Scheduler(make_pool(limits), limits, step_tokens=0)
    with pytest.raises(ValueError, match="pool"):
        Scheduler(make_pool(limits), make_limits(num_blocks=9), step_tokens=8)


def test_plans_are_values_that_later_commits_do_not_change() -> None:
    driver = Driver()
    scheduler = driver.scheduler
    scheduler.add(make_submit(1, [1, 2, 0], 4))
    first = scheduler.plan()
    assert first is not None
    tokens, blocks = first.admits[0].tokens, first.admits[0].blocks
    second = scheduler.plan()
    assert second is not None
    scheduler.commit(first, Sampled([1], {}, {}, {}))
    scheduler.plan()
    assert (tokens, blocks) == ([1, 2, 0], first.admits[0].blocks)
    assert len(blocks) == 1


def test_the_fake_device_notices_what_it_is_meant_to_notice() -> None:
    """The teeth of `FakeRunner` themselves: a plan with a foreign block or a missing copy."""
    driver = Driver(make_limits(vocab_size=50), step_tokens=20)
    driver.submit(make_submit(1, list(range(1, 13)), 1))
    driver.run()
    driver.submit(make_submit(2, list(range(1, 13)), 1))
    plan = driver.scheduler.plan()
    assert plan is not None
    assert plan.copies
    with pytest.raises(AssertionError, match="wrong KV"):
        driver.runner.launch(plan._replace(copies=[]))
    driver.runner.last_step -= 1
    with pytest.raises(AssertionError, match="never written"):
        driver.runner.launch(plan._replace(copies=[Copy(20, plan.copies[0].target, 3)]))
    assert extend_mark(0, 1) != extend_mark(0, 2)
