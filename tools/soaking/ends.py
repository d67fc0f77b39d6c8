"""R16: the router is killed at random moments of its life; engines leave, and the next one starts.

The runtime folder stays the same, so each start finds what the last kill left.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.lifelines import Kill, kill_router_once
from tools.soaking.figures import RowResult, exactly, noted
from tools.soaking.router import paced
from tools.soaking.row import Orders

GONE_S: Final = 1.0  # asked of engines, after the death of their router
PATIENCE_S: Final = 30.0


async def r16(orders: Orders) -> RowResult:
    """As many lives as kills."""
    rng, began_s = orders.rng("R16"), time.monotonic()
    progress = paced(orders.n, lambda text: orders.say(f"R16: {text} routers killed"))
    kills: list[Kill] = []
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(orders.n):
            folder = Path(name)
            try:
                kill = await asyncio.to_thread(kill_router_once, folder, rng, PATIENCE_S)
            except (AssertionError, OSError) as error:
                findings.append(f"start {number}: {error}"[:300])
                continue
            kills.append(kill)
            findings += [f"kill {number}: engine {pid} lives on" for pid in kill.left]
            progress(number + 1)
    late = sum(kill.gone_s > GONE_S for kill in kills)
    return RowResult(
        row="R16",
        title="router killed at random moments",
        n=len(kills),
        n_asked=orders.n_asked,
        duration_s=time.monotonic() - began_s,
        measures=(
            exactly("kills with engines alive after 1 s", late),
            exactly("starts that failed", orders.n - len(kills)),
            noted(
                "kills that an engine outlived for a moment",
                sum(kill.engines > 0 for kill in kills),
            ),
            noted("longest until all engines were gone", _longest_s(kills), "s"),
        ),
        findings=tuple(findings),
    )


def _longest_s(kills: list[Kill]) -> float:
    return max((kill.gone_s for kill in kills), default=0.0)
