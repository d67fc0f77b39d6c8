"""engine.scheduler: texts to be embedded are background work beside everything else."""

from __future__ import annotations

import pytest

from engine.plan import Sampled
from engine.protocol import Pooling, Sampling, Submit, unpack_tokens
from tests.fakes import Driver, check_pool, embedding, generate, make_limits, make_submit

OVERLAPS = pytest.mark.parametrize("overlap", [0, 1])
POOLING = Pooling()


def text(number: int, length: int, priority: int = 0, pooling: Pooling = POOLING) -> Submit:
    return make_submit(number, [number % 3] * length, 0, pooling=pooling, priority=priority)


def rows_of(driver: Driver) -> list[list[tuple[int, int, int]]]:
    """(id, start, count) of every row of every step."""
    return [[(r.id, r.start, r.count) for r in plan.rows] for plan in driver.plans]


def expect(driver: Driver, *submits: Submit) -> None:
    """Each text got its vector, each chat its answer, and all blocks are back."""
    for submit in submits:
        answer = driver.answers[submit.id]
        if submit.pooling is None:
            assert (answer.tokens, answer.reason) == generate(submit, driver.limits)
        else:
            assert (answer.reason, answer.tokens) == ("stop", [])
            assert answer.embeddings == [embedding(unpack_tokens(submit.tokens), submit.pooling)]
    check_pool(driver.pool, [])
    assert driver.scheduler.stats.blocks_held == 0


@OVERLAPS
def test_texts_alone_fill_the_step(overlap: int) -> None:
    driver = Driver(step_tokens=8, overlap=overlap)
    driver.smooth_tokens = 1
    submits = [text(1, 5), text(2, 12, pooling=Pooling("last", 2)), text(3, 1)]
    driver.submit(*submits)
    driver.run()
    assert rows_of(driver) == [
        [(1, 0, 5), (2, 0, 3)],
        [(2, 3, 8)],
        [(2, 11, 1), (3, 0, 1)],
    ]
    expect(driver, *submits)


def test_others_come_first_and_texts_get_what_a_smooth_step_leaves() -> None:
    driver = Driver(make_limits(vocab_size=50, num_blocks=64), step_tokens=24)
    driver.smooth_tokens = 12
    chat, late = make_submit(1, [1, 2, 3], 6), make_submit(3, [4] * 20, 2)
    texts = text(2, 50, priority=-9)
    driver.submit(texts, chat)
    for _ in range(2):
        driver.step()
    driver.submit(late)
    driver.run()
    assert rows_of(driver) == [
        [(1, 0, 3), (2, 0, 9)],
        [(1, 3, 1), (2, 9, 11)],
        [(1, 4, 1), (3, 0, 20), (2, 20, 3)],  # the budget of the step is spent
        [(1, 5, 1), (3, 20, 1), (2, 23, 10)],
        [(1, 6, 1), (2, 33, 11)],
        [(1, 7, 1), (2, 44, 6)],
    ]
    expect(driver, chat, late, texts)


def test_a_few_tokens_are_always_there_for_texts() -> None:
    driver = Driver(make_limits(max_len=64), step_tokens=32)
    driver.smooth_tokens = 0
    chat, waiting = make_submit(1, [1, 2, 0], 4), text(2, 30)
    driver.submit(chat, waiting)
    driver.run()
    assert rows_of(driver)[:2] == [[(1, 0, 3), (2, 0, 8)], [(1, 3, 1), (2, 8, 8)]]
    expect(driver, chat, waiting)


def test_a_text_that_lacks_one_token_is_no_decode_row() -> None:
    driver = Driver(make_limits(vocab_size=50), step_tokens=4)
    chats = [make_submit(n, [n] * 2, 3) for n in (1, 2)]
    waiting = text(3, 5)
    driver.submit(waiting)
    driver.step()
    driver.submit(*chats)
    driver.run()
    assert rows_of(driver)[:3] == [
        [(3, 0, 4)],
        [(1, 0, 2), (2, 0, 2)],
        [(1, 2, 1), (2, 2, 1), (3, 4, 1)],
    ]
    expect(driver, *chats, waiting)


@OVERLAPS
def test_a_chat_takes_the_slot_of_a_text(overlap: int) -> None:
    driver = Driver(make_limits(max_batch=1), step_tokens=4, overlap=overlap)
    waiting, chat = text(1, 30), make_submit(2, [1, 2], 3, priority=7)
    driver.submit(waiting)
    driver.step()
    driver.submit(chat)
    driver.step()
    assert [sequence.id for sequence in driver.scheduler.running] == [2]
    driver.run()
    assert driver.scheduler.stats.preemptions == 1
    expect(driver, waiting, chat)


@OVERLAPS
def test_a_chat_takes_the_blocks_of_texts(overlap: int) -> None:
    driver = Driver(make_limits(num_blocks=7, max_batch=8), step_tokens=40, overlap=overlap)
    driver.submit(make_submit(1, [1] * 3, 3))
    driver.smooth_tokens = 14
    texts = [text(n, 12) for n in (2, 3, 4)]
    driver.submit(*texts)
    driver.step()
    assert [sequence.id for sequence in driver.scheduler.running] == [1, 2]
    chat = make_submit(5, [2, 1] * 8, 3)
    driver.submit(chat)
    driver.step()
    assert [sequence.id for sequence in driver.scheduler.running] == [1, 5]
    driver.run()
    assert driver.scheduler.stats.preemptions == 1
    expect(driver, chat, *texts)


def test_a_growing_chat_preempts_texts_before_chats() -> None:
    driver = Driver(make_limits(num_blocks=15, max_batch=8, block_size=2), step_tokens=12)
    driver.smooth_tokens = 0
    chats = [make_submit(n, [n, 1], 4, priority=9) for n in (1, 2)]
    waiting = text(3, 20, priority=-3)
    driver.submit(*chats)
    driver.step()
    driver.submit(waiting)
    driver.run()
    assert rows_of(driver)[1:5] == [
        [(1, 2, 1), (2, 2, 1), (3, 0, 8)],
        [(1, 3, 1), (2, 3, 1), (3, 8, 8)],
        [(1, 4, 1), (2, 4, 1)],  # each needs a block, and one was free
        [(3, 0, 12)],
    ]
    expect(driver, *chats, waiting)


def test_texts_leave_slots_free() -> None:
    driver = Driver(make_limits(max_batch=8, num_blocks=64), step_tokens=64)
    texts = [text(n, 2) for n in range(20)]
    driver.submit(*texts)
    driver.step(1)
    assert len(driver.plans[0].rows) == 6
    driver.run()
    expect(driver, *texts)


def test_nothing_is_reused_in_either_direction() -> None:
    driver = Driver(make_limits(vocab_size=50), step_tokens=20)
    chat, same = make_submit(1, list(range(1, 13)), 1), make_submit(3, list(range(20, 33)), 1)
    driver.submit(chat)
    driver.run()
    cached = driver.pool.num_cached
    pooled = make_submit(2, list(range(1, 13)), 0, pooling=POOLING)
    also = make_submit(4, list(range(20, 33)), 0, pooling=POOLING)
    driver.submit(pooled, also)
    driver.run()
    assert driver.pool.num_cached == cached
    driver.submit(same)
    driver.run()
    assert [driver.answers[n].started[0].cached for n in (2, 4, 3)] == [0, 0, 0]
    assert driver.scheduler.stats.prefix_query_tokens == 12 + 13, "texts ask the cache nothing"
    expect(driver, chat, pooled, also, same)


def test_a_chat_does_not_wait_for_blocks_that_a_text_computes() -> None:
    """It would share them with another chat; those of a text are never shared."""
    driver = Driver(make_limits(vocab_size=50, num_blocks=64), step_tokens=12)
    tokens = list(range(1, 41))
    pooled, chat = make_submit(1, tokens, 0, pooling=POOLING), make_submit(2, tokens, 2)
    driver.submit(pooled)
    driver.step()
    driver.submit(chat)
    driver.step()
    assert rows_of(driver)[1] == [(2, 0, 12)]
    driver.run()
    expect(driver, pooled, chat)


def test_an_embedding_in_flight_is_good_though_its_text_was_preempted() -> None:
    driver = Driver(make_limits(max_batch=1), step_tokens=8)
    scheduler = driver.scheduler
    scheduler.add(text(1, 6))
    first = scheduler.plan()
    scheduler.add(make_submit(2, [1, 2], 1))
    second = scheduler.plan()
    assert first is not None
    assert second is not None
    assert scheduler.stats.preemptions == 1
    scheduler.commit(first, driver.runner.launch(first).result())
    scheduler.commit(second, driver.runner.launch(second).result())
    driver.collect()
    assert not scheduler.busy
    expect(driver, text(1, 6), make_submit(2, [1, 2], 1))


def test_a_failed_row_ends_its_text_alone() -> None:
    driver = Driver(step_tokens=16)
    driver.runner.fails = lambda row: "no finite embedding" if row.id == 1 else None
    driver.submit(text(1, 4), text(2, 4))
    driver.run()
    assert driver.answers[1].finishes[0].detail == "no finite embedding"
    assert driver.answers[1].embeddings == []
    expect(driver, text(2, 4))


def test_a_device_that_forgets_an_embedding_is_a_broken_device() -> None:
    driver = Driver()
    driver.scheduler.add(text(1, 4))
    plan = driver.scheduler.plan()
    assert plan is not None
    with pytest.raises(RuntimeError, match="no embedding of sequence 1"):
        driver.scheduler.commit(plan, Sampled([], {}, {}, {}))


@pytest.mark.parametrize(
    ("submit", "told"),
    [
        (make_submit(1, [1], 3, pooling=POOLING), "an embedding generates nothing, max_new is 3"),
        (
            make_submit(1, [1], 0, pooling=Pooling(dimensions=4)),
            "4 dimensions of an embedding of 3",
        ),
        (make_submit(1, [1], 0, pooling=Pooling(dimensions=-1)), "-1 dimensions of an embedding"),
        (make_submit(1, [], 0, pooling=POOLING), "there are no tokens"),
        (
            make_submit(1, [1] * 65, 0, pooling=POOLING),
            "65 tokens leave no room in a context of 64",
        ),
        (make_submit(1, [9], 0, pooling=POOLING), "outside the vocabulary"),
    ],
)
def test_what_cannot_be_embedded_ends_with_the_reason(submit: Submit, told: str) -> None:
    driver = Driver()
    driver.submit(submit)
    driver.run()
    assert driver.answers[1].reason == "error"
    assert told in driver.answers[1].finishes[0].detail


def test_a_text_may_be_as_long_as_the_context() -> None:
    driver = Driver(step_tokens=50)
    driver.submit(text(1, 64))
    driver.run()
    expect(driver, text(1, 64))


def test_texts_may_be_aborted_at_any_time() -> None:
    driver = Driver(step_tokens=4, overlap=1)
    driver.submit(text(1, 20), text(2, 20))
    driver.step()
    driver.scheduler.abort([1, 2])
    driver.run()
    assert [driver.answers[n].reason for n in (1, 2)] == ["abort", "abort"]
    check_pool(driver.pool, [])


def test_stats_count_texts_as_prompts() -> None:
    driver = Driver(step_tokens=16)
    driver.submit(text(1, 4), text(2, 6, pooling=Pooling("cls")))
    driver.scheduler.add(make_submit(3, [1], 1, sampling=Sampling()))
    driver.run()
    stats = driver.scheduler.stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (11, 1)
