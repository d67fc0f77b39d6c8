"""From what a long row measured to its table: pure.

Owns the form of a result and the definitions of its figures. Must not know how they were measured.

* slope: least squares of memory over finished requests, without the first `WARM_UP_SHARE` of them.
  A router grows at first: caches fill, the allocator's arenas settle. What goes on growing after
  that is a leak. What it grew from the first sample to the last is told beside it.
* p99 flat: the 99th percentile of the last third of the time over that of the first third.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from bench.report import percentile

WARM_UP_SHARE: Final = 0.25
SHOWN_FINDINGS: Final = 20


class Measure(msgspec.Struct, frozen=True):
    """One figure. `asked` is empty and `met` None where none was asked for."""

    what: str
    value: float
    unit: str = ""
    asked: str = ""
    met: bool | None = None

    def told(self) -> str:
        """The figure with its unit."""
        whole = self.value == int(self.value) and abs(self.value) < 1e15
        number = f"{int(self.value):,}" if whole else f"{self.value:,.3g}"
        return f"{number} {self.unit}".rstrip()


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table: how often its fault was played, and what came of it.

    `findings` are sentences on what went wrong: one is enough for the row not to be met.
    """

    row: str
    title: str
    n: int
    n_asked: int
    duration_s: float
    measures: tuple[Measure, ...]
    findings: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Is every figure as asked?"""
        return not self.findings and all(m.met is not False for m in self.measures)


class MemorySample(NamedTuple):
    """The router's own memory when so many requests were finished."""

    finished: int
    resident_bytes: int


def exactly(what: str, value: float, wanted: float = 0.0, unit: str = "") -> Measure:
    """A figure that has to be `wanted`."""
    return Measure(what, value, unit, f"{wanted:g}", value == wanted)


def at_most(what: str, value: float, limit: float, unit: str = "") -> Measure:
    """A figure with an upper bound."""
    return Measure(what, value, unit, f"≤ {limit:g}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "") -> Measure:
    """A figure with a lower bound."""
    return Measure(what, value, unit, f"≥ {limit:g}", value >= limit)


def noted(what: str, value: float, unit: str = "") -> Measure:
    """A figure without a bound."""
    return Measure(what, value, unit)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares of y over x; 0.0 where x does not vary."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    square = sum((x - mean_x) ** 2 for x, _ in points)
    if square == 0:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / square


def memory_slope(samples: Sequence[MemorySample]) -> float:
    """MB per 10,000 requests after the warm-up; see the module's definition."""
    if not samples:
        return 0.0
    warm = WARM_UP_SHARE * samples[-1].finished
    points = [(s.finished / 1e4, s.resident_bytes / 1e6) for s in samples if s.finished >= warm]
    return slope(points)


def memory_growth(samples: Sequence[MemorySample]) -> float:
    """MB from the first sample to the last."""
    return (samples[-1].resident_bytes - samples[0].resident_bytes) / 1e6 if samples else 0.0


def thirds(timed: Iterable[tuple[float, float]], percent: float = 99.0) -> tuple[float, float]:
    """The percentile of the values in the first and in the last third of the time.

    `timed` gives (when, value). 0.0 for a third without values.
    """
    pairs = sorted(timed)
    if not pairs:
        return 0.0, 0.0
    begin_s, end_s = pairs[0][0], pairs[-1][0]
    third_s = (end_s - begin_s) / 3
    first = [value for at_s, value in pairs if at_s <= begin_s + third_s]
    last = [value for at_s, value in pairs if at_s >= end_s - third_s]
    return percentile(first, percent), percentile(last, percent)


def longest_pause(
    gaps: Iterable[tuple[float, float]], faults_s: Sequence[float], within_s: float = 0.5
) -> float:
    """The longest gap, of (begin, end), that a fault fell into or ended at most `within_s` before.

    A gap that begins a little after the fault still belongs to it: what the engine had sent before
    its death arrives until then.
    """
    spans = list(gaps)
    return max(
        (end - begin for at in faults_s for begin, end in spans if begin - within_s <= at <= end),
        default=0.0,
    )


def table(results: Sequence[RowResult]) -> str:
    """As Markdown: one line a figure, what went wrong below."""
    lines = ["| row | N | what | measured | asked | met |", "|---|---|---|---|---|---|"]
    for result in results:
        count = f"{result.n:,}"
        if result.n != result.n_asked:
            count += f" of {result.n_asked:,}"
        for number, measure in enumerate(result.measures):
            name, n = (f"{result.row} {result.title}", count) if number == 0 else ("", "")
            met = {True: "yes", False: "**no**", None: ""}[measure.met]
            lines.append(
                f"| {name} | {n} | {measure.what} | {measure.told()} | {measure.asked} | {met} |"
            )
    for result in results:
        if not result.findings:
            continue
        lines += ["", f"{result.row}: {len(result.findings)} findings"]
        lines += [f"- {sentence}" for sentence in result.findings[:SHOWN_FINDINGS]]
    return "\n".join(lines)
