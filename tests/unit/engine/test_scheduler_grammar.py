"""Sequences with grammars in the scheduler: over true matchers and the fake device."""

from __future__ import annotations

import json

import jsonschema
import pytest

from engine.grammar import StepMasks
from engine.protocol import Limits, Pooling, Sampling, Submit, unpack_tokens
from tests.fakes import (
    Answer,
    Driver,
    check_pool,
    forbidden,
    generate,
    make_limits,
    make_submit,
    next_token,
    text_mark,
)
from tests.grammars import ANY_DIGITS, DIGITS, PEOPLE, json_grammar, matcher_of
from tools.tiny_model import EOS_ID, VOCAB_SIZE, decode_tokens, encode_text

# Without white space between the tokens: the fake model would write nothing else.
COMPACT = json_grammar(PEOPLE | {"x-guidance": {"whitespace_flexible": False}})
OVERLAPS = pytest.mark.parametrize("overlap", [0, 1])


def limits_of(**fields: int) -> Limits:
    return make_limits(**{"vocab_size": VOCAB_SIZE, "max_len": 256, "num_blocks": 256, **fields})


def constrained(submit: Submit, limits: Limits) -> tuple[list[int], str]:
    """The oracle: one sequence, one matcher, no batch."""
    matcher, tokens = matcher_of(submit), unpack_tokens(submit.tokens)
    new: list[int] = []
    while len(new) < submit.max_new and len(tokens) < limits.max_len:
        banned = forbidden(StepMasks([0], [matcher]), limits.vocab_size)[0]
        token = next_token(text_mark(tokens), limits.vocab_size, banned)
        tokens.append(token)
        new.append(token)
        matcher.advance(token)
        if matcher.complete or token in submit.stop_ids:
            return new, "stop"
    return new, "length"


def submit_of(number: int, prompt: str, grammar: str, max_new: int = 200, **more: object) -> Submit:
    return make_submit(
        number, encode_text(prompt), max_new, stop_ids=(EOS_ID,), grammar=grammar, **more
    )  # type: ignore[arg-type]


def check(driver: Driver, *submits: Submit) -> None:
    for submit in submits:
        answer = driver.answers[submit.id]
        oracle = constrained if submit.grammar else generate
        assert (answer.tokens, answer.reason) == oracle(submit, driver.limits)
    check_pool(driver.pool, [])


def people(answer: Answer) -> None:
    tokens = [token for token in answer.tokens if token != EOS_ID]
    jsonschema.validate(json.loads(decode_tokens(tokens)), PEOPLE)


@OVERLAPS
def test_among_others_that_do_not_change(overlap: int) -> None:
    driver = Driver(limits_of(max_batch=8), step_tokens=32, overlap=overlap)
    schema = COMPACT
    free = [submit_of(i, f"free {i}", "", 60) for i in range(3)]
    bound = [submit_of(10 + i, f"bound {i}", schema) for i in range(3)]
    short = submit_of(20, "digits", DIGITS)
    driver.submit(free[0], bound[0], free[1], short, bound[1], free[2], bound[2])
    driver.run()
    check(driver, *free, *bound, short)
    for submit in bound:
        assert driver.answers[submit.id].reason == "stop"
        people(driver.answers[submit.id])
    assert driver.answers[20].reason == "stop"
    assert len(driver.answers[20].tokens) == 3  # the last digit completes it: no step for an end


def test_one_step_ahead_it_takes_part_in_every_second_step() -> None:
    driver = Driver(limits_of(), step_tokens=32, overlap=1)
    driver.submit(submit_of(1, "plain", "", 12), submit_of(2, "bound", "start: /[0-9]{6}/"))
    driver.run()
    steps = [plan.step for plan in driver.plans if any(row.id == 2 for row in plan.rows)]
    assert steps == [1, 3, 5, 7, 9, 11]
    masked = [plan.step for plan in driver.plans if plan.masks is not None]
    assert masked == steps
    assert [row.id for row in driver.plans[1].rows] == [1]


@OVERLAPS
def test_preempted_ones_keep_their_places(overlap: int) -> None:
    limits = limits_of(num_blocks=20, max_batch=6)
    driver = Driver(limits, step_tokens=16, overlap=overlap)
    submits = [submit_of(i, f"sequence {i}", COMPACT if i % 2 else "", 60) for i in range(6)]
    driver.submit(*submits)
    driver.run()
    assert driver.scheduler.counters.preemptions > 0
    check(driver, *submits)


@OVERLAPS
def test_it_goes_on_where_another_engine_stopped(overlap: int) -> None:
    whole = submit_of(1, "prompt", COMPACT)
    tokens, _reason = constrained(whole, limits_of())
    prompt = unpack_tokens(whole.tokens)
    driver = Driver(limits_of(), step_tokens=32, overlap=overlap)
    for cut in (1, 7, len(tokens) - 1):
        driver.submit(
            make_submit(
                cut,
                [*prompt, *tokens[:cut]],
                200 - cut,
                stop_ids=(EOS_ID,),
                num_prompt=len(prompt),
                grammar=whole.grammar,
            )
        )
    driver.run()
    for cut in (1, 7, len(tokens) - 1):
        assert driver.answers[cut].tokens == tokens[cut:]
        assert driver.answers[cut].reason == "stop"


def test_an_answer_that_was_complete_already() -> None:
    tokens = encode_text("prompt123")
    driver = Driver(limits_of())
    driver.submit(make_submit(1, tokens, 5, num_prompt=6, grammar=DIGITS, stop_ids=(EOS_ID,)))
    driver.run()
    assert (driver.answers[1].tokens, driver.answers[1].reason) == ([], "stop")


def test_min_new_ends_with_the_grammar() -> None:
    driver = Driver(limits_of())
    driver.submit(submit_of(1, "prompt", DIGITS, sampling=Sampling(min_new=10)))
    driver.submit(submit_of(2, "prompt", ANY_DIGITS, 12, sampling=Sampling(min_new=10)))
    driver.run()
    assert (len(driver.answers[1].tokens), driver.answers[1].reason) == (3, "stop")
    assert len(driver.answers[2].tokens) >= 10


def test_length_cuts_it_short() -> None:
    driver = Driver(limits_of())
    driver.submit(submit_of(1, "prompt", COMPACT, 5))
    driver.run()
    assert (len(driver.answers[1].tokens), driver.answers[1].reason) == (5, "length")


@OVERLAPS
def test_a_device_that_leaves_the_grammar_is_an_error(overlap: int) -> None:
    driver = Driver(limits_of(), overlap=overlap)
    submit = submit_of(1, "prompt", DIGITS)
    matcher = matcher_of(submit)
    driver.scheduler.add(submit, matcher)
    driver.submit(submit_of(2, "other", DIGITS))
    driver.step()
    matcher.advance(encode_text("x")[0])  # what a device without masks might do
    driver.run()
    end = driver.answers[1].finishes[0]
    assert (end.reason, end.detail) == ("error", "its grammar cannot be followed any further")
    assert driver.answers[2].reason == "stop"


def test_a_grammar_without_a_matcher_never_runs() -> None:
    driver = Driver(limits_of())
    driver.scheduler.add(submit_of(1, "prompt", DIGITS))
    pooled = make_submit(2, [20], 0, pooling=Pooling(), grammar=DIGITS)
    driver.scheduler.add(pooled, matcher_of(pooled))
    driver.run()
    details = [driver.answers[i].finishes[0].detail for i in (1, 2)]
    assert details == ["its grammar was not compiled", "an embedding follows no grammar"]


def test_plans_without_grammars_have_no_masks() -> None:
    driver = Driver(limits_of())
    driver.submit(submit_of(1, "prompt", "", 5))
    driver.run()
    assert all(plan.masks is None for plan in driver.plans)
