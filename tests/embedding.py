"""Embeds token lists with a real device, through the real scheduler and loop, in this process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engine.config import EngineConfig
from engine.device.build import Device, build_device
from engine.loop import EngineLoop
from engine.main import build_scheduler
from engine.protocol import Pooling, Sampling, StepOutput, Submit, pack_tokens, unpack_floats

MEAN = Pooling()


def embedding_config(model: Path, **options: object) -> EngineConfig:
    """A CPU engine's orders; `options` are fields of EngineConfig."""
    fields: dict[str, object] = {"endpoint": "ipc://none", "replica": 0, "epoch": 0, "threads": 2}
    return EngineConfig(model=str(model), **{**fields, **options})  # type: ignore[arg-type]


def embedding_device(model: Path, **options: object) -> Device:
    """The device of that engine."""
    return build_device(embedding_config(model, **options))


def pooled_submit(number: int, tokens: list[int], pooling: Pooling = MEAN) -> Submit:
    """A text to be embedded."""
    return Submit(0, number, pack_tokens(tokens), Sampling(), 0, pooling=pooling)


def embed(
    device: Device, texts: Iterable[list[int]], pooling: Pooling = MEAN, *, step_tokens: int = 512
) -> list[list[float]]:
    """The vectors of texts that are submitted at the same moment."""
    config = embedding_config(Path("/none"), step_tokens=step_tokens)
    loop = EngineLoop(build_scheduler(config, device.limits), device.runner, epoch=0)
    inbox = [pooled_submit(number, tokens, pooling) for number, tokens in enumerate(texts)]
    vectors: dict[int, list[float]] = {}
    while inbox or loop.busy:
        for message in loop.step(inbox):
            if isinstance(message, StepOutput):
                assert not message.ids
                for vector in message.embeddings:
                    assert vector.id not in vectors
                    vectors[vector.id] = unpack_floats(vector.values)
                for finish in message.finished:
                    assert finish.reason == "stop", finish
        inbox = []
    return [vectors[number] for number in sorted(vectors)]


def largest_difference(some: list[list[float]], others: list[list[float]]) -> float:
    """Over all values of all vectors."""
    pairs = zip(some, others, strict=True)
    return max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
