"""Runs step plans of an encoder: whole texts in, their embeddings out.

Owns the model and nothing between two steps: see `engine.encoding` for the plans. On the CPU all
work is done when `launch` returns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.device.pooling import SlotPooling
from engine.device.runner import Done
from engine.device.sampling import wait_for
from engine.device.threads import ThreadGovernor
from engine.models.encoder import Encoder, TextGroup, build_encoder, read_encoder_spec
from engine.models.registry import Target, TensorSource
from engine.plan import Admit, Pending, Row, Sampled, StepPlan
from engine.protocol import Limits, Pooling, Sampling

# Texts whose lengths differ by less than this factor are padded to each other for attention.
_PADDING_FACTOR = 1.25
_WARM_UP_TOKENS = 16


class EncoderRunner:
    """See `engine.plan.RunnerLike`. Plans hold whole texts, admitted by the plan that runs them."""

    def __init__(self, model: Encoder, target: Target, threads: ThreadGovernor) -> None:
        self._model = model
        self._device = target.device
        self._dtype = target.dtype
        self._threads = threads
        self._pooling = SlotPooling()

    def launch(self, plan: StepPlan) -> Pending:
        """Computes the plan's texts.

        Memory on top of the weights grows with the tokens of the step (see `Encoder.forward`): the
        plan's `step_tokens`, or the longest text the model takes if that is more.
        """
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        done = Done(self._run(plan))
        now_s = time.monotonic()
        before = self._threads.threads
        after = self._threads.observe(now_s, now_s - began_s, time.process_time() - began_cpu_s)
        if after != before:
            torch.set_num_threads(after)
        return done

    def idle(self) -> bool:
        """Nothing is left for quiet moments."""
        return False

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> Sampled:
        self._pooling.admit(plan.admits)
        tokens = {admit.slot: admit.tokens for admit in plan.admits}
        order = sorted(range(len(plan.rows)), key=lambda index: plan.rows[index].count)
        texts = [tokens[plan.rows[index].slot] for index in order]
        lengths = [len(text) for text in texts]
        ids = torch.tensor([token for text in texts for token in text], device=self._device)
        positions = torch.cat([torch.arange(n, device=self._device) for n in lengths])
        groups = group_texts(lengths, self._device, self._dtype)
        hidden = self._model.forward(ids, positions, groups)
        last = [0] * len(order)
        end = 0
        for index, length in zip(order, lengths, strict=True):
            end += length
            last[index] = end - 1
        pooled = self._pooling.add(plan.rows, last, hidden, lambda states: states)
        if pooled is None:
            return Sampled([], {}, {}, {})
        wait_for(self._device)
        embeddings, failed = pooled.read()
        return Sampled([], {}, {}, failed, embeddings)


def group_texts(lengths: list[int], device: torch.device, dtype: torch.dtype) -> list[TextGroup]:
    """Texts of these rising lengths, one behind the other, in groups of similar length."""
    groups: list[TextGroup] = []
    begin = first = 0
    while first < len(lengths):
        until = first + 1
        while until < len(lengths) and lengths[until] <= lengths[first] * _PADDING_FACTOR:
            until += 1
        group = _group(lengths[first:until], begin, device, dtype)
        groups.append(group)
        begin, first = group.end, until
    return groups


def _group(lengths: list[int], begin: int, device: torch.device, dtype: torch.dtype) -> TextGroup:
    total, count, longest = sum(lengths), len(lengths), lengths[-1]
    if lengths[0] == longest:
        return TextGroup(begin, begin + total, count, longest)
    sizes = torch.tensor(lengths, device=device)[:, None]
    columns = torch.arange(longest, device=device)
    starts = sizes.cumsum(0) - sizes
    real = columns < sizes
    places = torch.where(real, starts + columns, starts).flatten()
    hidden: Tensor = torch.zeros(real.shape, dtype=dtype, device=device)
    mask = hidden.masked_fill_(~real, float("-inf"))[:, None, None]
    kept = real.flatten().nonzero().squeeze(1)
    return TextGroup(begin, begin + total, count, longest, places, mask, kept)


class EncoderDevice(NamedTuple):
    """A loaded encoder, and the facts that only it knows."""

    runner: EncoderRunner
    limits: Limits


def build_encoder_device(
    config: EngineConfig, model_config: Mapping[str, Any], source: TensorSource, target: Target
) -> EncoderDevice:
    """Loads an encoder: no KV memory, nothing is generated. Raises `ModelError`."""
    spec = read_encoder_spec(model_config)
    model = build_encoder(model_config, source, target, made_up=config.load_format == "dummy")
    max_len = min(config.max_len or spec.max_len, spec.max_len)
    runner = EncoderRunner(model, target, ThreadGovernor(config.threads))
    warm_up(runner, min(_WARM_UP_TOKENS, max_len))
    limits = Limits(
        max_len=max_len,
        vocab_size=spec.vocab_size,
        block_size=config.block_size,
        num_blocks=0,
        max_batch=config.max_batch,
        weights_bytes=model.nbytes,
        device=config.device,
        dtype=str(target.dtype).removeprefix("torch."),
        embedding_size=spec.hidden_size,
        generates=False,
        quant=config.quant,
    )
    return EncoderDevice(runner, limits)


def warm_up(runner: EncoderRunner, num_tokens: int) -> None:
    """Runs one text: the first request must not pay for kernels and pages."""
    admit = Admit(0, [0] * num_tokens, num_tokens, [], Sampling(), (), Pooling())
    row = Row(slot=0, id=0, start=0, count=num_tokens, samples=False)
    runner.launch(StepPlan(0, [row], [admit], [], [])).result()
