"""One request's life over scripted engines: what it yields, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine import protocol
from engine.protocol import NO_MEMORY, Sampling
from router.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InsufficientMemory,
    Overloaded,
    Quarantined,
    RequestTimeout,
)
from router.flow import Job, Progress, choice_seed
from router.record import RequestRecord
from router.text.assembly import TextRules
from router.text.stops import StopStrings
from router.waiting import FlowSettings
from tests.router_parts import MAX_LEN, Play, Router, router_parts, token_logprob
from tools.tiny_model import EOS_ID, IM_END_ID, encode_text, write_tiny_model

STEPS = ("Hel", "lo", " wor", "ld")


def plays(prompt: str) -> Play:
    """The prompt's first word names the scene."""
    steps = [encode_text(text) for text in STEPS]
    scenes = {
        "plain": Play(steps),
        "length": Play(steps, stop=False),
        "dies-early": Play(steps, dies_at=0),
        "dies-late": Play(steps, dies_at=6),
        "dies-always": Play(steps, dies_at=2, deaths=99),
        "error": Play(steps[:1], error="secret detail"),
        "no-memory": Play(steps[:1], error=NO_MEMORY),
        "error-at-once": Play([], error="secret detail"),
        "waits": Play(steps[:1], waits=True),
        "never": Play([], waits=True),
    }
    return scenes[prompt.split()[0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest_asyncio.fixture
async def router(folder: Path) -> AsyncIterator[Router]:
    async with router_parts(folder, plays, replicas=2) as parts:
        yield parts


def job(router: Router, *prompts: str, n: int = 1, max_new: int | None = 100, **more: Any) -> Job:
    stop: tuple[str, ...] = more.pop("stop", ())
    logprobs: int = more.pop("logprobs", -1)
    rules = TextRules(
        pieces=router.model.tokenizer.pieces(),
        stops=StopStrings(stop) if stop else None,
        stop_ids=frozenset((EOS_ID, IM_END_ID)),
        logprobs=logprobs >= 0,
    )
    return Job(
        record=RequestRecord("r1", asyncio.get_running_loop().time()),
        model=router.model,
        prompts=tuple(encode_text(prompt) for prompt in prompts),
        n=n,
        max_new=max_new,
        grammar=more.pop("grammar", ""),
        sampling=Sampling(seed=7, logprobs=logprobs, **more),
        rules=rules,
    )


async def run(router: Router, wanted: Job) -> list[Progress]:
    return [progress async for step in router.flow.generate(wanted) for progress in step]


@asynccontextmanager
async def occupied(folder: Path, **more: Any) -> AsyncIterator[Router]:
    """One engine with room for one request, which one has that never ends."""
    limits = {name: more.pop(name) for name in list(more) if name.endswith("_timeout_s")}
    settings = FlowSettings(max_concurrency=1, **limits)
    async with (
        router_parts(folder, plays, settings=settings, **more) as parts,
        aclosing(parts.flow.generate(job(parts, "waits"))) as steps,
    ):
        assert await anext(steps) == []
        yield parts


def text_of(steps: list[Progress], choice: int = 0) -> str:
    return "".join(step.piece.text for step in steps if step.choice == choice)


async def test_plain(router: Router) -> None:
    wanted = job(router, "plain")
    steps = await run(router, wanted)
    assert text_of(steps) == "Hello world"
    assert [step.piece.finish for step in steps] == [None] * (len(steps) - 1) + ["stop"]
    assert [step.first is not None for step in steps] == [True] + [False] * (len(steps) - 1)
    record = wanted.record
    assert (record.prompt_tokens, record.completion_tokens, record.finish) == (5, 12, "stop")
    assert record.ttft_s is not None
    assert record.queue_s is not None
    assert not router.engines.running


async def test_first_item_says_that_it_is_placed(router: Router) -> None:
    async with aclosing(router.flow.generate(job(router, "waits"))) as steps:
        assert await anext(steps) == []
        assert len(router.engines.submits) == 1


async def test_choices_and_prompts_have_their_indexes(router: Router) -> None:
    steps = await run(router, job(router, "plain", "length", n=3))
    assert {step.choice for step in steps} == set(range(6))
    assert all(text_of(steps, choice) == "Hello world" for choice in range(6))
    ends = {step.choice: step.piece.finish for step in steps if step.piece.finish}
    assert ends == {0: "stop", 1: "stop", 2: "stop", 3: "length", 4: "length", 5: "length"}
    seeds = [submit.sampling.seed for submit in router.engines.submits]
    assert seeds[:3] == seeds[3:] == [choice_seed(7, choice) for choice in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


async def test_max_new_is_clamped_to_the_context(router: Router) -> None:
    await run(router, job(router, "plain", max_new=None))
    await run(router, job(router, "plain", max_new=10**9, min_new=10**6))
    for submit in router.engines.submits:
        assert submit.max_new == MAX_LEN - len("plain")
        assert submit.sampling.min_new in (0, submit.max_new)


async def test_prompt_only(router: Router) -> None:
    wanted = job(router, "plain", max_new=0, logprobs=0, prompt_logprobs=0)
    steps = await run(router, wanted)
    assert [(step.piece.text, step.piece.tokens, step.piece.finish) for step in steps] == [
        ("", [], "length")
    ]
    first = steps[0].first
    assert first is not None
    assert first.prompt_logprobs is not None
    told = [known.logprob for known in first.prompt_logprobs]
    assert told == [token_logprob(token) for token in encode_text("lain")]
    assert wanted.record.completion_tokens == 0


async def test_stop_string_ends_the_engine_too(router: Router) -> None:
    wanted = job(router, "waits", stop=("el",))
    steps = await run(router, wanted)
    assert (text_of(steps), steps[-1].piece.finish) == ("H", "stop")
    assert router.engines.aborted == [router.engines.submits[0].id]
    assert wanted.record.completion_tokens == 3


async def test_lost_before_the_first_token_is_sent_again(router: Router) -> None:
    wanted = job(router, "dies-early")
    assert text_of(await run(router, wanted)) == "Hello world"
    assert [len(submit.tokens) // 4 for submit in router.engines.submits] == [10, 10]
    assert wanted.record.moves == 1


@pytest.mark.parametrize("stop", [(), ("wor",)])
async def test_lost_in_the_middle_goes_on_where_it_was(
    router: Router, stop: tuple[str, ...]
) -> None:
    undisturbed = await run(router, job(router, "plain", logprobs=1, stop=stop))
    wanted = job(router, "dies-late", logprobs=1, stop=stop)
    steps = await run(router, wanted)
    assert text_of(steps) == text_of(undisturbed)
    entries = [entry for step in steps for entry in step.piece.entries]
    assert entries == [entry for step in undisturbed for entry in step.piece.entries]
    again = router.engines.submits[-1]
    assert again.num_prompt == len("dies-late")
    assert protocol.unpack_tokens(again.tokens) == encode_text("dies-late" + "Hello ")
    assert again.max_new == 100 - len("Hello ")
    assert again.sampling.seed == 7


async def test_the_only_engine_is_waited_for(folder: Path) -> None:
    async with router_parts(folder, plays) as parts:
        assert text_of(await run(parts, job(parts, "dies-late"))) == "Hello world"
        assert [submit.epoch for submit in parts.engines.submits] == [1, 2]


async def test_two_deaths_are_enough(router: Router) -> None:
    with pytest.raises(Quarantined):
        await run(router, job(router, "dies-always"))
    assert len(router.engines.submits) == 2
    assert text_of(await run(router, job(router, "plain"))) == "Hello world"


@pytest.mark.parametrize("scene", ["error", "error-at-once"])
async def test_an_engine_error_tells_no_details(router: Router, scene: str) -> None:
    with pytest.raises(EngineFailed) as caught:
        await run(router, job(router, scene))
    assert "secret" not in caught.value.message


async def test_one_failed_choice_ends_them_all(router: Router) -> None:
    with pytest.raises(EngineFailed):
        await run(router, job(router, "waits", "error"))
    assert not router.engines.running


async def test_a_client_that_leaves_frees_everything(router: Router) -> None:
    async with aclosing(router.flow.generate(job(router, "waits", n=2))) as steps:
        assert await anext(steps) == []
        await anext(steps)
    assert sorted(router.engines.aborted) == sorted(s.id for s in router.engines.submits)
    assert len(router.table) == 0


async def test_cancelled_in_the_queue(folder: Path) -> None:
    async with occupied(folder) as parts:
        queued = asyncio.ensure_future(run(parts, job(parts, "plain")))
        await asyncio.sleep(0.01)
        assert [view.waiting for view in parts.admission.views()] == [1]
        queued.cancel()
        await asyncio.gather(queued, return_exceptions=True)
        assert [view.waiting for view in parts.admission.views()] == [0]


async def test_the_queue_moves_on(folder: Path) -> None:
    async with router_parts(folder, plays, settings=FlowSettings(max_concurrency=1)) as parts:
        runs = await asyncio.gather(*(run(parts, job(parts, "plain")) for _ in range(5)))
        assert [text_of(steps) for steps in runs] == ["Hello world"] * 5


async def test_a_full_queue_refuses_at_once(folder: Path) -> None:
    async with occupied(folder, max_queue=0) as parts:
        with pytest.raises(Overloaded) as caught:
            await run(parts, job(parts, "plain"))
        assert caught.value.retry_after_s is not None


async def test_time_limit_in_the_queue_is_overload(folder: Path) -> None:
    async with occupied(folder, request_timeout_s=0.05) as parts:
        with pytest.raises(Overloaded):
            await run(parts, job(parts, "plain"))


async def test_the_queues_own_time_limit_leaves_the_running_alone(folder: Path) -> None:
    async with occupied(folder, queue_timeout_s=0.05) as parts:
        with pytest.raises(Overloaded) as caught:
            await run(parts, job(parts, "plain"))
        assert caught.value.retry_after_s is not None
        assert parts.engines.running


async def test_time_limit_of_the_first_token(folder: Path) -> None:
    settings = FlowSettings(first_token_timeout_s=0.1)
    async with router_parts(folder, plays, settings=settings) as parts:
        with pytest.raises(RequestTimeout):
            await run(parts, job(parts, "never"))
    settings = FlowSettings(first_token_timeout_s=1.0)
    async with router_parts(folder, plays, settings=settings) as parts:
        # its first token comes, and then nothing for longer than that limit
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(run(parts, job(parts, "waits")), 1.4)


def test_deadlines() -> None:
    none = FlowSettings().deadlines(10.0)
    assert none == (None, None, None)
    some = FlowSettings(request_timeout_s=5, queue_timeout_s=2, first_token_timeout_s=9)
    assert some.deadlines(10.0) == (12.0, 15.0, 15.0)


@pytest.mark.parametrize("scene", ["never", "waits"])
async def test_time_limit_of_a_running_request(folder: Path, scene: str) -> None:
    async with router_parts(folder, plays, settings=FlowSettings(request_timeout_s=0.05)) as parts:
        with pytest.raises(RequestTimeout):
            await run(parts, job(parts, scene))
        assert parts.engines.aborted


async def test_no_engine_within_the_time_limit(folder: Path) -> None:
    async with router_parts(folder, plays, settings=FlowSettings(request_timeout_s=0.05)) as parts:
        parts.engines.restarts = False
        with pytest.raises((Overloaded, RequestTimeout)):
            await run(parts, job(parts, "dies-early"))


async def test_a_model_that_never_was_ready_is_not_queued_for(folder: Path) -> None:
    async with router_parts(folder, plays, started=False) as parts:
        with pytest.raises(Overloaded):
            await run(parts, job(parts, "plain"))


async def test_a_model_that_was_given_up(folder: Path) -> None:
    async with router_parts(folder, plays) as parts:
        parts.fleet.lose(0, "crash loop")
        parts.fleet.park(0, "crash loop")
        with pytest.raises(Overloaded):
            await run(parts, job(parts, "plain"))


async def test_silence_is_told_of(folder: Path) -> None:
    async with (
        router_parts(folder, plays, settings=FlowSettings(ping_s=0.01)) as parts,
        aclosing(parts.flow.generate(job(parts, "never"))) as steps,
    ):
        assert [await anext(steps) for _ in range(3)] == [[], [], []]


async def test_a_wait_in_the_queue_is_told_of_216(folder: Path) -> None:
    settings = FlowSettings(ping_s=0.01, max_concurrency=1)
    async with router_parts(folder, plays, settings=settings) as parts:
        holder = parts.flow.generate(job(parts, "waits"))
        await anext(holder)
        async with aclosing(parts.flow.generate(job(parts, "plain"))) as queued:
            assert [await anext(queued) for _ in range(3)] == [[], [], []]
            assert parts.admission.active == 2
        assert parts.admission.active == 1  # who leaves the queue while it is told of is gone
        async with aclosing(parts.flow.generate(job(parts, "plain"))) as queued:
            assert await anext(queued) == []
            await holder.aclose()
            texts = [progress.piece.text async for step in queued for progress in step]
        assert "".join(texts) == "Hello world"


async def test_a_wait_for_an_engine_is_told_of(folder: Path) -> None:
    async with router_parts(folder, plays, settings=FlowSettings(ping_s=0.01)) as parts:
        parts.fleet.lose(0, "the test says so")
        async with aclosing(parts.flow.generate(job(parts, "plain"))) as steps:
            asyncio.get_running_loop().call_later(0.05, parts.engines.start, 0)
            assert [await anext(steps) for _ in range(2)] == [[], []]
            texts = [progress.piece.text async for step in steps for progress in step]
        assert "".join(texts) == "Hello world"


async def test_load_is_spread(router: Router) -> None:
    async with aclosing(router.flow.generate(job(router, "waits", n=2))) as steps:
        await anext(steps)
        views = router.fleet.views(router.model.name)
        assert [view.inflight_requests for view in views] == [1, 1]


async def test_room(router: Router) -> None:
    router.flow.check_room(router.model, MAX_LEN - 1, param="prompt")
    with pytest.raises(ContextLengthExceeded) as caught:
        router.flow.check_room(router.model, MAX_LEN, param="prompt")
    assert (caught.value.param, str(MAX_LEN) in caught.value.message) == ("prompt", True)


def test_record_has_no_empty_fields() -> None:
    assert RequestRecord("r", 0.0).fields() == {"request_id": "r", "status": 0}


async def test_a_grammar_goes_with_every_choice_and_on_to_the_next_engine(tmp_path: Path) -> None:
    def dying(prompt: str) -> Play:
        return Play([encode_text("12"), encode_text("34")], dies_at=3 if prompt == "dies" else -1)

    async with router_parts(tmp_path, dying) as parts:
        await run(parts, job(parts, "free"))
        assert parts.engines.vocabularies == []
        steps = await run(parts, job(parts, "bound", n=2, grammar="start: /[0-9]+/"))
        assert [text_of(steps, i) for i in (0, 1)] == ["1234", "1234"]
        steps = await run(parts, job(parts, "dies", grammar="start: /[0-9]+/"))
        assert text_of(steps) == "1234"
    grammars = [submit.grammar for submit in parts.engines.submits]
    assert grammars == ["", *["start: /[0-9]+/"] * 4]
    assert [told.epoch for told in parts.engines.vocabularies] == [1, 2]
    assert protocol.unpack_tokens(parts.engines.submits[-1].tokens)[-3:] == encode_text("123")


async def test_r25_a_request_without_memory_fails_with_its_own_code(router: Router) -> None:
    with pytest.raises(InsufficientMemory):
        await run(router, job(router, "no-memory"))
    for _ in range(100):
        assert text_of(await run(router, job(router, "plain"))) == "Hello world"
