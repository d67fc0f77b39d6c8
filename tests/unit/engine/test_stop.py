"""engine.stop: which token is the last one."""

from __future__ import annotations

import pytest

from engine.protocol import Sampling
from engine.request import Sequence
from engine.stop import finish_reason
from tests.fakes import make_submit

STOP = 9


@pytest.mark.parametrize(
    ("generated", "max_new", "min_new", "reason"),
    [
        ([1], 3, 0, None),
        ([1, 2, 3], 3, 0, "length"),
        ([STOP], 3, 0, "stop"),
        ([1, 2, STOP], 3, 0, "stop"),  # the stop wins over the length
        ([STOP], 3, 1, "stop"),
        ([STOP], 3, 2, None),
        ([1, STOP], 3, 2, "stop"),
        ([STOP, 1], 3, 0, None),  # only the newest token is judged
        ([1, 2, STOP], 3, 4, "length"),
    ],
)
def test_reason(generated: list[int], max_new: int, min_new: int, reason: str | None) -> None:
    prompt = [4, STOP]
    submit = make_submit(1, prompt, max_new, stop_ids=(8, STOP), sampling=Sampling(min_new=min_new))
    sequence = Sequence(submit, list(prompt), len(prompt) + max_new, 0, b"")
    sequence.tokens += generated
    assert finish_reason(sequence) == reason


def test_a_continuation_has_its_earlier_tokens_counted_for_min_new() -> None:
    submit = make_submit(
        1, [4, 1, 1], 3, stop_ids=(STOP,), sampling=Sampling(min_new=3), num_prompt=1
    )
    sequence = Sequence(submit, [4, 1, 1, STOP], 6, 0, b"")
    assert finish_reason(sequence) == "stop"
