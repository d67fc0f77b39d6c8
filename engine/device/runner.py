"""Runs step plans on one device: the engine's only door to the model.

Owns the model, the KV memory and the persistent batch. `launch` applies a plan and queues its work,
`Pending.result` waits for it; on the CPU all work is done when `launch` returns.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.config import EngineConfig, ModelError
from engine.device.batch import Batch
from engine.device.kv import KvCache
from engine.device.memory import num_blocks
from engine.device.sampling import SlotSampling, sample, token_logprobs
from engine.device.threads import ThreadGovernor
from engine.device.weights import open_model
from engine.models.decoder import Decoder
from engine.models.registry import Target, build_decoder, read_spec
from engine.models.spec import ModelSpec
from engine.plan import Admit, Pending, Row, Sampled, StepPlan, TokenLogprobs
from engine.protocol import Limits, Sampling
from engine.quant.packed import cpu_method

# Prompt logits are computed for so many positions at a time: 64 rows of 150k floats are 39 MB.
_PROMPT_LOGIT_ROWS = 64
_WARM_UP_TOKENS = 63


class Device(NamedTuple):
    """A loaded model, ready to run plans, and the facts that only it knows."""

    runner: Runner
    limits: Limits


class Done(NamedTuple):
    """A step whose results are there. See `engine.plan.Pending`."""

    sampled: Sampled

    def result(self) -> Sampled:
        return self.sampled


class Runner:
    """See `engine.plan.RunnerLike`."""

    def __init__(
        self,
        model: Decoder,
        cache: KvCache,
        batch: Batch,
        attention: AttentionBackend,
        threads: ThreadGovernor,
    ) -> None:
        self._model = model
        self._threads = threads
        self._cache = cache
        self._batch = batch
        self._attention = attention

    def launch(self, plan: StepPlan) -> Pending:
        """Applies the plan; the sampled tokens are in their slots' rows when the next plan runs."""
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        done = self._run(plan)
        now_s = time.monotonic()
        before = self._threads.threads
        after = self._threads.observe(now_s, now_s - began_s, time.process_time() - began_cpu_s)
        if after != before:
            torch.set_num_threads(after)
        return done

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> Done:
        self._cache.copy(plan.copies)
        self._batch.apply(plan)
        rows = plan.rows
        inputs = self._batch.inputs(rows)
        hidden = self._model.forward(
            inputs.ids, inputs.positions, self._cache.layers, inputs.attention, self._attention
        )
        prompt_logprobs = {
            i: scored
            for i, row in enumerate(rows)
            if (scored := self._score_prompt(row, hidden, inputs.last[i])) is not None
        }
        sampling = [i for i, row in enumerate(rows) if row.samples]
        if not sampling:
            return Done(Sampled([], {}, prompt_logprobs, {}))
        wanted = torch.tensor([inputs.last[i] for i in sampling], device=hidden.device)
        logits = self._model.logits(hidden[wanted])
        tokens, logprobs, failed = self._sample(logits, [rows[i] for i in sampling])
        return Done(
            Sampled(
                tokens, logprobs, prompt_logprobs, {sampling[i]: text for i, text in failed.items()}
            )
        )

    def _sample(
        self, logits: Tensor, rows: list[Row]
    ) -> tuple[list[int], dict[int, TokenLogprobs], dict[int, str]]:
        """Chooses, writes the choice into the token rows, and scores it where that is asked."""
        slots = [self._slot(row) for row in rows]
        # NaN and infinities travel through max: one small reduction finds every broken row.
        sound = torch.isfinite(logits.amax(-1)).tolist()
        failed = {i: "the model produced no finite scores" for i, ok in enumerate(sound) if not ok}
        scored = [
            i for i, slot in enumerate(slots) if slot.params.logprobs >= 0 and i not in failed
        ]
        # Logprobs are those of the model, before penalties and bias, so they need the raw logits.
        raw = {
            i: logits[i : i + 1].clone() if slots[i].edits_logits else logits[i : i + 1]
            for i in scored
        }
        ends = [row.start + row.count for row in rows]
        token_rows = self._batch.tokens
        known = [token_rows[row.slot, :end] for row, end in zip(rows, ends, strict=True)]
        if failed:
            logits[list(failed)] = 0.0
        tokens = sample(logits, slots, known)
        where = torch.tensor([row.slot for row in rows], device=logits.device)
        token_rows[where, torch.tensor(ends, device=logits.device)] = tokens
        logprobs = {
            i: token_logprobs(raw[i], tokens[i : i + 1], slots[i].params.logprobs) for i in scored
        }
        return tokens.tolist(), logprobs, failed

    def _score_prompt(self, row: Row, hidden: Tensor, last: int) -> TokenLogprobs | None:
        """Log-probabilities of the prompt tokens that follow this row's positions, if asked."""
        slot = self._slot(row)
        rivals = slot.params.prompt_logprobs
        end = min(row.start + row.count, slot.num_prompt - 1)
        if rivals < 0 or end <= row.start:
            return None
        first = last - row.count + 1
        chosen: list[float] = []
        top: list[list[tuple[int, float]]] = []
        for at in range(row.start, end, _PROMPT_LOGIT_ROWS):
            until = min(at + _PROMPT_LOGIT_ROWS, end)
            logits = self._model.logits(hidden[first + at - row.start : first + until - row.start])
            targets = self._batch.tokens[row.slot, at + 1 : until + 1]
            part = token_logprobs(logits, targets, rivals)
            chosen += part.chosen
            top += part.top
        return TokenLogprobs(chosen, top)

    def _slot(self, row: Row) -> SlotSampling:
        slot = self._batch.sampling[row.slot]
        assert slot is not None, f"row of slot {row.slot}, which was never admitted"
        return slot


def build_device(config: EngineConfig) -> Device:
    """Loads the model and takes the KV memory. Raises `ModelError` or `NotEnoughMemory`."""
    began = time.monotonic()
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    if device.type != "cpu":
        raise ModelError(f"device {config.device!r} is not supported by this version (cpu is)")
    if config.quant != "none":
        raise ModelError(f"quant {config.quant!r} is not supported by this version (none is)")
    model_config, source = open_model(Path(config.model), config.load_format)
    spec = read_spec(model_config)
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    with torch.inference_mode():
        model = build_decoder(spec, source, Target(device, dtype, cpu_method(dtype)))
        return _with_memory(config, spec, model, dtype, began)


def warm_up(runner: Runner, num_tokens: int, config: EngineConfig) -> None:
    """Runs a prompt and a decode step: the first request must not pay for kernels and pages.

    What it leaves in slot 0 and in the first blocks is overwritten before anything reads it.
    """
    blocks = list(range(-(-(num_tokens + 1) // config.block_size)))
    admit = Admit(0, [0] * num_tokens, num_tokens, blocks, Sampling(temperature=0.0), ())
    prompt = Row(slot=0, id=0, start=0, count=num_tokens, samples=True)
    runner.launch(StepPlan(0, [prompt], [admit], [], [])).result()
    runner.launch(StepPlan(0, [Row(0, 0, num_tokens, 1, samples=True)], [], [], [])).result()


def _with_memory(
    config: EngineConfig, spec: ModelSpec, model: Decoder, dtype: torch.dtype, began: float
) -> Device:
    device = torch.device(config.device)
    max_len = min(config.max_len or spec.max_len, spec.max_len)
    block_bytes = config.block_size * spec.kv_bytes_per_token(dtype.itemsize)
    blocks = num_blocks(config, block_bytes, max_len)
    cache = KvCache(spec, blocks, config.block_size, dtype, device)
    batch = Batch(config.max_batch, max_len, config.block_size, device, dtype)
    attention = ReferenceAttention(spec.attention_scale)
    runner = Runner(model, cache, batch, attention, ThreadGovernor(config.threads))
    warm_up(runner, min(_WARM_UP_TOKENS, max_len - 1, blocks * config.block_size - 1), config)
    limits = Limits(
        max_len=max_len,
        vocab_size=spec.vocab_size,
        block_size=config.block_size,
        num_blocks=blocks,
        max_batch=config.max_batch,
        weights_bytes=model.nbytes,
        kv_bytes=cache.nbytes,
        load_s=time.monotonic() - began,
        device=config.device,
        dtype=str(dtype).removeprefix("torch."),
    )
    return Device(runner, limits)
