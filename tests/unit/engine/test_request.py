"""engine.request: what follows from a sequence's few stored facts."""

from __future__ import annotations

from engine.protocol import Sampling
from engine.request import Sequence
from tests.fakes import make_submit


def make(num_tokens: int, max_total: int, **fields: object) -> Sequence:
    submit = make_submit(7, [1] * num_tokens, **fields)  # type: ignore[arg-type]
    return Sequence(submit, [1] * num_tokens, max_total, 0, b"root")


def test_a_fresh_sequence_waits_with_its_whole_prompt() -> None:
    sequence = make(5, 9)
    assert (sequence.length, sequence.num_prompt, sequence.num_generated) == (5, 5, 0)
    assert (sequence.remaining, sequence.inflight, sequence.phase) == (4, 0, "waiting")
    assert sequence.generates
    assert sequence.num_kv == 8  # the ninth token is never read


def test_a_continuation_counts_earlier_tokens_as_generated() -> None:
    sequence = make(5, 9, num_prompt=3)
    assert (sequence.num_generated, sequence.remaining) == (2, 4)


def test_tokens_in_flight_follow_from_what_is_scheduled() -> None:
    sequence = make(5, 9)
    sequence.slot = 0
    for scheduled, inflight in ((0, 0), (4, 0), (5, 1), (6, 2)):
        sequence.scheduled = scheduled
        assert sequence.inflight == inflight
    sequence.tokens.append(1)  # committed
    assert (sequence.inflight, sequence.phase) == (1, "running")


def test_without_tokens_to_come_every_position_is_computed_and_none_sampled() -> None:
    sequence = make(5, 5)
    sequence.scheduled = 5
    assert (sequence.num_kv, sequence.remaining, sequence.inflight) == (5, 0, 0)
    assert not sequence.generates


def test_an_ended_sequence_is_in_no_queue() -> None:
    sequence = make(5, 9)
    sequence.ended = True
    assert sequence.phase == "ended"


def test_prompt_logprobs_are_wanted_until_the_last_position_is_told() -> None:
    assert not make(5, 9).wants_prompt_logprobs
    sequence = make(5, 9, sampling=Sampling(prompt_logprobs=0))
    assert sequence.wants_prompt_logprobs
    sequence.prompt_reported = 5
    assert not sequence.wants_prompt_logprobs
    assert not make(1, 9, sampling=Sampling(prompt_logprobs=0)).wants_prompt_logprobs
