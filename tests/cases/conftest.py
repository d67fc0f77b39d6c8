"""Fixtures of the cases: scripted engines in this process, and processes shared by all cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cases.asking import DEMO, KEY, MAX_LEN, TINY, Scene, Scripted
from tests.demo_model import demo_model
from tests.router_parts import MODEL, Play, router_parts
from tests.router_process import Start, starting
from tests.serving import Server, serve
from tools.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model: one token per byte."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture
def engine(folder: Path) -> Scripted:
    """`async with engine(play) as router:` a router whose engine plays that, whatever is asked.

    The scene may be a function of the prompt; `folder` and other options go to `router_parts`.
    """

    def make(scene: Scene, **options: Any) -> Any:
        def plays(prompt: str) -> Play:
            return scene if isinstance(scene, Play) else scene(prompt)

        return router_parts(options.pop("folder", folder), plays, max_len=MAX_LEN, **options)

    return make


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Real engines behind a real router: the demo model, and the tiny one with two end tokens."""
    demo_model()
    tiny = write_tiny_model(tmp_path_factory.mktemp("real") / TINY)
    words = ("--models", f"{DEMO},{TINY}={tiny}", "--gpus", "cpu,cpu", "--kv-memory", "300M")
    with serve(*words) as server:
        yield server


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    """A router process over a scripted engine, with a key and its request log on."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    slow = {"match": {"contains": "slow"}, "reply": "x", "repeat": True, "tokens_per_s": 20}
    script = {"rules": [slow, {"match": "*", "reply": "0123456789"}]}
    words = ("--models", f"{TINY}={folder}", "--api-key-file", str(keys))
    with serve(*words, script=script) as server:
        yield server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts routers as processes; what a case leaves is ended."""
    yield from starting(tmp_path)
