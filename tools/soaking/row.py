"""What every long row is given, and what it gives back.

Owns nothing. A row is a coroutine from `Orders` to a `RowResult`; see `rows.py` for all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Orders(NamedTuple):
    """How long, with which model, where; `say` tells progress to a person."""

    n: int
    n_asked: int
    minutes: float
    tiny: Path  # the folder of a tiny model
    model: str  # of the rows that want a real one
    gpus: str  # of the rows with two replicas of a real engine
    seed: int
    say: Callable[[str], None]

    def rng(self, row: str) -> random.Random:
        """The row's own source of chance: the same seed plays the same row."""
        return random.Random(f"{self.seed}/{row}")
