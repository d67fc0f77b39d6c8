"""All long rows, by their numbers in the acceptance table, with how often each fault is played."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from tools.soaking.ends import r16
from tools.soaking.figures import RowResult
from tools.soaking.hours import r27
from tools.soaking.kills import r1, r2, r5
from tools.soaking.overload import r10, r19
from tools.soaking.row import Orders


class Row(NamedTuple):
    """`n` is the full count; a shorter run says so in its line."""

    play: Callable[[Orders], Awaitable[RowResult]]
    n: int


ROWS: Final = {
    "R1": Row(r1, 200),
    "R2": Row(r2, 30),
    "R5": Row(r5, 20),
    "R10": Row(r10, 10_000),
    "R16": Row(r16, 200),
    "R19": Row(r19, 500),
    "R27": Row(r27, 1),  # by --minutes
}
