"""R2: a sequence cut at any token and given to another engine goes on as if nothing had happened.

A real device and scheduler. What was generated before comes back as tokens behind `num_prompt`;
penalties, seeds, grammars, `min_new`, limits and log-probabilities must count them as generated.
"""

from __future__ import annotations

from typing import Any

import pytest

from engine.device.build import Device
from engine.protocol import Sampling, unpack_floats
from tests.generation import GREEDY, Driver, Generated, device_of
from tests.grammars import PEOPLE, byte_vocabulary, json_grammar
from tools.tiny_model import EOS_ID, encode_text, write_tiny_model

LENGTH = 24
PROMPT = encode_text("To be continued: to be, to be")
DIGITS = "start: /[0-9]{1,20}(\\.[0-9]{2,9})?/"

KINDS: dict[str, tuple[Sampling, dict[str, Any]]] = {
    "greedy": (GREEDY, {}),
    "seeded": (Sampling(temperature=1.3, seed=7), {}),
    "top": (Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, seed=8), {}),
    "frequency": (Sampling(temperature=0.0, frequency_penalty=1.5), {}),
    "presence": (Sampling(temperature=0.8, presence_penalty=1.5, seed=9), {}),
    "repetition": (Sampling(temperature=0.0, repetition_penalty=1.4), {}),
    "bias": (Sampling(temperature=1.0, logit_bias=((70, 3.0), (71, -50.0)), seed=3), {}),
    "min_new": (Sampling(temperature=1.0, seed=5, min_new=15), {"stop_ids": tuple(range(2, 140))}),
    "stops": (Sampling(temperature=1.0, seed=6), {"stop_ids": tuple(range(200, 216))}),
    "logprobs": (Sampling(temperature=1.0, seed=4, logprobs=3), {}),
    "grammar": (Sampling(temperature=1.0, seed=2), {"grammar": DIGITS, "stop_ids": (EOS_ID,)}),
    "json": (
        Sampling(temperature=1.0, seed=11),
        {"grammar": json_grammar(PEOPLE), "stop_ids": (EOS_ID,)},
    ),
    "least": (
        Sampling(temperature=1.0, seed=2, min_new=9),
        {"grammar": DIGITS, "stop_ids": (EOS_ID,)},
    ),
}


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return device_of(folder, num_blocks=64, max_len=256)


def generate(
    device: Device, kind: str, known: list[int], num_generated: int
) -> tuple[Generated, Driver]:
    sampling, more = KINDS[kind]
    driver = Driver(device)
    driver.learn(byte_vocabulary())
    submit = driver.submit(known, LENGTH - num_generated, sampling, num_prompt=len(PROMPT), **more)
    (result,) = driver.run([submit])
    return result, driver


def told(result: Generated) -> list[tuple[int, list[float]]]:
    return [
        (entry.start + i, [round(v, 3) for v in (chosen, *unpack_floats(entry.top))])
        for entry in result.logprobs
        for i, chosen in enumerate(unpack_floats(entry.chosen))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_r2_cut_at_any_token_the_rest_is_the_same(device: Device, kind: str) -> None:
    whole, _ = generate(device, kind, PROMPT, 0)
    assert whole.finish is not None
    assert whole.finish.reason in ("stop", "length")
    assert len(whole.tokens) > 1
    for cut in range(1, len(whole.tokens)):
        rest, driver = generate(device, kind, [*PROMPT, *whole.tokens[:cut]], cut)
        assert rest.tokens == whole.tokens[cut:], cut
        assert rest.finish is not None
        assert rest.finish.reason == whole.finish.reason
        assert told(rest) == told(whole)[cut:]
        assert driver.stats.blocks_held == 0
