"""lm-eval's local-completions against a real model: its scores are those of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.clients.runs import LIMIT_S, LM_EVAL, Results, environment, run_python
from tests.demo_model import demo_model
from tests.serving import ROOT, Server, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

MODEL = "smollm2-135m"
TOLERANCE = 2e-3  # of a sum of some twenty to two hundred float32 logprobs
TEXT = (ROOT / "tests" / "data" / "alice.txt").read_text(encoding="utf-8")
PARAGRAPHS = [part.replace("\n", " ") for part in TEXT.split("\n\n")[1:] if len(part) > 300]
TEXTS = PARAGRAPHS[1:2]


def questions() -> list[dict[str, Any]]:
    """How does it go on? The true continuation among those of other paragraphs."""
    words = [text.split(" ") for text in PARAGRAPHS[:4]]
    halves = [(" ".join(part[:25]), " " + " ".join(part[25:34])) for part in words]
    ends = [end for _, end in halves]
    return [
        {"context": start, "choices": [ends[(at + i) % len(ends)] for i in (2, 0, 1)], "target": 1}
        for at, (start, _) in enumerate(halves)
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    demo_model()
    environment("lm-eval")
    with serve("--models", MODEL, "--kv-memory", "500M") as running:
        yield running


@pytest.fixture(scope="module", params=[(1, 1), (2, 4)], ids=["one by one", "batches"])
def scored(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    concurrent, batch = request.param
    settings = {
        "url": server.url,
        "model": MODEL,
        "questions": questions(),
        "texts": TEXTS,
        "concurrent": concurrent,
        "batch": batch,
    }
    home = tmp_path_factory.mktemp("home")
    results: Results = run_python(LM_EVAL, "lm_eval_tasks.py", home, settings)
    return results["evaluate"]


class Oracle:
    """transformers on the same weights, in float32."""

    def __init__(self, path: Path) -> None:
        import gguf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder, name = path.parent, path.name
        self._torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        with pytest.MonkeyPatch.context() as patch:
            # It is asked for again for each of some 300 modules, and takes a while each time.
            patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
            self._model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32
            ).eval()

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The log-likelihood of the continuation, and whether greedy decoding would give it."""
        torch = self._torch
        with torch.inference_mode():
            logits = self._model(torch.tensor([context + continuation])).logits[0].double()
        logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
        chosen = torch.tensor(continuation)
        total = logprobs.gather(1, chosen[:, None]).sum()
        return float(total), bool((logprobs.argmax(-1) == chosen).all())

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(demo_model())


def test_choices_have_the_likelihoods_of_transformers(scored: Any, oracle: Oracle) -> None:
    right = 0
    samples = scored["samples"]["questions"]
    assert len(samples) == len(questions())
    for doc, answers in samples:
        context = oracle.ids(doc["context"])
        expected = []
        for choice, (likelihood, greedy) in zip(doc["choices"], answers, strict=True):
            whole = oracle.ids(doc["context"] + choice)
            assert whole[: len(context)] == context
            value, is_greedy = oracle.score(context, whole[len(context) :])
            expected.append(value)
            assert float(likelihood) == pytest.approx(value, abs=TOLERANCE)
            assert greedy in (is_greedy, str(is_greedy))
        right += max(range(len(expected)), key=expected.__getitem__) == doc["target"]
    assert scored["results"]["questions"]["acc,none"] == pytest.approx(right / len(samples))
    assert right > len(samples) / 2, "a model that can read guesses most of them"


def test_perplexity_is_that_of_transformers(scored: Any, oracle: Oracle) -> None:
    total, num_words, num_bytes = 0.0, 0, 0
    prefix = [oracle.tokenizer.bos_token_id]
    for (doc, [answer]), text in zip(scored["samples"]["texts"], TEXTS, strict=True):
        assert doc["text"] == text
        value, _ = oracle.score(prefix, oracle.ids(text))
        assert float(answer) == pytest.approx(value, abs=TOLERANCE)
        total += value
        num_words += len(text.split())
        num_bytes += len(text.encode())
    found = scored["results"]["texts"]
    assert found["word_perplexity,none"] == pytest.approx(math.exp(-total / num_words), rel=1e-4)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-4)
