"""The slot between engine and request, the table, and the fan-out of a step."""

from __future__ import annotations

import asyncio

import pytest

from engine.protocol import (
    BadFrame,
    Finish,
    Logprobs,
    Started,
    StepOutput,
    pack_floats,
    pack_tokens,
)
from router.streams import (
    SLOW_CLIENT,
    UNREAD_BYTES,
    Delta,
    Stream,
    StreamTable,
    TokenLogprob,
    WakeUp,
    deliver,
)

VOCAB = 100


def step(ids: tuple[int, ...], tokens: list[int], **columns: object) -> StepOutput:
    return StepOutput(1, 1, ids, columns.pop("counts", ()), pack_tokens(tokens), **columns)  # type: ignore[arg-type]


async def test_take_coalesces_and_wakes_once() -> None:
    stream = StreamTable().open([1, 2], 10)
    waiting = asyncio.ensure_future(stream.wait())
    await asyncio.sleep(0)
    stream.append([5])
    stream.append([6, 7])
    await waiting
    assert stream.take() == Delta([5, 6, 7], None, None, None)
    assert stream.take() == Delta([], None, None, None)
    stream.append([8])
    stream.end(Finish(stream.id, "stop"))
    await stream.wait()
    assert stream.take() == Delta([8], None, None, Finish(stream.id, "stop"))
    assert stream.tokens == [5, 6, 7, 8]


async def test_a_wake_up_survives_a_cancelled_waiter() -> None:
    event = WakeUp()
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    event.set()  # before the cancellation is seen
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    await event.wait()
    again = asyncio.ensure_future(event.wait())
    await asyncio.sleep(0)
    assert not again.done()
    event.set()
    event.set()
    await again


async def test_the_first_end_is_the_only_one() -> None:
    stream = StreamTable().open([1], 10)
    stream.end(Finish(stream.id, "length"))
    stream.end(Finish(stream.id, "stop"))
    stream.append([9])
    assert stream.take() == Delta([], None, None, Finish(stream.id, "length"))


async def test_choices_of_one_request_share_an_event() -> None:
    table, event = StreamTable(), WakeUp()
    first, second = table.open([1], 4, event), table.open([1], 4, event)
    second.append([3])
    await first.wait()
    assert first.take().tokens == []
    assert second.take().tokens == [3]


async def test_a_lost_stream_goes_on_where_it_was() -> None:
    table = StreamTable()
    stream = table.open([1], 10)
    table.assign(stream, 0)
    stream.append([2])
    stream.end(Finish(stream.id, "error"), loss="engine_died")
    assert stream.take().lost
    stream.reopen()
    stream.append([3])
    assert stream.take() == Delta([3], None, None, None)
    assert stream.tokens == [2, 3]
    with pytest.raises(ValueError, match="not lost"):
        stream.reopen()


async def test_prompt_logprobs_are_told_once_though_computed_twice() -> None:
    stream = StreamTable().open([1, 2, 3, 4], 10)
    a, b, c = (TokenLogprob(-float(i), []) for i in range(3))
    stream.append_prompt_logprobs(1, [a])
    stream.append_prompt_logprobs(2, [b])
    assert stream.take().prompt_logprobs == [a, b]
    stream.append_prompt_logprobs(1, [a, b, c])
    assert stream.take().prompt_logprobs == [c]


async def test_table_knows_the_load_of_each_replica() -> None:
    table = StreamTable()
    one, two = table.open([1, 2, 3], 10), table.open([1], 10)
    assert two.id > one.id > 0
    table.assign(one, 0)
    table.assign(two, 0)
    one.append([7, 8])
    assert table.load(0) == (2, 6)
    table.assign(two, 1)
    assert (table.load(0), table.load(1)) == ((1, 5), (1, 1))
    table.close(one)
    table.close(one)
    assert (table.load(0), len(table), list(table)) == ((0, 0), 1, [two])


async def test_deliver_splits_columns_and_ignores_strangers() -> None:
    table = StreamTable()
    one, two = table.open([1], 10), table.open([1], 10)
    streams = {one.id: one, two.id: two}
    message = step((one.id, 999, two.id), [1, 2, 3, 4], counts=(2, 1, 1))
    assert deliver(message, streams, VOCAB, 5.0) == []
    assert (one.tokens, two.tokens, one.first_token_s) == ([1, 2], [4], 5.0)


async def test_deliver_without_counts_means_one_each() -> None:
    one = StreamTable().open([1], 10)
    deliver(step((one.id,), [42], started=(Started(one.id, 32),)), {one.id: one}, VOCAB, 0.0)
    assert (one.tokens, one.cached_tokens) == ([42], 32)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
async def test_an_impossible_id_fails_its_stream_alone(token: int) -> None:
    table = StreamTable()
    one, two = table.open([1], 10), table.open([1], 10)
    failures = deliver(step((one.id, two.id), [token, 3]), {one.id: one, two.id: two}, VOCAB, 0.0)
    assert failures == [(one, "the engine sent a token id outside the vocabulary")]
    assert (one.tokens, two.tokens) == ([], [3])


async def test_more_tokens_than_asked_for_fail() -> None:
    one = StreamTable().open([1], 1)
    assert deliver(step((one.id,), [1, 2], counts=(2,)), {one.id: one}, VOCAB, 0.0)
    assert one.tokens == []


@pytest.mark.parametrize(
    "message",
    [
        step((1,), [1, 2]),
        step((1, 2), [1, 2], counts=(1,)),
        step((1, 2), [1], counts=(2, -1)),
        StepOutput(1, 1, (1,), (), b"abc"),
        step((1,), [1], logprobs=(Logprobs(1, 1, pack_floats([-1.0]), pack_tokens([1])),)),
        step((1,), [1], logprobs=(Logprobs(1, 1, b"", pack_tokens([1]), pack_floats([0])),)),
    ],
)
async def test_columns_that_do_not_fit_change_nothing(message: StepOutput) -> None:
    stream = StreamTable().open([1], 10)
    with pytest.raises(BadFrame):
        deliver(message, {1: stream}, VOCAB, 0.0)
    assert stream.tokens == []


async def test_logprobs_travel_with_their_tokens() -> None:
    stream = StreamTable().open([1], 10)
    entry = Logprobs(
        stream.id,
        1,
        pack_floats([-0.5, -1]),
        pack_tokens([3, 4, 5, 6]),
        pack_floats([-1, -2, -3, -4]),
    )
    deliver(step((stream.id,), [1, 2], counts=(2,), logprobs=(entry,)), {stream.id: stream}, 9, 0.0)
    assert stream.take().logprobs == [
        TokenLogprob(-0.5, [(3, -1.0), (4, -2.0)]),
        TokenLogprob(-1.0, [(5, -3.0), (6, -4.0)]),
    ]
    failures = deliver(step((stream.id,), [1]), {stream.id: stream}, 9, 0.0)
    assert [reason for _, reason in failures] == ["log-probabilities and tokens do not pair"]


@pytest.mark.parametrize("with_logprobs", [False, True])
def test_a27_what_waits_for_a_reader_is_bounded_in_bytes(with_logprobs: bool) -> None:
    table = StreamTable()
    stream = table.open([1], 10**6)
    told = TokenLogprob(-1.0, [(1, -1.0)] * 20)
    failures: list[tuple[Stream, str]] = []
    num_steps = 0
    while not failures:
        assert num_steps < 100_000
        num_steps += 1
        part = Logprobs(1, num_steps, *packed(told)) if with_logprobs else None
        message = StepOutput(
            1, 1, (1,), (), pack_tokens([7]), logprobs=(part,) if part is not None else ()
        )
        failures = deliver(message, {1: stream}, 100, 0.0)
    assert failures == [(stream, SLOW_CLIENT)]
    assert UNREAD_BYTES < stream.unread_bytes < 2 * UNREAD_BYTES
    assert len(stream.take().tokens) == num_steps - 1
    assert stream.unread_bytes == 0
    assert (
        deliver(
            StepOutput(1, 1, (1,), (1,), pack_tokens([7]), logprobs=message.logprobs),
            {1: stream},
            100,
            0.0,
        )
        == []
    )


def test_a27_what_was_read_is_not_kept() -> None:
    """Log-probabilities are the largest part; a stream is continued from its tokens alone."""
    stream = StreamTable().open([1, 2, 3], 100)
    told = TokenLogprob(-1.0, [(1, -1.0)])
    stream.append_prompt_logprobs(1, [told, told])
    stream.append([5], [told])
    assert stream.unread_bytes > 0
    assert stream.take() == Delta([5], [told], [told, told], None)
    assert stream.unread_bytes == 0
    stream.append([6, 7], [told, told])
    assert stream.take() == Delta([6, 7], [told, told], None, None)
    assert stream.take() == Delta([], [], None, None)


def packed(told: TokenLogprob) -> tuple[bytes, bytes, bytes]:
    ids, values = zip(*told.top, strict=True)
    return pack_floats([told.logprob]), pack_tokens(ids), pack_floats(values)
