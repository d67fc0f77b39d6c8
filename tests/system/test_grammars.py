"""SmolLM2 in a real engine process under grammars: every answer is what its grammar says."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonschema
import pytest

from engine.protocol import Sampling, StepOutput, Submit, Vocabulary, pack_tokens
from router.text.model import load_text
from router.text.tokenizer import Tokenizer
from router.text.wire_vocabulary import wire_vocabulary
from tests.demo_model import demo_model
from tests.engine_process import EPOCH, REAL, Answer, EngineProcess, engine_process
from tests.grammars import PEOPLE, json_grammar

pytestmark = pytest.mark.slow

PATIENCE_S = 100.0
DIGIT = {"type": "integer", "minimum": -9, "maximum": 99}
SCHEMAS: list[dict[str, Any]] = [
    PEOPLE,
    {
        "type": "array",
        "items": {"type": "object", "properties": {"x": DIGIT}, "required": ["x"]}
        | {"additionalProperties": False},
        "minItems": 1,
        "maxItems": 3,
    },
    {"enum": ["north", "south", 3, None]},
    {
        "type": "object",
        "properties": {"kind": {"const": "point"}, "at": {"$ref": "#/$defs/at"}},
        "required": ["kind", "at"],
        "additionalProperties": False,
        "$defs": {"at": {"type": "array", "items": DIGIT, "maxItems": 2}},
    },
]
PROMPTS = ["Write an object.\n", "The capital of France is", "A list of people as JSON:\n"]


class Client:
    """Submits to one engine, and reads what it answers."""

    def __init__(self, engine: EngineProcess, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer

    def submit(
        self, number: int, grammar: str = "", max_new: int = 160, tokens: list[int] | None = None
    ) -> list[int]:
        """Returns the prompt. `tokens` are what an earlier engine generated."""
        text = PROMPTS[number % len(PROMPTS)]
        prompt = self.tokenizer.encode(text, add_special=True, parse_special=False)
        known = tokens or []
        submit = Submit(
            EPOCH, number, pack_tokens([*prompt, *known]),
            Sampling(temperature=1.0, seed=number), max_new - len(known),
            stop_ids=self.tokenizer.eos_ids, num_prompt=len(prompt), grammar=grammar,
        )  # fmt: skip
        self.engine.send(submit)
        return prompt

    def finish(self, *numbers: int) -> dict[int, Answer]:
        return self.engine.finish(numbers, PATIENCE_S)

    def json(self, answer: Answer) -> Any:
        return json.loads(self.tokenizer.decode(answer.tokens))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_text(demo_model()).tokenizer


@contextmanager
def serving(tokenizer: Tokenizer, **fields: Any) -> Iterator[Client]:
    options = {"max_len": 1024, "max_batch": 24, "num_blocks": 200, "threads": 2} | fields
    with engine_process(REAL, model=str(demo_model()), **options) as engine:
        ready = engine.ready()
        engine.send(wire_vocabulary(tokenizer, ready.limits.vocab_size, EPOCH))
        yield Client(engine, tokenizer)


def bound(number: int) -> str:
    """Without white space between its parts, of which there is no end at temperature 1."""
    compact = {"x-guidance": {"whitespace_flexible": False}}
    return json_grammar(SCHEMAS[number % len(SCHEMAS)] | compact)


@pytest.mark.parametrize(
    "options",
    [{}, {"overlap": 1}, {"num_blocks": 24, "block_size": 8}],
    ids=["plain", "one step ahead", "preempted"],
)
def test_all_answers_are_valid(tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    """At temperature 1, beside streams without a grammar whose answers stay what they were."""
    free = [100, 101, 102]
    with serving(tokenizer, **options) as client:
        for number in free:
            client.submit(number, max_new=24)
        alone = {number: answer.tokens for number, answer in client.finish(*free).items()}
        client.engine.answers.clear()
        for number in range(12):
            client.submit(number, bound(number))
            if number % 4 == 0:
                client.submit(100 + number // 4, max_new=24)
        answers = client.finish(*range(12), *free)
        for number in range(12):
            assert answers[number].reason == "stop", (number, answers[number])
            jsonschema.validate(client.json(answers[number]), SCHEMAS[number % len(SCHEMAS)])
        assert {number: answers[number].tokens for number in free} == alone
        if "num_blocks" in options:
            steps = [m for m in client.engine.messages if isinstance(m, StepOutput)]
            assert steps[-1].stats.preemptions > 0


def test_goes_on_after_a_killed_engine(tokenizer: Tokenizer) -> None:
    """The same tokens as without the death: the grammar is where it was, and so is the noise."""
    with serving(tokenizer) as client:
        for number in range(4):
            client.submit(number, bound(number))
        whole = client.finish(*range(4))
    with serving(tokenizer) as client:
        for number in range(4):
            client.submit(number, bound(number))
        while len(client.engine.answers.get(0, Answer()).tokens) < 5:
            assert client.engine.receive()
        client.engine.process.send_signal(signal.SIGKILL)
        lost = client.engine.answers
    with serving(tokenizer) as client:
        for number, answer in lost.items():
            if not answer.finishes:
                client.submit(number, bound(number), tokens=answer.tokens)
        unfinished = [number for number, answer in lost.items() if not answer.finishes]
        assert 0 in unfinished
        for number, answer in client.finish(*unfinished).items():
            assert [*lost[number].tokens, *answer.tokens] == whole[number].tokens
            assert answer.reason == whole[number].reason == "stop"


def test_what_cannot_be_followed_ends_alone(tokenizer: Tokenizer) -> None:
    with serving(tokenizer) as client:
        client.submit(1, bound(1))
        client.submit(2, "nonsense {")
        client.submit(
            3, bound(1), tokens=tokenizer.encode("no", add_special=False, parse_special=False)
        )
        client.submit(4, max_new=5)
        answers = client.finish(1, 2, 3, 4)
        assert [answers[number].reason for number in (1, 2, 3)] == ["stop", "error", "error"]
        assert answers[2].finishes[0].detail == "the grammar does not compile, or is too complex"
        assert len(answers[4].tokens) > 0


def test_a_grammar_before_the_vocabulary(tokenizer: Tokenizer) -> None:
    with engine_process(REAL, model=str(demo_model()), max_len=256, num_blocks=20) as engine:
        size = engine.ready().limits.vocab_size
        client = Client(engine, tokenizer)
        client.submit(1, bound(2))
        end = client.finish(1)[1].finishes[0]
        assert (end.reason, end.detail) == ("error", "a grammar came before the model's vocabulary")
        engine.send(Vocabulary(EPOCH, b"", b"", (), ()))
        client.submit(2, bound(2))
        assert "do not belong together" in client.finish(2)[2].finishes[0].detail
        engine.send(wire_vocabulary(tokenizer, size, EPOCH))
        client.submit(3, bound(2))
        assert client.json(client.finish(3)[3]) in SCHEMAS[2]["enum"]
