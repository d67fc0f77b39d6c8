"""Choices of kernels that the tests measure stay with the tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from engine.device import build


@pytest.fixture(autouse=True, scope="session")
def kept_choices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file is in a folder of this run; the first engine measures, others find what it kept."""
    path = tmp_path_factory.mktemp("cache") / "products.json"

    def place(environ: Mapping[str, str]) -> Path:
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "default_path", place)
        yield path
