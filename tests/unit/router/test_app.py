"""The HTTP API in one process: real routes, fleet, flow and text over scripted engines.

Numbers in test names are cases of the project's API corpus.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from router.api.http import MAX_BODY_BYTES
from router.streams import WakeUp
from router.waiting import FlowSettings
from tests.router_parts import (
    MAX_LEN,
    MODEL,
    Answer,
    Play,
    Router,
    call,
    chat,
    complete,
    router_parts,
    text_play,
)
from tests.router_process import until
from tools.tiny_model import VOCAB_SIZE, encode_text, write_tiny_model

EMOJI = [[token] for token in encode_text("😊")]


def plays(prompt: str) -> Play:
    """Scenes by a word anywhere in the prompt."""
    scenes = {
        "emoji": Play(EMOJI),
        "stopstring": text_play("ABC", "DEF", "G", "HI", "J", "K"),
        "blanks": text_play("a  ", "  b"),
        "end at once": Play([]),
        "breaks": Play([encode_text("abc")], error="/secret/path.py"),
        "broken": Play([], error="/secret/path.py"),
        "hangs": Play([encode_text("abc")], waits=True),
        "silent": Play([], waits=True),
        "dies": Play([encode_text(t) for t in ("ab", "cd", "ef")], dies_at=3),
        "long": Play([encode_text("x") for _ in range(MAX_LEN)], stop=False),
    }
    for word, play in scenes.items():
        if word in prompt:
            return play
    return text_play("Hel", "lo ", "wörld")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / MODEL)


@pytest_asyncio.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays, replicas=2) as parts:
        yield parts


def content(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    return answer.json()["choices"][0]["message"]["content"]


def joined(answer: Answer, index: int = 0) -> str:
    """The text of one choice of a stream of either route."""
    assert answer.status == 200, answer.body
    assert answer.ended
    choices = [c for event in answer.events() for c in event["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def error(answer: Answer) -> dict[str, Any]:
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert len(answer.body) < 8192
    assert not any(word in answer.body for word in (b"Traceback", b".py", b"msgspec", b"secret"))
    return body["error"]


# -- shape of the answers


async def test_whole_chat(router: Router) -> None:
    answer = (await chat(router.app)).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["system_fingerprint"].startswith("fp_")
    message = {"role": "assistant", "content": "Hello wörld", "refusal": None}
    assert answer["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len("Hello wörld".encode()) + 1  # 033: end token included


async def test_streamed_chat_028_030_043_069(router: Router) -> None:
    answer = await chat(router.app, stream=True, stream_options={"include_usage": True})
    events = answer.events()
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert {(e["id"], e["object"], e["model"]) for e in events} == {
        (events[0]["id"], "chat.completion.chunk", MODEL)
    }
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in e["choices"][0]["delta"] for e in events[1:-1])
    reasons = [e["choices"][0]["finish_reason"] for e in events[:-1]]
    assert reasons == [None] * (len(events) - 2) + ["stop"]
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == (await chat(router.app)).json()["usage"]
    assert joined(answer) == "Hello wörld"


async def test_one_wake_up_and_one_write_per_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[WakeUp] = []

    async def counted(self: WakeUp, wait: Any = WakeUp.wait) -> None:
        waits.append(self)
        await wait(self)

    monkeypatch.setattr(WakeUp, "wait", counted)
    text = "abcdefghij"
    async with router_parts(folder, lambda _prompt: text_play(*text)) as parts:
        answer = await complete(parts.app, stream=True)
    assert joined(answer) == text
    assert len(waits) <= len(text) + 1  # and the end
    texts = [part for part in answer.parts if b'"text":"' in part]
    assert [part.count(b"data: ") for part in texts] == [1] * (len(text) - 1) + [3]
    assert answer.parts[-1] == texts[-1]  # the last token, the finish and [DONE]


@pytest.mark.parametrize(("length", "events"), [(2, 2), (15, 15), (16, 8), (100, 15)])
async def test_tokens_that_come_together_are_events_of_one_write(
    folder: Path, length: int, events: int
) -> None:
    text = "x" * length
    async with router_parts(folder, lambda _prompt: text_play(text)) as parts:
        answer = await complete(parts.app, stream=True, max_tokens=200)
    assert joined(answer) == text
    (written,) = [part for part in answer.parts if b'"text":"x' in part]
    assert written.count(b'"text":"x') == events  # of at most 16 pieces, end token included


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
async def test_no_usage_unless_asked_029_035_067(router: Router, options: Any) -> None:
    for answer in (
        await chat(router.app, stream=True, stream_options=options),
        await complete(router.app, stream=True, stream_options=options),
    ):
        assert all("usage" not in event and event["choices"] for event in answer.events())


async def test_completion(router: Router) -> None:
    answer = (await complete(router.app)).json()
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", "Hello wörld")
    assert answer["usage"]["prompt_tokens"] == 2
    streamed = await complete(router.app, stream=True)
    assert joined(streamed) == "Hello wörld"
    assert {event["object"] for event in streamed.events()} == {"text_completion"}


async def test_n_choices_061_062_063_064(router: Router) -> None:
    answer = await chat(router.app, n=3, stream=True)
    events = answer.events()
    assert [e["choices"][0]["index"] for e in events[:3]] == [0, 1, 2]
    assert all(e["choices"][0]["delta"]["role"] == "assistant" for e in events[:3])
    assert [joined(answer, index) for index in range(3)] == ["Hello wörld"] * 3
    whole = (await chat(router.app, n=3)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    one = (await chat(router.app)).json()["usage"]
    assert whole["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == 3 * one["completion_tokens"]


async def test_several_prompts_148(router: Router) -> None:
    answer = (await complete(router.app, ["emoji", "blanks"])).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "😊"), (1, "a    b")]
    assert answer["usage"]["prompt_tokens"] == len("emoji") + len("blanks")
    tokens = [encode_text("emoji"), encode_text("blanks")]
    assert [c["text"] for c in (await complete(router.app, tokens)).json()["choices"]] == [
        "😊",
        "a    b",
    ]


async def test_token_prompt_150(router: Router) -> None:
    answer = (await complete(router.app, [80, 81, 82], return_token_ids=True)).json()
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["choices"][0]["prompt_token_ids"] == [80, 81, 82]
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


async def test_streamed_token_ids(router: Router) -> None:
    whole = (await chat(router.app, return_token_ids=True)).json()
    events = (await chat(router.app, return_token_ids=True, stream=True)).events()
    told = [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event]
    assert told == [whole["prompt_token_ids"]]
    ids = [token for event in events for token in event["choices"][0].get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]


# -- text


@pytest.mark.parametrize("scene", ["emoji", "blanks", "end at once", "plain"])
async def test_streams_equal_whole_answers_001_004_008(router: Router, scene: str) -> None:
    streamed = await chat(router.app, scene, stream=True)
    assert joined(streamed) == content(await chat(router.app, scene))
    assert "\ufffd" not in streamed.body.decode()
    assert all(event["choices"][0]["delta"] != {"content": ""} for event in streamed.events()[1:])


@pytest.mark.parametrize("length", range(1, 12))
async def test_cut_anywhere_both_ways_agree(router: Router, length: int) -> None:
    streamed = await complete(router.app, "plain", stream=True, max_tokens=length)
    whole = (await complete(router.app, "plain", max_tokens=length)).json()
    assert joined(streamed) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == length
    assert whole["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["DEFGHIJ"], "ABC"),
        (["J", "DEFG"], "ABC"),
        (["DEFG", "J"], "ABC"),
        ("HI", "ABCDEFG"),
        (["C", ""], "AB"),
        ([], "ABCDEFGHIJK"),
        ("", "ABCDEFGHIJK"),
        (None, "ABCDEFGHIJK"),
    ],
)
async def test_stop_strings_012_016_017_025(router: Router, stop: Any, text: str) -> None:
    whole = (await complete(router.app, "stopstring", stop=stop)).json()["choices"][0]
    assert (whole["text"], whole["finish_reason"]) == (text, "stop")
    assert joined(await complete(router.app, "stopstring", stop=stop, stream=True)) == text


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_in_the_output_023(router: Router, stream: bool) -> None:
    fields = {"stop": "FG", "include_stop_str_in_output": True, "stream": stream}
    answer = await complete(router.app, "stopstring", **fields)
    text = joined(answer) if stream else answer.json()["choices"][0]["text"]
    assert text == "ABCDEFG"


async def test_stop_token_019(router: Router) -> None:
    answer = await complete(router.app, "plain", stop_token_ids=[77], ignore_eos=True)
    assert router.engines.submits[-1].stop_ids == (77,)
    assert answer.json()["choices"][0]["text"] == "Hello wörld"  # token 77 is "=", and not shown
    await complete(router.app, "plain", stop_token_ids=[77])
    assert router.engines.submits[-1].stop_ids == (2, 5, 77)


async def test_overrun_does_not_count_026(router: Router) -> None:
    answer = (await complete(router.app, "stopstring", stop="D")).json()
    assert answer["usage"]["completion_tokens"] == len("ABCD")
    await asyncio.sleep(0)
    assert router.engines.aborted == [1]


async def test_special_tokens_by_wish(router: Router) -> None:
    answer = await complete(
        router.app, "plain", skip_special_tokens=False, include_stop_str_in_output=True
    )
    assert answer.json()["choices"][0]["text"] == "Hello wörld</s>"


# -- logprobs


async def test_chat_logprobs_045_047_051_056(router: Router) -> None:
    fields = {"logprobs": True, "top_logprobs": 20}
    whole = (await chat(router.app, "emoji", **fields)).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "😊"
    assert entries[0]["token"] == "bytes:\\xf0"
    assert all(len(entry["top_logprobs"]) == 20 for entry in entries)
    assert all(entry["token"] for entry in entries)
    streamed = (await chat(router.app, "emoji", stream=True, **fields)).events()
    choices = [event["choices"][0] for event in streamed]
    told = [e for choice in choices if choice["logprobs"] for e in choice["logprobs"]["content"]]
    assert told == entries
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]


async def test_completion_logprobs_058_059(router: Router) -> None:
    whole = (await complete(router.app, logprobs=1)).json()
    logprobs = whole["choices"][0]["logprobs"]
    assert {len(column) for column in logprobs.values()} == {
        whole["usage"]["completion_tokens"] - 1
    }
    assert "".join(logprobs["tokens"][:6]) == "Hello "
    assert logprobs["text_offset"][:4] == [0, 1, 2, 3]
    events = (await complete(router.app, logprobs=1, stream=True)).events()
    parts = [c["logprobs"] for event in events if (c := event["choices"][0])["logprobs"]]
    for name, column in logprobs.items():
        assert [value for part in parts for value in part[name]] == column


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_052_054(router: Router, max_tokens: int, stream: bool) -> None:
    answer = await complete(
        router.app, "The step of", echo=True, logprobs=1, max_tokens=max_tokens, stream=stream
    )
    if stream:
        choices = [event["choices"][0] for event in answer.events()]
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        logprobs = {key: [v for part in parts for v in part[key]] for key in parts[0]}
        text, finish = joined(answer), choices[-1]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        logprobs, text, finish = choice["logprobs"], choice["text"], choice["finish_reason"]
        assert answer.json()["usage"]["completion_tokens"] == max_tokens
    assert text == "The step of" + "H" * max_tokens
    assert {len(column) for column in logprobs.values()} == {len("The step of") + max_tokens}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert None not in logprobs["token_logprobs"][1:]
    assert logprobs["text_offset"] == list(range(len(text)))
    assert finish == "length"


async def test_echo_without_logprobs(router: Router) -> None:
    answer = await complete(router.app, ["a b", "emoji"], echo=True, n=2)
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts == ["a bHello wörld"] * 2 + ["emoji😊"] * 2
    tokens = encode_text("a b")
    assert joined(await complete(router.app, tokens, echo=True, stream=True)) == "a bHello wörld"


# -- what is refused


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 1_000_000}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 2.1}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 21}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 512}, "truncate_prompt_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": ["x"] * 33}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"logit_bias": {"AI": -100}}, "logit_bias"),
        ({"logit_bias": {"9999999": -100}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
        ({"priority": 2**31}, "priority"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"bad_words": ["x"]}, "bad_words"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_values_114_124_126_127_156_217(
    router: Router, change: dict[str, Any], param: str, stream: bool
) -> None:
    if param == "stream_options" and stream:
        pytest.skip("allowed")
    for answer in (
        await chat(router.app, stream=stream, **change),
        await complete(router.app, stream=stream, **change),
    ):
        assert answer.status == 400
        assert error(answer)["type"] == "invalid_request_error"
        assert error(answer)["param"] == param
    assert not router.engines.submits
    assert content(await chat(router.app)) == "Hello wörld"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "banana", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            "messages[0].content[1].type",
        ),
    ],
)
async def test_bad_messages_135_203_209(router: Router, messages: Any, param: str) -> None:
    answer = await chat(router.app, messages=messages)
    assert (answer.status, error(answer)["param"]) == (400, param)


@pytest.mark.parametrize(
    "change",
    [
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": -1, "logprobs": True},
        {"top_logprobs": 2},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"messages": []}},
    ],
)
async def test_bad_chat_switches_211(router: Router, change: dict[str, Any]) -> None:
    answer = await chat(router.app, **change)
    assert (answer.status, error(answer)["param"] in change) == (400, True)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        [],
        [[]],
        "",
        [""],
        [-1],
        [VOCAB_SIZE],
        [5279552648203111001],
        [2**70],
        [1, "a"],
        [[1], "a"],
        [1.5],
        [True],
        {},
        5,
        ["a"] * 1025,
    ],
)
async def test_bad_prompts_145_146_147(router: Router, prompt: Any) -> None:
    answer = await complete(router.app, prompt)
    assert (answer.status, error(answer)["param"]) == (400, "prompt")


async def test_too_many_sequences(router: Router) -> None:
    answer = await complete(router.app, ["a"] * 100, n=100)
    assert (answer.status, error(answer)["param"]) == (400, "n")


async def test_a_text_far_too_long_is_not_even_tokenized(router: Router) -> None:
    for answer in (await complete(router.app, "x" * 10**6), await chat(router.app, "x" * 10**6)):
        assert (answer.status, error(answer)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("stream", [False, True])
async def test_context_138_139_142(router: Router, stream: bool) -> None:
    for answer, param in (
        (await complete(router.app, "x" * MAX_LEN, stream=stream), "prompt"),
        (await chat(router.app, "x" * MAX_LEN, stream=stream), "messages"),
    ):
        assert answer.status == 400
        assert error(answer)["code"] == "context_length_exceeded"
        assert error(answer)["param"] == param
        assert str(MAX_LEN) in error(answer)["message"]


async def test_max_tokens_is_clamped_141_144(router: Router) -> None:
    await complete(router.app, "x" * 256, max_tokens=65535)
    assert router.engines.submits[-1].max_new == MAX_LEN - 256
    await chat(router.app, max_completion_tokens=5, max_tokens=50)
    assert router.engines.submits[-1].max_new == 5
    await complete(router.app)
    assert router.engines.submits[-1].max_new == 16
    answer = await chat(router.app, "long")
    assert answer.json()["usage"]["total_tokens"] == MAX_LEN


async def test_unknown_model_118(router: Router) -> None:
    answer = await chat(router.app, model="nope")
    assert (answer.status, error(answer)["code"]) == (404, "model_not_found")
    assert error(answer)["param"] == "model"
    assert f"{MODEL}, a/b" in error(answer)["message"]
    assert "nope" not in error(answer)["message"]


async def test_every_name_works(router: Router) -> None:
    assert (await chat(router.app, model="a/b")).json()["model"] == "a/b"


async def test_no_template_204(folder: Path) -> None:
    async with router_parts(folder, plays, with_template=False) as router:
        answer = await chat(router.app)
        assert (answer.status, error(answer)["code"]) == (400, "chat_template_missing")
        assert (await complete(router.app)).status == 200


# -- what is accepted


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0},
        {"top_p": 0},
        {"top_p": 1.0},
        {"n": 1, "best_of": 1},
        {"n": 2, "best_of": 2},
        {"top_k": -1},
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"seed": -(2**63)},
        {"extra_body": {"top_k": 1}},
        {"response_format": {"type": "text"}, "tool_choice": "none", "tools": []},
        {"seed": None, "stop": None, "logprobs": None, "tools": None, "stream_options": None},
    ],
)
async def test_good_values_131_132_192_194_197(router: Router, change: dict[str, Any]) -> None:
    assert content(await chat(router.app, **change)) == "Hello wörld"


@pytest.mark.parametrize("change", [{"temperature": 0}, {"top_p": 0}, {"temperature": 0.0001}])
async def test_greedy_wishes_155(router: Router, change: dict[str, Any]) -> None:
    await chat(router.app, **change)
    assert router.engines.submits[-1].sampling.temperature == 0


async def test_sampling_reaches_the_engine(router: Router) -> None:
    await complete(
        router.app,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"20": 1, "19": -2.5},
        seed=11,
        min_tokens=3,
        logprobs=2,
        echo=True,
        priority=4,
        cache_salt="s",
    )
    submit = router.engines.submits[-1]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 1, -1)
    assert (sampling.repetition_penalty, sampling.seed, sampling.min_new) == (1.5, 11, 3)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (2, 2)
    assert sampling.logit_bias == ((19, -2.5), (20, 1))
    assert (submit.priority, submit.salt) == (4, b"s")


async def test_without_a_seed_one_is_drawn_153(router: Router) -> None:
    for _ in range(4):
        await chat(router.app)
    seeds = [submit.sampling.seed for submit in router.engines.submits]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_content_parts_207(router: Router) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answers = [
        (await chat(router.app, messages=[{"role": "user", "content": content}])).json()["usage"]
        for content in (parts, "a\nb")
    ]
    assert answers[0]["prompt_tokens"] == answers[1]["prompt_tokens"]
    assert router.engines.submits[0].tokens == router.engines.submits[1].tokens


async def test_roles_and_histories_202_210(router: Router) -> None:
    user = {"role": "user", "content": "hi"}
    for messages in (
        [{"role": "developer", "content": "x"}, user],
        [user, {"role": "assistant", "content": "ok"}],
        [user, {"role": "assistant", "content": None, "tool_calls": []}, user],
        [user, {"role": "tool", "content": "42", "tool_call_id": "c"}],
    ):
        assert (await chat(router.app, messages=messages)).status == 200


async def test_continue_final_message(router: Router) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I sa"}]
    body = {"model": MODEL, "messages": messages, "continue_final_message": True}
    tokens = (await call(router.app, "POST", "/tokenize", body)).json()["tokens"]
    assert tokens[-4:] == encode_text("I sa")
    await chat(router.app, messages=messages, continue_final_message=True)
    assert len(router.engines.submits[-1].tokens) == 4 * len(tokens)


async def test_special_tokens_in_content_are_text_205(router: Router) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "<|im_end|><|im_start|>"}]}
    tokens = (await call(router.app, "POST", "/tokenize", body)).json()["tokens"]
    assert [token for token in tokens if token < 16] == [4, 5, 4]


# -- failures of the engine


async def test_an_error_before_the_headers_068_116(router: Router) -> None:
    for stream in (False,):
        answer = await chat(router.app, "broken", stream=stream)
        assert (answer.status, error(answer)["code"]) == (500, "internal_error")


async def test_an_error_in_the_stream_214_215(router: Router) -> None:
    answer = await chat(router.app, "breaks", stream=True)
    assert (answer.status, answer.ended) == (200, True)
    events = answer.events()
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in answer.body.decode()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_death_is_not_seen_240(router: Router, stream: bool) -> None:
    answer = await chat(router.app, "dies", stream=stream)
    assert (joined(answer) if stream else content(answer)) == "abcdef"
    assert router.engines.deaths


async def test_time_limit(folder: Path) -> None:
    async with router_parts(folder, plays, settings=FlowSettings(request_timeout_s=0.1)) as router:
        answer = await chat(router.app, "silent")
        assert (answer.status, error(answer)["code"]) == (504, "request_timeout")
        streamed = await chat(router.app, "hangs", stream=True)
        assert streamed.events()[-1]["error"]["code"] == "request_timeout"
        assert streamed.ended
        assert not router.engines.running


async def test_overload_176(folder: Path) -> None:
    settings = FlowSettings(max_concurrency=1, ping_s=0.02)
    async with router_parts(folder, plays, settings=settings, max_queue=0) as router:
        first = asyncio.ensure_future(
            call(
                router.app,
                "POST",
                "/v1/completions",
                {"model": MODEL, "prompt": "hangs", "stream": True},
                leave_after=4,
            )
        )
        await asyncio.sleep(0.01)
        refused = await chat(router.app)
        assert (refused.status, error(refused)["code"]) == (503, "server_is_overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        await first
        assert (await chat(router.app)).status == 200


async def test_comments_while_nothing_comes_216(folder: Path) -> None:
    async with router_parts(folder, plays, settings=FlowSettings(ping_s=0.01)) as router:
        body = {"model": MODEL, "prompt": "silent", "stream": True}
        answer = await call(router.app, "POST", "/v1/completions", body, leave_after=4)
        assert answer.parts == [b": ping\n\n"] * 4


async def test_a_stream_in_the_queue_216(folder: Path) -> None:
    settings = FlowSettings(ping_s=0.01, max_concurrency=1)
    body = {"model": MODEL, "prompt": "hangs", "stream": True}
    async with router_parts(folder, plays, settings=settings) as router:
        holder = asyncio.ensure_future(
            call(router.app, "POST", "/v1/completions", body, leave_after=40)
        )
        await until(lambda: router.admission.views()[0].used == 1)
        queued = asyncio.ensure_future(chat(router.app, stream=True))
        whole = asyncio.ensure_future(chat(router.app))
        await asyncio.sleep(0.05)
        # a stream's headers are out: what fails is an event (P9); a whole answer's are not
        router.admission.evict("The server is stopping.")
        answer = await queued
        assert answer.status == 200
        assert answer.ended
        assert answer.parts.count(b": ping\n\n") >= 1
        assert answer.events()[-1]["error"]["code"] == "server_is_overloaded"
        assert ((await whole).status, error(await whole)["code"]) == (503, "server_is_overloaded")
        await holder


# -- clients that leave


@pytest.mark.parametrize("leave_after", [0, 1, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_lost_clients_171_172(router: Router, stream: bool, leave_after: int) -> None:
    if not stream and leave_after:
        pytest.skip("a whole answer comes in one part")
    body = {"model": MODEL, "prompt": "hangs", "stream": stream, "n": 2}
    await call(router.app, "POST", "/v1/completions", body, leave_after=leave_after)
    assert len(router.engines.aborted) == 2
    assert (len(router.table), router.admission.active) == (0, 0)


# -- bodies


@pytest.mark.parametrize(
    ("headers", "raw", "status", "code"),
    [
        ({"content-type": "application/x-www-form-urlencoded"}, b"{}", 415, None),
        ({"content-type": "text/plain"}, b"{}", 415, None),
        ({"content-encoding": "gzip"}, b"\x1f\x8b", 415, None),
        ({}, b'{"model": "m",', 400, "invalid_json"),
        ({}, b"[]", 400, None),
        ({"content-length": "99999999999999999999"}, b"{}", 413, "request_too_large"),
        ({"content-length": "-1"}, b"{}", 400, None),
        ({}, b'{"model":"tiny","prompt":"\\ud83d x"}', 400, "invalid_json"),
    ],
)
async def test_bodies_183_184_185_186_187(
    router: Router, headers: dict[str, str], raw: bytes, status: int, code: str | None
) -> None:
    answer = await call(router.app, "POST", "/v1/completions", headers=headers, raw=raw)
    assert answer.status == status
    assert code is None or error(answer)["code"] == code
    assert b"\x1f" not in answer.body


async def test_body_limit_189(router: Router) -> None:
    answer = await call(router.app, "POST", "/v1/completions", raw=b" " * (MAX_BODY_BYTES + 1))
    assert (answer.status, error(answer)["code"]) == (413, "request_too_large")


# -- routes


async def test_models(router: Router) -> None:
    listed = (await call(router.app, "GET", "/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == [MODEL, "a/b"]
    assert all(model["max_model_len"] == MAX_LEN for model in listed["data"])
    one = await call(router.app, "GET", "/v1/models/a/b")
    assert one.json() == listed["data"][1]
    assert (await call(router.app, "GET", "/v1/models/no")).status == 404


async def test_tokens(router: Router) -> None:
    async def post(path: str, **fields: Any) -> Answer:
        return await call(router.app, "POST", path, {"model": MODEL, **fields})

    answer = (await post("/tokenize", prompt="<s>é", return_token_strs=True)).json()
    assert answer == {
        "count": 3,
        "max_model_len": MAX_LEN,
        "tokens": [1, *encode_text("é")],
        "token_strs": ["<s>", "\ufffd", "\ufffd"],
    }
    plain = (await post("/tokenize", prompt="<s>", parse_special=False)).json()
    assert plain["tokens"] == encode_text("<s>")
    assert (await post("/detokenize", tokens=[1, *encode_text("é")])).json() == {"prompt": "<s>é"}
    for bad in ([-1], [VOCAB_SIZE], [2**70]):
        assert error(await post("/detokenize", tokens=bad))["param"] == "tokens"
    assert error(await post("/tokenize"))["param"] == "prompt"
    unnamed = await call(router.app, "POST", "/tokenize", {"prompt": "a"})
    assert unnamed.json()["tokens"] == encode_text("a")
    other = await call(router.app, "POST", "/tokenize", {"prompt": "a", "model": "nope"})
    assert error(other)["code"] == "model_not_found"


async def test_models_for_anthropics_clients(router: Router) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    listed = (await call(router.app, "GET", "/v1/models", headers=headers)).json()
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, MODEL, "a/b")
    first = {
        "type": "model",
        "id": MODEL,
        "display_name": MODEL,
        "created_at": "2023-11-14T22:13:20Z",
    }
    assert listed["data"][0] == first
    one = await call(router.app, "GET", f"/v1/models/{MODEL}", headers=headers)
    assert one.json() == first
    missing = await call(router.app, "GET", "/v1/models/no", headers=headers)
    assert (missing.status, missing.json()["type"]) == (404, "error")


async def test_tokenizer_info(router: Router) -> None:
    for query in (b"", b"model=tiny&x=1", b"model=a%2Fb"):
        answer = await call(router.app, "GET", "/tokenizer_info", query=query)
        told = answer.json()
        assert told["model"] == MODEL
        body = {"prompt": told["eos_token"], "add_special_tokens": False}  # as lm-eval asks
        (eos_id,) = (await call(router.app, "POST", "/tokenize", body)).json()["tokens"]
        assert eos_id in router.model.tokenizer.eos_ids
        assert (told["vocab_size"], told["model_max_length"]) == (VOCAB_SIZE, MAX_LEN)
        assert told["has_chat_template"]
        assert told["chat_template"] is None
    answer = await call(router.app, "GET", "/tokenizer_info", query=b"model=other")
    assert (answer.status, error(answer)["code"]) == (404, "model_not_found")


async def test_tokens_of_a_conversation_with_tools(router: Router) -> None:
    """Case 084: the call's name and its result are in the prompt."""
    call_of = {"id": "c", "type": "function", "function": {"name": "get_sum", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call_of]},
        {"role": "tool", "tool_call_id": "c", "content": "forty-two"},
    ]
    tools = [{"type": "function", "function": {"name": "get_time"}}]
    body = {"model": MODEL, "messages": messages, "tools": tools}
    answer = await call(router.app, "POST", "/tokenize", body)
    text = router.model.tokenizer.decode(answer.json()["tokens"])
    assert all(part in text for part in ("get_sum", "forty-two", "get_time"))
    del messages[1]["content"]
    again = await call(router.app, "POST", "/tokenize", body)
    assert again.json() == answer.json()
    wrong = {**body, "tools": [{"type": "function", "function": {"name": "a b"}}]}
    refused = error(await call(router.app, "POST", "/tokenize", wrong))
    assert refused["param"] == "tools[0].function.name"


async def test_health_and_metrics(router: Router) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/health/started"):
        assert (await call(router.app, "GET", path)).status == 200
    await chat(router.app)
    text = (await call(router.app, "GET", "/metrics")).body.decode()
    assert (
        f'router_requests_total{{model="{MODEL}",route="/v1/chat/completions",status="200"}}'
        in text
    )
    assert f'router_generation_tokens_total{{model="{MODEL}"}} 13.0' in text
    assert (await call(router.app, "GET", "/version")).json()["version"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/completions/", 200),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("OPTIONS", "/v1/models", 405),
        ("GET", "/nowhere", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/../v1/models", 404),
        ("HEAD", "/health", 200),
    ],
)
async def test_routes_113_228(router: Router, method: str, path: str, status: int) -> None:
    body = {"model": MODEL, "prompt": "x"} if method == "POST" else None
    answer = await call(router.app, method, path, body)
    assert answer.status == status
    if status >= 400:
        error(answer)
    if status == 405:
        assert answer.headers["allow"]


async def test_request_ids_225_227(router: Router) -> None:
    headers = {"x-request-id": "abc-1"}
    body = {"model": MODEL, "prompt": "x"}
    answers = [
        await call(router.app, "POST", "/v1/completions", body, headers=headers) for _ in range(2)
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == ["abc-1"] * 2
    assert answers[0].json()["id"] != answers[1].json()["id"]
    for bad in ("x" * 129, "é", "a\x01", ""):
        answer = await call(router.app, "GET", "/nowhere", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"] != bad
        assert answer.headers["x-request-id"].startswith("req-")


async def test_a_bug_is_a_500_with_nothing_inside(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError("/secret/file.py")

    monkeypatch.setattr(router.flow, "check_room", bug)
    answer = await chat(router.app)
    assert (answer.status, error(answer)["code"]) == (500, "internal_error")


# -- keys

KEYS = tuple(hashlib.sha256(key).digest() for key in (b"first", b"second"))
PATHS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/tokenizer_info"),
    ("GET", "/version"),
    ("GET", "/nowhere"),
    ("GET", "//health"),
    ("GET", "/v1/models/../../health"),
    ("OPTIONS", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("GET", "/v1/completions"),
]


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", "Basic first", "Bearer \xff", "first"]
)
@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_no_path_without_a_key_222(
    folder: Path, method: str, path: str, authorization: str | None
) -> None:
    async with router_parts(folder, plays, keys=KEYS) as router:
        headers = {} if authorization is None else {"authorization": authorization}
        answer = await call(router.app, method, path, {}, headers=headers)
        assert (answer.status, error(answer)["code"]) == (401, "invalid_api_key")


async def test_keys_open_and_tenants_are_apart(folder: Path) -> None:
    async with router_parts(folder, plays, keys=KEYS) as router:
        body = {"model": MODEL, "prompt": "x", "cache_salt": "s"}
        for key in ("first", "first", "second"):
            headers = {"authorization": f"bearer {key}"}
            answer = await call(router.app, "POST", "/v1/completions", body, headers=headers)
            assert answer.status == 200
        one, same, other = (submit.salt for submit in router.engines.submits)
        assert one == same != other
        assert one.endswith(b"s")
        assert (await call(router.app, "GET", "/health")).status == 200


async def test_a_long_answer_is_the_same_from_a_thread(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"n": 2, "logprobs": True, "top_logprobs": 2, "seed": 1}
    short = (await chat(router.app, **fields)).json()
    monkeypatch.setattr("router.api.answer.LOOP_ITEMS", 10)
    long = (await chat(router.app, **fields)).json()
    assert long["choices"] == short["choices"]
