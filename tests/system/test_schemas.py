"""SmolLM2 in a real engine at temperature 1, under 200 schemas: whatever it says is valid.

Every second schema is played; all of them with HYPOTHESIS_PROFILE=ci or night.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from engine.protocol import Sampling, Submit, pack_tokens
from router.text.grammar import json_schema_grammar
from router.text.model import load_text
from router.text.wire_vocabulary import wire_vocabulary
from tests import make_schemas
from tests.demo_model import demo_model
from tests.engine_process import EPOCH, REAL, engine_process
from tests.judging import faults
from tests.sampling import Sampler

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MAX_NEW = 80
EVERY = 1 if os.environ.get("HYPOTHESIS_PROFILE") in ("ci", "night") else 2
PATIENCE_S = 500.0
PROMPT = "Answer with a short JSON value.\n"


def test_all_answers_satisfy_their_schemas() -> None:
    """Those that end by length are beginnings of valid ones, and few."""
    every: dict[str, dict[str, Any]] = json.loads(make_schemas.PATH.read_text(encoding="utf-8"))
    schemas = dict(list(every.items())[::EVERY])
    grammars = [json_schema_grammar(schema) for schema in schemas.values()]
    tokenizer = load_text(demo_model()).tokenizer
    pieces = tokenizer.pieces(skip_special=True)
    prompt = pack_tokens(tokenizer.encode(PROMPT, add_special=True, parse_special=False))
    options = {"max_len": 512, "max_batch": 32, "num_blocks": 300, "threads": 2}
    with engine_process(REAL, model=str(demo_model()), **options) as engine:
        ready = engine.ready()
        engine.send(wire_vocabulary(tokenizer, ready.limits.vocab_size, EPOCH))
        for number, grammar in enumerate(grammars):
            sampling = Sampling(temperature=1.0, seed=number)
            stops = tuple(tokenizer.eos_ids)
            engine.send(
                Submit(
                    EPOCH, number, prompt, sampling, MAX_NEW, stop_ids=stops, grammar=grammar
                )
            )  # fmt: skip
        answers = engine.finish(tuple(range(len(grammars))), PATIENCE_S)
    sampler = Sampler()
    num_ended = 0
    for number, (name, schema) in enumerate(schemas.items()):
        answer = answers[number]
        text = b"".join(pieces[token] for token in answer.tokens)
        if answer.reason == "stop":
            num_ended += 1
            assert faults(schema, text) == [], (name, text)
        else:
            assert answer.reason == "length", (name, answer.reason)
            assert sampler.begins(grammars[number], text), (name, text)
    assert num_ended > 0.6 * len(schemas)  # at temperature 1 many strings go on and on
