"""The long rows' own judgement: figures, table, command line, and a short run of two of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.history import Answer
from tools.soaking import __main__ as soak
from tools.soaking.figures import (
    MemorySample,
    RowResult,
    at_least,
    at_most,
    exactly,
    longest_pause,
    memory_growth,
    memory_slope,
    noted,
    slope,
    table,
    thirds,
)
from tools.soaking.load import Log
from tools.soaking.requests import KINDS, Mix, make_requests
from tools.soaking.router import busy, parse


def result(*measures: object, findings: tuple[str, ...] = ()) -> RowResult:
    return RowResult(
        row="R1",
        title="killed",
        n=10,
        n_asked=200,
        duration_s=1.0,
        measures=measures,  # type: ignore[arg-type]
        findings=findings,
    )


def test_a_line_through_points() -> None:
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope([(1, 1), (1, 9)]) == 0
    assert slope([]) == slope([(1, 1)]) == memory_slope([]) == memory_growth([]) == 0


def test_memory_grows_before_it_is_warm_and_that_is_no_leak() -> None:
    flat = [MemorySample(n, min(80, 50 + n // 10) * 10**6) for n in range(0, 2000, 10)]
    assert memory_slope(flat) == pytest.approx(0)
    assert memory_growth(flat) == 30
    leaking = [MemorySample(n, 50_000_000 + 300 * n) for n in range(0, 2000, 10)]
    assert memory_slope(leaking) == pytest.approx(3)


def test_the_first_and_the_last_third() -> None:
    assert thirds([(n, 1.0 if n < 50 else 2.0) for n in range(100)]) == (1, 2)
    assert thirds([]) == (0, 0)


def test_a_pause_is_the_gap_that_a_fault_fell_into() -> None:
    gaps = [(0.0, 1.0), (1.0, 1.2), (5.0, 5.4), (9.0, 12.0)]
    assert longest_pause(gaps, [5.1]) == pytest.approx(0.4)
    assert longest_pause(gaps, [4.8]) == pytest.approx(0.4)  # it began a little later
    assert longest_pause(gaps, [3.0]) == longest_pause(gaps, []) == 0


def test_what_is_met() -> None:
    assert exactly("failed", 0).met
    assert not exactly("failed", 1).met
    assert at_most("slope", 1.0, 1, "MB").met
    assert not at_least("accepted", 89.0, 90, "%").met
    assert noted("requests", 1234).met is None
    assert result(exactly("failed", 0), noted("requests", 9)).met
    assert not result(exactly("failed", 1)).met
    assert not result(exactly("failed", 0), findings=("client 1 got a foreign token",)).met
    assert not result(findings=("broke off",)).met


def test_the_table() -> None:
    text = table(
        [
            result(exactly("failed", 0), noted("requests", 12345), at_most("pause", 1.25, 1, "s")),
            result(exactly("failed", 1), findings=("client 3, request 2: has no end",)),
        ]
    )
    assert text.splitlines()[2:6] == [
        "| R1 killed | 10 of 200 | failed | 0 | 0 | yes |",
        "|  |  | requests | 12,345 |  |  |",
        "|  |  | pause | 1.25 s | ≤ 1 | **no** |",
        "| R1 killed | 10 of 200 | failed | 1 | 0 | **no** |",
    ]
    assert text.endswith("R1: 1 findings\n- client 3, request 2: has no end")


def test_a_scrape() -> None:
    sample = parse(
        '# HELP x y\nup 1\nstate{replica="0",state="serving"} 1.0\n'
        'state{replica="1",state="serving"} 0.0\nrouter_requests_running{replica="1"} 2\n'
    )
    assert sample.total("up") == 1
    assert sample.with_label("state", 'state="serving"') == 1
    assert sample.total("nothing") == 0
    assert busy(sample)
    assert not busy(parse("router_requests_running 0\n"))


def test_requests_are_different_and_the_same_for_the_same_seed() -> None:
    mix = Mix("tiny", 4, 8, KINDS)
    made = make_requests(mix, 27, random.Random(1))
    assert made == make_requests(mix, 27, random.Random(1))
    assert len(made) == 27
    assert list(made.values())[:9] == list(KINDS)
    for one in made:
        body = json.loads(one.body)
        assert body["temperature"] == 0 or "seed" in body  # each has one answer


def test_the_log_proves_what_is_over_and_forgets_it() -> None:
    [one] = make_requests(Mix("tiny", 4, 8, ("plain",)), 1, random.Random(1))
    log = Log({one: Answer((("7", "8"),), ("ab",), ("length",), (3, 2))})
    for client, tokens in (("good", "78"), ("bad", "79")):
        log.sent(client, one)
        for index, token in enumerate(tokens):
            log.token(client, index, token)
        log.shown(client, "ab")
        log.ended(client, ("length",), (3, 2))
    log.sent("still waiting", one)
    log.check_now()
    assert len(log.findings) == 1
    assert "bad" in log.findings[0]
    assert "foreign" in log.findings[0]
    log.check_now(running=False)
    assert len(log.findings) == 2
    assert "still waiting" in log.findings[1]
    assert (len(log.gaps), len(log.answers), log.finished) == (2, 2, 2)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.parse(["--rows", "r1, R27", "--minutes", "2"]).rows == ["R1", "R27"]
    for words in (["--rows", "R99"], ["--minutes", "0"], ["--nonsense"]):
        with pytest.raises(SystemExit) as left:
            soak.parse(words)
        assert left.value.code == 64
    assert "rows are R1" in capsys.readouterr().err


def test_a_row_that_breaks_off_tells_each_reason() -> None:
    inner = ExceptionGroup("two", [ValueError("no answer"), OSError("gone")])
    assert soak.sentences(ExceptionGroup("one", [inner])) == [
        "ValueError: no answer",
        "OSError: gone",
    ]


@pytest.mark.slow
def test_a_row_played_shortly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "soak.json"
    assert soak.main(["--rows", "R1", "--share", "0.005", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    [row] = json.loads(file.read_text())["rows"]
    assert (row["row"], row["n"], row["n_asked"]) == ("R1", 1, 200)
    assert row["met"], printed
    assert {measure["what"]: measure["value"] for measure in row["measures"]}["requests"] > 0
    assert "| R1 one of two engines killed | 1 of 200 | failed or wrong answers | 0 |" in printed
