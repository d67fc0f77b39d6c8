"""Runs step plans on one device: the engine's only door to the model.

Owns the model, the KV memory and the persistent batch. `launch` applies a plan and queues its work,
`Pending.result` waits for it; on the CPU all work is done when `launch` returns.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from engine.device.batch import Batch
from engine.device.kv import KvCache
from engine.device.pooling import SlotPooling
from engine.device.sampling import Scores, SlotSampling, mask_logits, sample, score, wait_for
from engine.device.threads import ThreadGovernor
from engine.models.base import Model
from engine.plan import Pending, Row, Sampled, StepMasks, StepPlan, TokenLogprobs

# Prompt logits are computed for so many positions at a time: 64 rows of 150k floats are 39 MB.
_PROMPT_LOGIT_ROWS = 64


class Done(NamedTuple):
    """A step whose results are there. See `engine.plan.Pending`."""

    sampled: Sampled

    def result(self) -> Sampled:
        return self.sampled


class Runner:
    """See `engine.plan.RunnerLike`."""

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        batch: Batch,
        threads: ThreadGovernor,
        text_ids: int = 0,
    ) -> None:
        """Ids from `text_ids` on have no text and are never sampled; 0: all have one."""
        self._model = model
        self._text_ids = text_ids
        self._threads = threads
        self._cache = cache
        self._batch = batch
        self._pooling = SlotPooling()

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

    def idle(self) -> bool:
        """Nothing is left for quiet moments."""
        return False

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> Done:
        self._cache.copy(plan.copies)
        self._batch.apply(plan)
        self._pooling.admit(plan.admits)
        rows = plan.rows
        inputs = self._batch.inputs(rows)
        hidden = self._model.forward(
            inputs.ids, inputs.positions, self._cache.layers, inputs.attention
        )
        prompt_scores = {
            i: parts
            for i, row in enumerate(rows)
            if (parts := self._score_prompt(row, hidden, inputs.last[i]))
        }
        pooled = self._pooling.add(rows, inputs.last, hidden, self._model.last_hidden)
        if prompt_scores or pooled is not None:
            wait_for(hidden.device)
        prompt_logprobs = {i: Scores.join(parts) for i, parts in prompt_scores.items()}
        embeddings, failed = ({}, {}) if pooled is None else pooled.read()
        sampling = [i for i, row in enumerate(rows) if row.samples]
        if not sampling:
            return Done(Sampled([], {}, prompt_logprobs, failed, embeddings))
        wanted = torch.tensor([inputs.last[i] for i in sampling], device=hidden.device)
        logits = self._model.logits(hidden[wanted])
        tokens, logprobs, unsound = self._sample(logits, [rows[i] for i in sampling], plan.masks)
        failed |= {sampling[i]: text for i, text in unsound.items()}
        return Done(Sampled(tokens, logprobs, prompt_logprobs, failed, embeddings))

    def _sample(
        self, logits: Tensor, rows: list[Row], masks: StepMasks | None
    ) -> tuple[list[int], dict[int, TokenLogprobs], dict[int, str]]:
        """Chooses, writes the choice into the token rows, and scores it where that is asked."""
        slots = [self._slot(row) for row in rows]
        # NaN and infinities travel through max: one small reduction finds every broken row.
        sound = torch.isfinite(logits.amax(-1)).tolist()
        failed = {i: "the model produced no finite scores" for i, ok in enumerate(sound) if not ok}
        scored = [
            i for i, slot in enumerate(slots) if slot.params.logprobs >= 0 and i not in failed
        ]
        masked = frozenset(masks.rows) if masks is not None else ()
        # Logprobs are those of the model, before masks and edits, so they need the raw logits.
        raw = {
            i: logits[i : i + 1].clone()
            if slots[i].edits_logits or self._text_ids or i in masked
            else logits[i : i + 1]
            for i in scored
        }
        if self._text_ids:
            logits[:, self._text_ids :] = float("-inf")
        if masks is not None:
            mask_logits(logits, masks.rows, masks.bits())
        ends = [row.start + row.count for row in rows]
        token_rows = self._batch.tokens
        known = [token_rows[row.slot, :end] for row, end in zip(rows, ends, strict=True)]
        if failed:
            logits[list(failed)] = 0.0
        tokens = sample(logits, slots, known)
        where = torch.tensor([row.slot for row in rows], device=logits.device)
        token_rows[where, torch.tensor(ends, device=logits.device)] = tokens
        scores = {i: score(raw[i], tokens[i : i + 1], slots[i].params.logprobs) for i in scored}
        chosen = tokens.tolist()
        wait_for(logits.device)
        return chosen, {i: found.read() for i, found in scores.items()}, failed

    def _score_prompt(self, row: Row, hidden: Tensor, last: int) -> list[Scores]:
        """Log-probabilities of the prompt tokens that follow this row's positions, if asked."""
        slot = self._slot(row)
        rivals = slot.params.prompt_logprobs
        end = min(row.start + row.count, slot.num_prompt - 1)
        if rivals < 0 or end <= row.start:
            return []
        first = last - row.count + 1
        parts: list[Scores] = []
        for at in range(row.start, end, _PROMPT_LOGIT_ROWS):
            until = min(at + _PROMPT_LOGIT_ROWS, end)
            logits = self._model.logits(hidden[first + at - row.start : first + until - row.start])
            targets = self._batch.tokens[row.slot, at + 1 : until + 1]
            parts.append(score(logits, targets, rivals))
        return parts

    def _slot(self, row: Row) -> SlotSampling:
        slot = self._batch.sampling[row.slot]
        assert slot is not None, f"row of slot {row.slot}, which was never admitted"
        return slot
