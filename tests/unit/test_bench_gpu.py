"""The closed-loop client against a small server, and the pure parts of the GPU matrix."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Generator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import closed_loop, gpu
from bench.client import BadResponse, Target
from bench.closed_loop import Answer, Events, Load, Part
from bench.shapes import FACTS, MATRIX, Row, floor_tok_s

TARGET = Target("127.0.0.1", 1)
LOAD = Load(TARGET, "m", 3, 7, 5, 4, 2, 100, 0)
TEXT = (
    b'data: {"choices":[{"text":"\\"usage\\": \\"error\\"","finish_reason":null}],"usage":null}\n\n'
)
SILENT = b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}\n\n'
DONE = b"data: [DONE]\n\n"
LINE = (
    "chatglm2-6b c=64 n=192 in=0+512 out=128: 7123 tok/s 55.65 req/s "
    "TTFT p50 212.3 p99 600.0 TPOT p50 6.50 ITL p50 5.10 p99 30.25 ms"
)


def feed(pieces: list[bytes]) -> Events:
    """One piece a second, the request at 10 s."""
    events = Events(10.0)
    for at, piece in enumerate(pieces):
        events.feed(piece, 11.0 + at)
    return events


def test_every_event_counts_but_usage_and_the_end() -> None:
    events = feed([b": comment\n\n", TEXT, SILENT + SILENT, USAGE + DONE])
    assert events.first_at == 12.0
    assert events.gaps_s == [1.0, 0.0]
    assert (events.last_at, events.tokens, events.error) == (13.0, 4, "")


@given(st.lists(st.integers(0, 400), max_size=8))
def test_any_cut_gives_the_same_events(places: list[int]) -> None:
    stream = TEXT + SILENT + TEXT + USAGE + DONE
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    events = feed([stream[a:b] for a, b in pairwise(edges)])
    assert (len(events.gaps_s), events.tokens) == (2, 4)


def test_errors_in_a_stream() -> None:
    assert feed([TEXT, b'data: {"error": {"message": "gone"}}\n\n']).error == "gone"
    with pytest.raises(BadResponse):
        feed([b'data: {"usage": {\n\n'])


def test_prompts_depend_on_the_arguments_alone() -> None:
    first = list(closed_loop.prompts(LOAD))
    assert first == list(closed_loop.prompts(LOAD))
    assert [len(ids) for ids in first] == [7] * 7
    assert all(10 <= value < 100 for ids in first for value in ids)
    other = list(closed_loop.prompts(msgspec.structs.replace(LOAD, rank=1)))
    assert [ids[:2] for ids in other] == [ids[:2] for ids in first]
    assert all(a[2:] != b[2:] for a, b in zip(first, other, strict=True))


def test_prompts_are_the_yardsticks() -> None:
    """The first ids of its process 0 (written down from a run of it)."""
    load = msgspec.structs.replace(LOAD, shared_prefix=1, input=3, requests=2, vocab=30000)
    assert list(closed_loop.prompts(load)) == YARDSTICK_PROMPTS


@pytest.mark.parametrize("procs", [1, 2, 3, 9])
def test_shares(procs: int) -> None:
    loads = closed_loop.shares(LOAD, procs)
    assert len(loads) == min(procs, 3)
    assert sum(load.requests for load in loads) == 7
    assert sum(load.concurrency for load in loads) == 3
    assert [load.rank for load in loads] == list(range(len(loads)))


def test_report_line() -> None:
    answers = [Answer(0.1 * n, [0.01] * 3, 0.1 * n + 0.03, 4) for n in range(1, 5)]
    parts = [Part(answers[:2], 100.0, 101.0), Part(answers[2:], 100.5, 102.0)]
    line = closed_loop.report_line(LOAD, parts)
    assert line == (
        "m c=3 n=4 in=2+5 out=4: 8 tok/s 2.00 req/s TTFT p50 300.0 p99 400.0 "
        "TPOT p50 10.00 ITL p50 10.00 p99 10.00 ms"
    )
    assert gpu.parse_line(f"warning\n{line}\n").ttft_p99 == 400.0


class _Server:
    """Answers completions with one event a token; keeps the bodies it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.refuse = False
        self.short = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                await self._answer(body["max_tokens"], writer)
        writer.close()

    async def _answer(self, tokens: int, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            text = b'{"error": {"message": "too many"}}'
            writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(tokens):
            writer.write(b"%x\r\n%s\r\n" % (len(TEXT), TEXT))
            await asyncio.sleep(0)
        end = USAGE.replace(b": 4}", b": %d}" % (tokens - self.short)) + DONE
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))
        await writer.drain()


async def _end_connections() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def server() -> Generator[tuple[_Server, str], None, None]:
    """A server in a thread of its own, and its address."""
    made = _Server()
    loop = asyncio.new_event_loop()
    started = threading.Event()
    ports: list[int] = []

    async def run() -> None:
        listener = await asyncio.start_server(made.handle, "127.0.0.1", 0)
        ports.append(listener.sockets[0].getsockname()[1])
        started.set()
        async with listener:
            with contextlib.suppress(asyncio.CancelledError):
                await listener.serve_forever()

    task = loop.create_task(run())
    thread = threading.Thread(target=lambda: loop.run_until_complete(task))
    thread.start()
    assert started.wait(60)
    yield made, f"http://127.0.0.1:{ports[0]}"
    loop.call_soon_threadsafe(task.cancel)
    thread.join(60)
    loop.run_until_complete(_end_connections())
    loop.close()


@pytest.mark.parametrize("procs", [1, 2])
def test_against_a_server(
    server: tuple[_Server, str], procs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    made, url = server
    words = ["--url", url, "--model", "m", "-c", "3", "-n", "8", "-i", "6", "-o", "5"]
    assert closed_loop.main([*words, "--shared-prefix", "2", "--procs", str(procs)]) == 0
    line = capsys.readouterr().out
    assert line.startswith("m c=3 n=8 in=2+6 out=5: ")
    assert gpu.parse_line(line).tok_s > 0
    assert len(made.bodies) == 8
    assert len({tuple(body["prompt"]) for body in made.bodies}) == 8
    body = made.bodies[0]
    assert len(body.pop("prompt")) == 8
    assert body == {
        "model": "m",
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_answers_that_are_not_whole(
    server: tuple[_Server, str], capsys: pytest.CaptureFixture[str]
) -> None:
    made, url = server
    words = ["--url", url, "--model", "m", "-n", "2", "-i", "6", "-o", "5"]
    made.short = 1
    assert closed_loop.main(words) == 1
    assert "asked for 5 tokens, usage says 4" in capsys.readouterr().err
    made.refuse = True
    assert closed_loop.main(words) == 1
    assert "503: too many" in capsys.readouterr().err
    assert closed_loop.main(["--url", "http://127.0.0.1:1", *words[2:]]) == 1
    assert "ConnectFailed" in capsys.readouterr().err


# -- the matrix


def test_parse_line() -> None:
    assert gpu.parse_line(LINE) == gpu.Figures(7123, 55.65, 212.3, 600, 6.5, 5.1, 30.25)
    for text in ("", "Traceback\nRuntimeError: 503"):
        with pytest.raises(gpu.RowFailed, match="no figures"):
            gpu.parse_line(text)


def test_rows_are_named_apart_and_have_facts() -> None:
    assert len({row.name for row in MATRIX}) == len(MATRIX)
    assert {row.model for row in MATRIX} == FACTS.keys()
    assert all(row.requests >= row.c for row in MATRIX)


def test_no_anchor_or_goal_is_beyond_the_floor() -> None:
    for row in MATRIX:
        assert max(row.vllm.tok_s, row.goal.tok_s) < floor_tok_s(row), row.name
        assert floor_tok_s(row, "int8") >= floor_tok_s(row)


def test_floor() -> None:
    """One stream: h100.md gives 3.89 ms for a reading of the weights."""
    row = Row("chatglm2-6b", 1, 6, 1, 1000)
    assert floor_tok_s(row) == pytest.approx(1000 / 3.894, rel=0.01)
    wide = Row("chatglm2-6b", 256, 768, 512, 128)
    assert floor_tok_s(wide) == pytest.approx(720e12 / 2 / 5.975e9 / 640 * 128, rel=1e-6)
    assert floor_tok_s(wide._replace(model="other")) == 0.0


def test_no_two_runs_share_prompts() -> None:
    """Runs of a model, warm-ups included, ask for prompts that part early."""
    runs = 4 * len(MATRIX)
    ranges = [gpu.vocab_of(run) for run in range(runs)]
    assert len(set(ranges)) == runs
    assert all(30_000 >= vocab > 16_394 for vocab in ranges)
    firsts = [
        next(closed_loop.prompts(Load(TARGET, "m", 1, 1, 512, 1, 0, vocab, 0))) for vocab in ranges
    ]
    for (run, one), (other, two) in product(enumerate(firsts[:8]), enumerate(firsts)):
        if abs(run - other) in (1, 2, 3):
            assert one[:64] != two[:64]


def test_chosen_rows() -> None:
    rows = gpu.chosen_rows(["vicuna-7b"], r"512/128 c=(1|8)$", 2)["vicuna-7b"]
    assert [row.c for row in rows] == [1, 8, 1, 8]
    assert [(row.c, run) for row, run in gpu.numbered(rows)] == [(1, 0), (8, 0), (1, 1), (8, 1)]
    assert gpu.chosen_rows(["vicuna-7b"], "nothing", 1) == {"vicuna-7b": []}
    assert gpu.parse_models("chatglm2-6b,vicuna-7b=/x") == {"chatglm2-6b": "", "vicuna-7b": "/x"}
    with pytest.raises(ValueError, match="is of"):
        gpu.parse_models("gpt-2")


def test_warm_ups() -> None:
    for row in MATRIX:
        warm = gpu.warm_up_of(row)
        assert (warm.c, warm.unique, warm.prefix) == (row.c, row.unique, row.prefix)
        assert warm == row if row.hits else warm.output == 16 or row.output <= 16


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.name)
def test_lines_have_columns(row: Row) -> None:
    line = gpu.line_of(row, gpu.parse_line(LINE), "none")
    assert line.startswith(row.name)
    assert line.endswith("30.25")


def test_card_names() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100"
    assert gpu.slug("Tesla T4") == "t4"
    assert gpu.slug("NVIDIA GeForce RTX 4090") == "4090"
    assert gpu.slug("cpu") == "cpu"


def test_a_client_that_fails() -> None:
    with pytest.raises(gpu.RowFailed, match="ended with 3: at last"):
        gpu.run_client(["sh", "-c", "echo first; echo at last >&2; exit 3"])
    assert gpu.run_client(["sh", "-c", f"echo '{LINE}'"]).tok_s == 7123


def test_a_client_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CLIENT_S", 0.2)
    with pytest.raises(gpu.RowFailed, match="not done"):
        gpu.run_client(["sh", "-c", "sleep 60 & sleep 60"])


def test_a_router_that_never_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The row is reported with the log; the results are on disk; the exit code tells."""
    save = tmp_path / "found.json"
    words = ["--models", f"vicuna-7b={tmp_path}", "--gpus", "cpu", "--rows", "c=1$"]
    assert gpu.main([*words, "--save", str(save), "--commit", "abc"]) == 1
    assert "FAILED: the router ended with" in capsys.readouterr().out
    found = json.loads(save.read_text())
    assert found["commit"] == "abc"
    assert found["rows"][0]["error"].startswith("the router ended with")


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list", "--models", "vicuna-7b"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert gpu.main(["--rows", "("]) == 64
    assert gpu.main(["--rows", "no such row"]) == 64


# Of the yardstick: `-i 3 --shared-prefix 1 -n 2`, process 0.
YARDSTICK_PROMPTS = [[25482, 27680, 12633, 24846], [26114, 29181, 13791, 1336]]
