"""The load generator's pure parts: response framing, event scanning, workloads, figures, table."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import cpu, edges, serve, structured, workloads
from bench.baseline import Seconds, Task, time_all
from bench.client import (
    BadResponse,
    Disconnected,
    ResponseParser,
    StreamTally,
    build_request,
    error_message,
    parse_target,
)
from bench.report import (
    Row,
    Run,
    detailed,
    meets,
    parse_goodput,
    peak_concurrency,
    peak_output_rate,
    percentile,
    render,
    summarize,
)
from bench.workloads import Lengths, Shape, parse_lengths
from tests.demo_model import demo_model

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def event(text: str = "", finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    body = {"id": "x", "choices": [choice], "usage": None, **more}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)


class TestTarget:
    def test_forms(self) -> None:
        assert parse_target("http://127.0.0.1:8000/v1/").port == 8000
        assert parse_target("localhost:9").host == "localhost"
        target = parse_target("https://example.org/api/v1")
        assert (target.port, target.path, target.tls) == (443, "/api", True)
        assert not target.is_local
        assert parse_target("http://[::1]:8000").is_local

    @pytest.mark.parametrize("url", ["ftp://x", "http://", "unix:///x", "http://h:port"])
    def test_refuses(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"address|port"):
            parse_target(url)

    def test_request(self) -> None:
        target = parse_target("http://[::1]:80/x", (("Authorization", "Bearer k"),))
        request = build_request(target, "POST", "/v1/completions", b"{}")
        assert request.startswith(b"POST /x/v1/completions HTTP/1.1\r\nHost: [::1]:80\r\n")
        assert b"\r\nAuthorization: Bearer k\r\n\r\n{}" in request


class TestResponseParser:
    @given(
        st.lists(st.binary(min_size=1, max_size=30), max_size=8),
        st.lists(st.integers(0, 400), max_size=12),
        st.sampled_from([b"0\r\n\r\n", b"0;x=y\r\nTrailer: a\r\n\r\n"]),
    )
    def test_any_cut_of_chunks(self, bodies: list[bytes], cuts: list[int], end: bytes) -> None:
        parser = ResponseParser()
        whole = CHUNKED + b"".join(map(chunk, bodies)) + end
        pieces = [piece for data in cut(whole, cuts) for piece in parser.feed(data)]
        assert pieces == bodies
        assert parser.done
        assert parser.keep_alive

    @given(st.binary(max_size=50), st.lists(st.integers(0, 200), max_size=6))
    def test_any_cut_of_plain(self, body: bytes, cuts: list[int]) -> None:
        head = f"HTTP/1.1 503 No\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        parser = ResponseParser()
        pieces = [piece for data in cut(head.encode() + body, cuts) for piece in parser.feed(data)]
        assert b"".join(pieces) == body
        assert (parser.status, parser.done, parser.keep_alive) == (503, True, False)

    def test_body_until_the_end(self) -> None:
        parser = ResponseParser()
        assert parser.feed(b"HTTP/1.0 200 OK\r\n\r\nabc") == [b"abc"]
        assert not parser.done
        parser.end()
        assert parser.done
        assert not parser.keep_alive

    def test_continue_is_skipped(self) -> None:
        parser = ResponseParser()
        parser.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")
        assert (parser.status, parser.done) == (204, True)

    @pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED + chunk(b"ab")])
    def test_cut_short(self, sent: bytes) -> None:
        parser = ResponseParser()
        parser.feed(sent)
        with pytest.raises(Disconnected):
            parser.end()

    @pytest.mark.parametrize(
        "sent",
        [b"SSH-2.0\r\n\r\n", CHUNKED + b"zz\r\n", CHUNKED + b"-1\r\n", b"x" * 70_000],
    )
    def test_malformed(self, sent: bytes) -> None:
        with pytest.raises(BadResponse):
            ResponseParser().feed(sent)


class TestStreamTally:
    def test_times(self) -> None:
        tally = StreamTally()
        role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        for now, piece in (
            (1.0, role),
            (2.0, event("a")),
            (2.5, b": ping\n\n"),
            (3.0, event("b") + event("c")),
            (4.0, event("", "length")),
            (5.0, USAGE),
            (5.5, b"data: [DONE]\n\n"),
        ):
            tally.feed(piece, now)
        assert (tally.first_at, tally.last_at) == (2.0, 4.0)
        assert tally.gaps_s == [1.0, 0.0]
        assert tally.num_text_events == 3
        assert tally.finish_reason == "length"
        assert tally.done
        usage = tally.usage()
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (7, 3, 4)

    @given(st.lists(st.integers(0, 2000), max_size=20), st.sampled_from([b"\n", b"\r\n"]))
    def test_any_cut(self, cuts: list[int], newline: bytes) -> None:
        stream = event("é ") + event(' "text":"') + event("", "stop") + USAGE + b"data: [DONE]\n\n"
        tally = StreamTally(keep_text=True)
        for piece in cut(stream.replace(b"\n", newline), cuts):
            tally.feed(piece, 0.0)
        assert "".join(tally.text) == 'é  "text":"'
        assert (tally.num_text_events, tally.finish_reason, tally.done) == (2, "stop", True)
        assert tally.usage() is not None

    def test_text_that_looks_like_keys_is_only_text(self) -> None:
        tally = StreamTally()
        odd = '{"usage":{"prompt_tokens":9}} "finish_reason":"stop" {"error":1}'
        tally.feed(event(odd), 0.0)
        assert tally.num_text_events == 1
        assert (tally.usage(), tally.finish_reason, tally.error) == (None, None, None)

    def test_spaces_and_other_text_fields(self) -> None:
        tally = StreamTally()
        tally.feed(b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n', 1.0)
        tally.feed(b'data:{"choices":[{"text":"a","finish_reason": "length"}]}\n\n', 2.0)
        assert (tally.num_text_events, tally.finish_reason) == (2, "length")

    def test_error_event(self) -> None:
        tally = StreamTally()
        tally.feed(b'data: {"error":{"message":"gone","code":1}}\n\ndata: {"error":"x"}\n\n', 1.0)
        assert tally.error == "x"
        assert error_message(b'{"error":{"message":"no"}}') == "no"
        assert error_message(b"<html>") == "<html>"

    def test_no_json(self) -> None:
        with pytest.raises(BadResponse):
            StreamTally().feed(b"data: nonsense\n\n", 0.0)


class TestWorkloads:
    shape = Shape(requests=10, input=Lengths(5, 9), output=Lengths(3, 3), prefix_len=20, prefixes=3)

    def test_random(self) -> None:
        sessions = workloads.random_sessions(self.shape, 1)
        assert sessions == workloads.random_sessions(self.shape, 1)
        assert sessions != workloads.random_sessions(self.shape, 2)
        turns = [turn for session in sessions for turn in session.turns]
        assert len(turns) == 10
        assert {len(turn.ids) for turn in turns} <= {5, 6, 7, 8, 9}
        assert all(workloads.FIRST_PLAIN_ID <= i < 30_000 for turn in turns for i in turn.ids)

    def test_shared_prefix(self) -> None:
        prompts = [s.turns[0].ids for s in workloads.shared_prefix_sessions(self.shape, 1)]
        assert len({ids[:20] for ids in prompts}) == 3
        assert prompts[0][:20] == prompts[3][:20]
        assert len({ids[20:] for ids in prompts}) == 10

    def test_multi_turn(self) -> None:
        sessions = workloads.multi_turn_sessions(self.shape, 1)
        assert [len(session.turns) for session in sessions] == [4, 4, 2]
        starts = {tuple(session.turns[0].text.split()[:20]) for session in sessions}
        assert len(starts) == 1
        assert 5 <= len(sessions[0].turns[1].text.split()) <= 9

    def test_file(self) -> None:
        lines = [b'{"prompt":"hi","max_tokens":2}', b"", b'{"prompt":[1,2]}']
        shape = Shape(requests=3, input=Lengths(1, 1), output=Lengths(7, 7))
        turns = [s.turns[0] for s in workloads.file_sessions(lines, shape, "completions")]
        assert [(t.text, t.ids, t.max_tokens) for t in turns] == [
            ("hi", (), 2),
            ("", (1, 2), 7),
            ("hi", (), 2),
        ]
        chat = [b'{"messages":[{"role":"user","content":"x"}]}', b'{"prompt":"y"}']
        bodies = [
            workloads.request_body(session.turns[0], "chat", [], {"model": "m"})
            for session in workloads.file_sessions(chat, shape, "chat")
        ]
        assert [body["messages"][0]["content"] for body in bodies] == ["x", "y", "x"]

    @pytest.mark.parametrize(
        ("line", "endpoint"),
        [
            (b"nonsense", "chat"),
            (b'{"prompt":5}', "chat"),
            (b'{"prompt":[1]}', "chat"),
            (b'{"messages":[]}', "completions"),
            (b"\xff", "chat"),
        ],
    )
    def test_bad_file_line(self, line: bytes, endpoint: workloads.Endpoint) -> None:
        with pytest.raises(ValueError, match="line 2"):
            workloads.file_sessions([b'{"prompt":"a"}', line], self.shape, endpoint)

    def test_empty_file(self) -> None:
        with pytest.raises(ValueError, match="no request"):
            workloads.file_sessions([b" "], self.shape, "chat")

    def test_history_of_a_completion_continues_the_text(self) -> None:
        turn = workloads.Turn(4, text="next")
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}]
        assert workloads.request_body(turn, "completions", said, {})["prompt"] == "a b\nnext"
        messages = workloads.request_body(turn, "chat", said, {})["messages"]
        assert messages == [*said, {"role": "user", "content": "next"}]

    def test_lengths(self) -> None:
        assert parse_lengths("5") == Lengths(5, 5)
        assert parse_lengths("2:9") == Lengths(2, 9)
        for bad in ("0", "9:2", "x", ":4", "4:"):
            if bad == "4:":
                assert parse_lengths(bad) == Lengths(4, 4)
                continue
            with pytest.raises(ValueError, match=r"length|invalid"):
                parse_lengths(bad)

    def test_arrivals(self) -> None:
        sessions = workloads.random_sessions(Shape(
            requests=4000, input=Lengths(1, 1), output=Lengths(1, 1)), 1)  # fmt: skip

        def gaps(burstiness: float) -> list[float]:
            timed = workloads.arrivals(sessions, 50.0, burstiness, 3)
            return [b.arrival_s - a.arrival_s for a, b in pairwise(timed)]

        assert gaps(float("inf")) == pytest.approx([0.02] * 3999)
        poisson, bursty = np.array(gaps(1.0)), np.array(gaps(0.25))
        assert poisson.mean() == pytest.approx(0.02, rel=0.1)
        assert poisson.std() == pytest.approx(0.02, rel=0.1)
        assert bursty.mean() == pytest.approx(0.02, rel=0.15)
        assert bursty.std() == pytest.approx(0.04, rel=0.15)


def row(start_s: float = 0.0, **more: object) -> Row:
    return Row(session=0, turn=0, start_s=start_s, **more)  # type: ignore[arg-type]


GOOD = row(
    ttft_s=0.5, latency_s=2.5, itl_s=[1.0, 1.0], text_events=3, input_tokens=10, output_tokens=5
)


class TestReport:
    @given(
        st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
        st.floats(0, 100),
    )
    def test_percentile_is_numpys(self, values: list[float], percent: float) -> None:
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))

    def test_summary(self) -> None:
        late = row(2.0, ttft_s=1.5, latency_s=1.5, text_events=1, input_tokens=4, output_tokens=1)
        bad = row(error="http_503", detail="busy", ttft_s=99.0)
        run = Run(rows=[GOOD, late, bad], duration_s=4.0, unfinished=1)
        summary = summarize(run, {"ttft": 600.0})
        assert (summary["completed"], summary["failed"], summary["unfinished"]) == (2, 1, 1)
        assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (14, 6)
        assert summary["output_throughput"] == 1.5
        assert summary["total_token_throughput"] == 5.0
        assert summary["request_goodput"] == 0.25
        assert summary["median_ttft_ms"] == pytest.approx(1000.0)
        assert summary["mean_tpot_ms"] == pytest.approx(500.0)  # the one-token answer has none
        assert summary["p99_itl_ms"] == pytest.approx(1000.0)
        assert summary["errors"] == {"http_503": 1}
        assert summary["first_errors"] == {"http_503": "busy"}
        assert summary["max_concurrent_requests"] == 2
        assert summary["tokens_per_chunk"] == 1.5

    def test_keys_of_vllm(self) -> None:
        summary = summarize(Run(rows=[], duration_s=0.0))
        for name in ("ttft", "tpot", "itl", "e2el"):
            for part in ("mean", "median", "std", "p99"):
                assert summary[f"{part}_{name}_ms"] == 0.0
        assert detailed([GOOD, row(error="x")])["output_lens"] == [5]

    def test_labels_of_vllm(self) -> None:
        text = render(summarize(Run(rows=[GOOD], duration_s=2.0), {"ttft": 1.0}), 4, 2.0)
        for label in (
            "Successful requests:                     1\n",
            "Maximum request concurrency:             4\n",
            "Request rate configured (RPS):           2.00\n",
            "Benchmark duration (s):                  2.00\n",
            "Total input tokens:                      10\n",
            "Total generated tokens:                  5\n",
            "Request throughput (req/s):              0.50\n",
            "Request goodput (req/s):                 0.00\n",
            "Output token throughput (tok/s):         2.50\n",
            "Mean TTFT (ms):                          500.00\n",
            "P99 E2EL (ms):                           2500.00\n",
        ):
            assert label in text

    def test_goodput(self) -> None:
        limits = parse_goodput(["ttft:500", "itl:1000", "tpot:500", "e2el:2500"])
        assert meets(GOOD, limits)
        assert not meets(GOOD, limits | {"itl": 999.0})
        for bad in ("ttft", "speed:3", "ttft:x"):
            with pytest.raises(ValueError, match=r"limit|float"):
                parse_goodput([bad])

    def test_peaks(self) -> None:
        # Events at 0.5, 1.5 and 2.5 s, 5 tokens over 3 events.
        assert peak_output_rate([GOOD]) == pytest.approx(5 / 3)
        assert peak_output_rate([GOOD, GOOD]) == pytest.approx(10 / 3)
        assert peak_concurrency([GOOD, row(2.5, latency_s=1.0)]) == 1
        assert peak_output_rate([]) == peak_concurrency([]) == 0


class TestCommandLine:
    @pytest.mark.parametrize(
        "words",
        [
            ["--url", "http://10.0.0.1:1"],
            ["-n", "0"],
            ["--rate", "0"],
            ["--workload", "file"],
            ["--file", "x.jsonl"],
            ["--endpoint", "chat", "--prompt", "ids"],
            ["--workload", "file", "--file", "/nonexistent.jsonl"],
            ["-i", "9:1"],
            ["--goodput", "speed:1"],
            ["--header", "nocolon"],
            ["--model", "m", "--extra-body", "[]"],
        ],
    )
    def test_usage_errors_say_why(
        self, words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert serve.main(words) == serve.USAGE
        assert capsys.readouterr().err.startswith("router-bench: ")

    def test_unknown_option(self) -> None:
        with pytest.raises(SystemExit) as stop:
            serve.main(["--nonsense"])
        assert stop.value.code == serve.USAGE

    def test_no_server(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert serve.main(["--url", "http://127.0.0.1:1"]) == 1
        assert "no connection to 127.0.0.1:1" in capsys.readouterr().err


class TestCpuTable:
    results = cpu.Results(
        Seconds([0.1, 0.1, 9.0], [4.3, 4.3, 30.0], [0.5]),
        cpu.RouterSamples([50.0, 52.0, 1.0], [0.25], [170.0], [1.0], [0.1]),
        cpu.ChunkSamples([35.0], [1.0]),
        [0.5],
    )

    def test_lines(self) -> None:
        decode, prefill, batch, again, chunk_cpu, help_time = cpu.table_lines(self.results)
        assert decode.ratio == pytest.approx(50.0 / (63 / 4.2))
        assert prefill.ratio == pytest.approx(2.0)
        assert batch.ratio == pytest.approx(170.0 / (64 / 4.3))
        assert again.ratio == pytest.approx(10.0)
        assert chunk_cpu.met
        assert not help_time.met

    def test_markdown(self) -> None:
        text = cpu.markdown(cpu.table_lines(self.results))
        assert "| decode, one stream | 15.0 tok/s | 50.0 tok/s | 3.33× | ≥ 2.5× | yes |" in text
        assert "| ≤ 0.4 s | **no** |" in text
        assert len({line.count("|") for line in text.splitlines()}) == 1

    def test_left_out_parts_have_no_line(self) -> None:
        empty = cpu.Results(Seconds([], [], []), cpu.RouterSamples(), cpu.ChunkSamples())
        assert cpu.table_lines(empty) == []

    def test_decode_rate_counts_tokens_not_events(self) -> None:
        assert cpu.decode_rate(GOOD) == pytest.approx(2.0)
        with pytest.raises(RuntimeError):
            cpu.decode_rate(row())

    def test_baseline_times_each_repetition(self) -> None:
        asked: list[tuple[int, int]] = []
        task = Task("", "", 2, [1, 2], 64, 2, [[1] * 512])
        seconds = time_all(task, lambda prompt, count: asked.append((len(prompt), count)))
        assert asked == [(2, 4), (2, 1), (2, 64), (2, 1), (2, 64), (512, 1)]
        assert (len(seconds.first_s), len(seconds.decode_s), len(seconds.prefill_s)) == (2, 2, 1)

    def test_cpu_seconds(self) -> None:
        before = cpu.cpu_seconds(os.getpid())
        sum(random.random() for _ in range(1_000_000))
        assert cpu.cpu_seconds(os.getpid()) > before

    def test_prompt_is_37_tokens(self) -> None:
        assert len(cpu.DECODE_PROMPT) == 37

    def test_usage(self) -> None:
        assert cpu.main(["--only", "nonsense"]) == 64


def test_imports_no_torch() -> None:
    code = (
        "import sys, bench.serve, bench.cpu, bench.drive; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_the_cost_of_grammars_is_measured(tmp_path: Path) -> None:
    demo_model()
    words = ["--streams", "2", "--tokens", "4", "--rounds", "1", "--save", str(tmp_path / "s.json")]
    assert structured.main(words) in (0, 1)  # how much it is says little here
    found = json.loads((tmp_path / "s.json").read_text())
    assert (len(found["free"]), len(found["bound"])) == (1, 1)
    assert found["free"][0]["tokens"] == found["bound"][0]["tokens"] == 6


def test_the_largest_gap_that_touches_a_time() -> None:
    streams = [[0.0, 1.0, 1.1, 5.0], [0.0, 0.5, 1.2]]
    assert edges.largest_gap_ms(streams, 0.2, 0.9) == pytest.approx(1000)
    assert edges.largest_gap_ms(streams, 1.05, 2.0) == pytest.approx(3900)
    with pytest.raises(RuntimeError):
        edges.largest_gap_ms(streams, 6.0, 7.0)


def test_every_absurd_request_is_json_or_meant_not_to_be() -> None:
    for name, make in edges.CASES.items():
        path, body = make()
        assert path.startswith("/v1/")
        assert len(body) < 32 * 2**20
        assert "brackets" in name or msgspec.json.decode(body, type=dict[str, msgspec.Raw])
