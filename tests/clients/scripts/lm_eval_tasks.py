"""lm-eval's local-completions on a task of our own: token ids in, echo and logprobs out.

Settings: `url`, `model`, and `questions` (context, choices, target) and `texts`, which become two
tasks: multiple choice and perplexity. Everything comes back sample by sample.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from harness import Settings, run
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

QUESTIONS = {
    "task": "questions",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{target}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TEXTS = {
    "task": "texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}


def write_task(folder: Path, task: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The task with its data as a local file."""
    path = folder / f"{task['task']}.json"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    return {**task, **data, "test_split": "test", "metadata": {"version": 1}}


def evaluate(settings: Settings) -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = [
            write_task(folder, QUESTIONS, settings["questions"]),
            write_task(folder, TEXTS, [{"text": text} for text in settings["texts"]]),
        ]
        found = simple_evaluate(
            model="local-completions",
            model_args={
                "model": settings["model"],
                "base_url": f"{settings['url']}/v1/completions",
                "num_concurrent": settings["concurrent"],
                "batch_size": settings["batch"],
                "max_length": 1024,
                "max_retries": 1,
            },
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    samples = {
        task: [(sample["doc"], sample["filtered_resps"]) for sample in entries]
        for task, entries in found["samples"].items()
    }
    return {"results": found["results"], "samples": samples}


run(evaluate)
