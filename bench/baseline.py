"""The yardstick of bench/cpu.py: `transformers` `generate` on the same weights, in a process alone.

Reads one JSON object from standard input (`Task`), loads the model, warms up, and writes one JSON
object (`Seconds`) to standard output. Imports torch only where it works, as bench/quant.py does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec


class Task(msgspec.Struct, frozen=True):
    """What to time. `folder` holds `gguf_file`; prompts are token ids."""

    folder: str
    gguf_file: str
    threads: int
    decode_prompt: list[int]
    decode_tokens: int
    decode_repeats: int
    prefill_prompts: list[list[int]]


class Seconds(msgspec.Struct):
    """Wall time of each repetition: `first` token, all `decode` tokens, and each `prefill`."""

    first_s: list[float]
    decode_s: list[float]
    prefill_s: list[float]
    torch: str = ""
    transformers: str = ""


def load(task: Task) -> tuple[Callable[[list[int], int], None], str, str]:
    """Returns generate(prompt, number of tokens), torch's version and transformers' version.

    The weights are float32 and no token ends an answer, so that no logits processor is needed to
    keep it going.
    """
    import torch
    import transformers

    torch.set_num_threads(task.threads)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(task.folder, gguf_file=task.gguf_file, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompt: list[int], num_tokens: int) -> None:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, use_cache=True
        )
        assert out.shape[1] == len(prompt) + num_tokens, out.shape

    return generate, str(torch.__version__), str(transformers.__version__)


def time_all(task: Task, generate: Callable[[list[int], int], None]) -> Seconds:
    """Times everything once after a short warm-up."""
    generate(task.decode_prompt, 4)
    result = Seconds([], [], [])
    for _ in range(task.decode_repeats):
        result.first_s.append(_timed(generate, task.decode_prompt, 1))
        result.decode_s.append(_timed(generate, task.decode_prompt, task.decode_tokens))
    for prompt in task.prefill_prompts:
        result.prefill_s.append(_timed(generate, prompt, 1))
    return result


def _timed(generate: Callable[[list[int], int], None], prompt: list[int], num_tokens: int) -> float:
    before = time.perf_counter()
    generate(prompt, num_tokens)
    return time.perf_counter() - before


def main() -> int:
    """One task in, one result out."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    generate, torch_version, transformers_version = load(task)
    seconds = time_all(task, generate)
    seconds.torch, seconds.transformers = torch_version, transformers_version
    sys.stdout.buffer.write(msgspec.json.encode(seconds) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
