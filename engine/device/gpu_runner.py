"""Runs step plans on a CUDA device, one step ahead of the host.

Owns the model, the KV memory, the batch and the graphs. `launch` queues a step's work on the card's
stream and returns; nothing in it waits for the card or reads from it. `Pending.result` waits for an
event behind the step's copies. All work is on one stream, so that blocks freed while a step is
under way are written by their new owner only after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from engine.attention.paged import PagedStep
from engine.attention.paged_decode import decode_splits
from engine.device.gpu_batch import GpuBatch, upload_masks
from engine.device.graphs import Graphs
from engine.device.kv import KvCache
from engine.device.pooling import Pooled, SlotPooling
from engine.device.sampling import Scores, SlotSampling, edit_logits, score, to_host
from engine.device.step_shape import StepShape, captured_shape, decode_buckets, first_shapes
from engine.kernels.masks import mask_rows
from engine.kernels.sampler import SampledRows, sample_rows
from engine.kernels.step_inputs import SlotState, prepare_inputs
from engine.models.base import Model, ModelShape
from engine.plan import Row, Sampled, StepMasks, StepPlan
from engine.quant.product_choice import size_of
from engine.quant.product_tuner import ProductTuner

# Prompt logits are computed for so many positions at a time: 64 rows of 150k floats are 39 MB.
_PROMPT_LOGIT_ROWS = 64
_NOT_FINITE = -1  # what the sampler gives for a row without a valid choice
_NO_SCORES = "the model produced no finite scores"


class RunnerSettings(NamedTuple):
    """Sizes and switches of one engine. `graphs`: the model can be captured.

    `text_ids`: ids from there on have no text and are never sampled; 0: all have one.
    `pad_kv_slot`: a position of the KV memory that no sequence owns.
    """

    device: torch.device
    multiprocessors: int
    max_batch: int
    max_len: int
    block_size: int
    pad_kv_slot: int
    long_tile: int
    text_ids: int
    graphs: bool


class Launched(NamedTuple):
    """A step under way. See `engine.plan.Pending`."""

    done: torch.Event | torch.cuda.Event | None  # None on a CPU, in Triton's interpreter
    tokens: Tensor | None  # int32 [number of rows that sample], in main memory
    sampled: list[int]  # those rows
    scores: Mapping[int, Scores]
    prompt_scores: Mapping[int, list[Scores]]
    pooled: Pooled | None

    def result(self) -> Sampled:
        if self.done is not None:
            self.done.synchronize()
        tokens = [] if self.tokens is None else self.tokens.tolist()
        failed = {
            self.sampled[i]: _NO_SCORES for i, token in enumerate(tokens) if token == _NOT_FINITE
        }
        logprobs = {
            i: scores.read() for i, scores in self.scores.items() if tokens[i] != _NOT_FINITE
        }
        prompts = {i: Scores.join(parts) for i, parts in self.prompt_scores.items()}
        if self.pooled is None:
            return Sampled(tokens, logprobs, prompts, failed)
        embeddings, without = self.pooled.read()
        return Sampled(tokens, logprobs, prompts, failed | without, embeddings)


class GpuRunner:
    """See `engine.plan.RunnerLike`."""

    def __init__(
        self,
        model: Model,
        shape: ModelShape,
        cache: KvCache,
        batch: GpuBatch,
        settings: RunnerSettings,
        tuner: ProductTuner | None = None,
    ) -> None:
        """`cache` has one block more than the scheduler knows of: padding is written there.

        `tuner` has its turn in quiet moments, before graphs are captured that hold its choices.
        """
        self._model = model
        self._tuner = tuner
        self._cache = cache
        self._batch = batch
        self._settings = settings
        self._pooling = SlotPooling()
        self._kv_heads = shape.kv_heads
        on_card = settings.device.type == "cuda"
        self._side = torch.cuda.Stream(settings.device) if on_card else None  # type: ignore[no-untyped-call]
        self._counters = torch.zeros(
            settings.max_batch * shape.kv_heads, dtype=torch.int32, device=settings.device
        )
        self._buckets = decode_buckets(settings.max_batch)
        wanted = first_shapes(self._buckets, settings.long_tile) if settings.graphs else []
        self._graphs = Graphs(self._forward, wanted, self._load_head)

    def launch(self, plan: StepPlan) -> Launched:
        """Applies the plan; the sampled tokens are in their slots' rows when the next plan runs."""
        with torch.inference_mode():
            return self._launch(plan)

    def idle(self) -> bool:
        """Measures one more way to multiply, else captures one more graph.

        See `engine.plan.RunnerLike`.
        """
        with torch.inference_mode():
            if self._tuner is not None and self._tuner.pending:
                changed = self._tuner.measure_next()
                if changed:
                    self._graphs.drop(lambda shape: size_of(shape.tokens) == changed)
                return True
            self._batch.clear()
            return self._graphs.capture_next()

    def _launch(self, plan: StepPlan) -> Launched:
        batch, rows = self._batch, plan.rows
        self._cache.copy(plan.copies)
        batch.apply(plan)
        self._pooling.admit(plan.admits)
        staged = batch.stage(rows, plan.grows)
        hidden = self._graphs.run(staged.shape, captured_shape(staged.shape, self._buckets))
        last = staged.last_tokens
        prompt_scores = {
            i: parts
            for i, row in enumerate(rows)
            if (parts := self._score_prompt(row, hidden, last[i]))
        }
        pooled = self._pooling.add(rows, last, hidden, self._model.last_hidden)
        tokens, scores = None, dict[int, Scores]()
        if staged.sampled:
            chosen, scores = self._sample([rows[i] for i in staged.sampled], hidden, plan.masks)
            tokens = to_host(chosen)
        done = torch.cuda.current_stream().record_event() if hidden.is_cuda else None
        return Launched(done, tokens, staged.sampled, scores, prompt_scores, pooled)

    def _forward(self, shape: StepShape) -> Tensor:
        """Hidden states [shape.tokens, hidden_size] of what is staged. Fit for capture."""
        batch, settings = self._batch, self._settings
        ids, positions, kv_slots = torch.empty(
            (3, shape.tokens), dtype=torch.int64, device=settings.device
        ).unbind()
        state = SlotState(batch.rows, batch.tokens, batch.tables, settings.block_size)
        prepare_inputs(state, settings.pad_kv_slot, ids, positions, kv_slots)
        splits = decode_splits(
            shape.decode_rows, self._kv_heads, settings.max_len, settings.multiprocessors
        )
        attention = PagedStep(
            kv_slots, batch.rows, batch.tables, batch.tiles,
            num_rows=shape.decode_rows, max_splits=splits,
            num_tiles=shape.tiles, tile_size=shape.tile, counters=self._counters, side=self._side,
        )  # fmt: skip
        return self._model.forward(ids, positions, self._cache.layers, attention)

    def _load_head(self, shape: StepShape) -> None:
        """Runs the head for as many rows: a library loads a kernel at its first use, and waits for
        the card to do so. Streams would feel that as a pause of two steps."""
        if shape.decode_rows:
            self._model.logits(self._forward(StepShape(shape.decode_rows, shape.decode_rows, 0, 1)))

    def _sample(
        self, rows: list[Row], hidden: Tensor, masks: StepMasks | None
    ) -> tuple[Tensor, dict[int, Scores]]:
        """Chooses tokens, also into the token rows; scores them where that is asked."""
        batch, text_ids = self._batch, self._settings.text_ids
        count = len(rows)
        # For one of few numbers of rows, whose kernels are loaded; those beyond are computed twice.
        padded = next(size for size in self._buckets if size >= count)
        last = hidden.index_select(0, batch.sample_at[:padded])
        logits = self._model.logits(last)[:count]
        slots = [self._slot(row) for row in rows]
        scored = [i for i, slot in enumerate(slots) if slot.params.logprobs >= 0]
        edited = [i for i, slot in enumerate(slots) if slot.edits_logits]
        masked = masks.rows if masks is not None else []
        # Logprobs are those of the model, before masks and edits, so they need the raw logits.
        raw = {i: logits[i : i + 1] for i in scored}
        raw |= {i: raw[i].clone() for i in {*edited, *masked} if i in raw}
        if masks is not None:
            # The forward pass is queued by now: the card computes while the host does, here.
            mask_rows(logits, *upload_masks(masks.rows, masks.bits(), logits.device))
        for i in edited:
            row = rows[i]
            known = batch.tokens[row.slot, : row.start + row.count]
            edit_logits(logits[i], slots[i], known)
        chosen = torch.empty(count, dtype=torch.int32, device=logits.device)
        sampled = SampledRows(batch.sample_slots[:count], batch.sample_positions[:count])
        sample_rows(logits, batch.params, sampled, batch.tokens, chosen, text_ids)
        if not scored:
            return chosen, {}
        valid = chosen.clamp(min=0)
        rivals = {i: slots[i].params.logprobs for i in scored}
        return chosen, {i: score(raw[i], valid[i : i + 1], rivals[i]) for i in scored}

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
