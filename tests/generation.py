"""Drives a real device through the real scheduler, in this process: the engine, unwired."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.device.build import Device, build_device
from engine.grammar import Grammars, Matcher
from engine.prefix import PrefixIndex
from engine.protocol import (
    Finish,
    Limits,
    Logprobs,
    Sampling,
    Stats,
    Submit,
    Vocabulary,
    pack_tokens,
    unpack_floats,
    unpack_tokens,
)
from engine.scheduler import Scheduler

GREEDY = Sampling(temperature=0.0)


def device_of(model: Path, **options: object) -> Device:
    """A loaded CPU device; `options` are fields of EngineConfig."""
    fields: dict[str, object] = {"endpoint": "ipc://none", "replica": 0, "epoch": 0, "threads": 2}
    return build_device(EngineConfig(model=str(model), **{**fields, **options}))  # type: ignore[arg-type]


@dataclass
class Generated:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    cached: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    embeddings: list[list[float]] = field(default_factory=list)


class Driver:
    """One scheduler over one device; blocks and budget may be smaller than the device's."""

    def __init__(
        self,
        device: Device,
        *,
        num_blocks: int = 0,
        step_tokens: int = 512,
        prefix_cache: bool = True,
    ) -> None:
        limits: Limits = msgspec.structs.replace(
            device.limits, num_blocks=num_blocks or device.limits.num_blocks
        )
        index = PrefixIndex(b"test") if prefix_cache else None
        self.pool = BlockPool(limits.num_blocks, limits.block_size, index)
        self.scheduler = Scheduler(self.pool, limits, step_tokens=step_tokens)
        self.stats = Stats()
        self._device = device
        self._ids = 0
        self._grammars: Grammars | None = None

    def run(self, submits: Iterable[Submit], overlap: int = 0) -> list[Generated]:
        """Runs all to their ends, `overlap` steps ahead; results in the order of `submits`."""
        results: dict[int, Generated] = {}
        for submit in submits:
            results[submit.id] = Generated()
            self.scheduler.add(submit, self._matcher_of(submit) if submit.grammar else None)
        launched = []
        while self.scheduler.busy:
            plan = self.scheduler.plan()
            if plan is not None:
                launched.append((plan, self._device.runner.launch(plan)))
            while len(launched) > (overlap if plan is not None else 0):
                done, pending = launched.pop(0)
                self.scheduler.commit(done, pending.result())
            self._collect(results)
        self._collect(results)
        return list(results.values())

    def learn(self, vocabulary: Vocabulary) -> None:
        """From now on submits may have grammars."""
        self._grammars = Grammars(vocabulary, self._device.limits.vocab_size)

    def _matcher_of(self, submit: Submit) -> Matcher:
        assert self._grammars is not None
        generated = unpack_tokens(submit.tokens)[submit.num_prompt :] if submit.num_prompt else []
        return self._grammars.matcher(
            submit.grammar, generated, submit.stop_ids, submit.sampling.min_new
        )

    def submit(
        self, tokens: list[int], max_new: int, sampling: Sampling = GREEDY, **more: object
    ) -> Submit:
        """A submit with the next id."""
        self._ids += 1
        return Submit(0, self._ids, pack_tokens(tokens), sampling, max_new, **more)  # type: ignore[arg-type]

    def _collect(self, results: dict[int, Generated]) -> None:
        output = self.scheduler.take_output()
        if output is None:
            return
        self.stats = output.stats
        for started in output.started:
            results[started.id].cached = started.cached
        for sequence, token in zip(output.ids, unpack_tokens(output.tokens), strict=True):
            results[sequence].tokens.append(token)
        for finish in output.finished:
            assert results[finish.id].finish is None, "a second end"
            results[finish.id].finish = finish
        for entry in output.logprobs:
            results[entry.id].logprobs.append(entry)
        for entry in output.prompt_logprobs:
            results[entry.id].prompt_logprobs.append(entry)
        for vector in output.embeddings:
            results[vector.id].embeddings.append(unpack_floats(vector.values))
