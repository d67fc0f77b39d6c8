"""Serving on a CUDA device: thousands of mixed requests, and what `launch` may not do.

The oracle of a finished answer is one forward pass over all of its tokens on the CPU, in float32
and plain torch: at every generated position the token must be the one that the reference sampling
takes of those logits, or tie with it. So one near-tie excuses one token, not the rest of an answer.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor

from engine.device.batch import Batch
from engine.device.build import Device
from engine.device.kv import KvCache
from engine.device.sampling import SlotSampling, edit_logits, exponentials, noise_key, sample
from engine.device.weights import open_model
from engine.grammar import StepMasks
from engine.models.base import Model, ModelShape
from engine.models.registry import build_decoder, read_spec, shape_of, weight_names_of
from engine.plan import Admit, Row, StepPlan
from engine.protocol import Sampling, Submit, unpack_floats, unpack_tokens
from tests.decoding import float32_target
from tests.generation import GREEDY, Driver, Generated, device_of
from tests.grammars import ANY_DIGITS, DIGITS, PEOPLE, byte_grammars, byte_vocabulary, json_grammar
from tools.tiny_model import (
    EOS_ID,
    VOCAB_SIZE,
    TinySpec,
    decode_tokens,
    write_tiny_model,
)

DEVICE = "cuda:0"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU = torch.device("cpu")
REQUESTS = 2000
MAX_LEN, BLOCK, MAX_BATCH = 128, 8, 24
# Two sequences of the greatest length fit, so that many short ones push each other out.
TIGHT_BLOCKS = 2 * (MAX_LEN // BLOCK) + 9
# Logits and log-probabilities closer than this may go either way in float32.
TIE = 1e-3
LOGPROB_TOLERANCE = 2e-3
STOP_IDS = (40, 80, 120, 160, 200)


# -- the oracle


class Oracle:
    """Logits of whole sequences, by the generic decoder on the CPU."""

    def __init__(self, folder: Path) -> None:
        config, source = open_model(folder, "auto", CPU)
        spec = read_spec(config)
        self._shape: ModelShape = shape_of(spec)
        target = float32_target(MAX_LEN)
        self._model: Model = build_decoder(spec, weight_names_of(config), source, target)

    @torch.inference_mode()
    def logits(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """float32 [length, vocab] of each."""
        each = MAX_LEN // BLOCK
        cache = KvCache(self._shape, each * len(sequences), BLOCK, torch.float32, CPU)
        batch = Batch(len(sequences), MAX_LEN, BLOCK, CPU, torch.float32, self._shape.windows)
        admits: list[Admit] = []
        rows: list[Row] = []
        for i, tokens in enumerate(sequences):
            blocks = list(range(each * i, each * i + each))
            admits.append(Admit(i, tokens, len(tokens), blocks, Sampling(), ()))
            rows.append(Row(i, i, 0, len(tokens), False))
        batch.apply(StepPlan(0, [], admits, [], []))
        inputs = batch.inputs(rows)
        hidden = self._model.forward(inputs.ids, inputs.positions, cache.layers, inputs.attention)
        scores = self._model.logits(hidden)
        return [
            scores[inputs.last[i] + 1 - row.count : inputs.last[i] + 1]
            for i, row in enumerate(rows)
        ]


def acceptable(logits: Tensor, slot: SlotSampling, known: Tensor) -> Tensor:
    """bool [vocab]: tokens that sampling may take if the logits are off by `TIE` at most."""
    edited = logits.clone()
    if slot.edits_logits:
        edit_logits(edited, slot, known)
    if slot.greedy:
        return edited > edited.max() - TIE
    params = slot.params
    scores = (edited / params.temperature).log_softmax(-1)
    error = 2 * TIE / params.temperature
    surely, maybe = kept(scores, params, -error), kept(scores, params, error)
    key = torch.tensor([noise_key(params.seed, len(known))])
    race = scores - exponentials(key, len(scores))[0].log()
    return maybe & (race > race[surely].max() - error)


def kept(scores: Tensor, params: Sampling, slack: float) -> Tensor:
    """bool [vocab]: what min-p, top-k and top-p leave, each of them too generous by `slack`."""
    ordered = scores.sort(descending=True).values
    left = scores >= ordered[0] + torch.tensor(params.min_p).log() - slack
    if 0 < params.top_k < len(scores):
        # The last that stays, or so far above the first that goes that no error changes places.
        border = ordered[params.top_k - (slack > 0)]
        left &= scores >= border - slack
    if params.top_p < 1.0:
        chances = torch.where(left, scores.exp(), 0.0)
        at = chances.argsort(descending=True)
        before = torch.empty_like(chances)
        before[at] = (chances[at].cumsum(-1) - chances[at]) / chances.sum()
        left &= before < params.top_p + slack
    left[scores.argmax()] = True
    return left


def check_tokens(submit: Submit, result: Generated, logits: Tensor) -> int:
    """Every generated token is the reference's or ties with it; returns the number of ties."""
    prompt = unpack_tokens(submit.tokens)
    tokens = torch.tensor([*prompt, *result.tokens])
    admit = Admit(0, [], len(prompt), [], submit.sampling, submit.stop_ids)
    slot = SlotSampling.of(admit, CPU)
    tied = 0
    for at in range(len(prompt), len(tokens)):
        row, known = logits[at - 1], tokens[:at]
        best = int(sample(row[None].clone(), [slot], [known])[0])
        token = int(tokens[at])
        if token != best:
            assert acceptable(row, slot, known)[token], (submit, at, token, best)
            tied += 1
    return tied


def check_scores(submit: Submit, result: Generated, logits: Tensor) -> None:
    """Log-probabilities are those of the model, whatever sampling does to the logits."""
    prompt = unpack_tokens(submit.tokens)
    tokens = torch.tensor([*prompt, *result.tokens])
    scores = logits.log_softmax(-1)
    for entries, rivals, begin, end in (
        (result.logprobs, submit.sampling.logprobs, len(prompt), len(tokens)),
        (result.prompt_logprobs, submit.sampling.prompt_logprobs, 1, len(prompt)),
    ):
        if rivals < 0:
            assert not entries
            continue
        chosen = [score for entry in entries for score in unpack_floats(entry.chosen)]
        told = torch.tensor(chosen)
        wanted = scores[begin - 1 : end - 1].gather(1, tokens[begin:end, None])[:, 0]
        assert len(told) == len(wanted)
        assert not len(told) or float((told - wanted).abs().max()) < LOGPROB_TOLERANCE
        if rivals > 0 and len(told):
            best = [score for entry in entries for score in unpack_floats(entry.top)]
            top = scores[begin - 1 : end - 1].topk(rivals).values.flatten()
            assert float((torch.tensor(best) - top).abs().max()) < LOGPROB_TOLERANCE


def check_end(submit: Submit, result: Generated) -> None:
    """The reason fits the tokens."""
    assert result.finish is not None
    reason, tokens = result.finish.reason, result.tokens
    stops = [token in submit.stop_ids for token in tokens]
    early = submit.sampling.min_new
    assert not any(stops[: max(0, min(early, len(stops) - 1))])
    assert not any(stops[:-1]), "went on after a stop token"
    if reason == "stop":
        assert stops[-1]
        assert len(tokens) >= early
    elif reason == "length":
        assert len(tokens) == submit.max_new
    else:
        assert reason == "abort", result.finish


# -- many requests


class Load(NamedTuple):
    """How many requests, how many open at once, how often one of them is dropped."""

    requests: int
    open: int
    abort_share: float


def sampling_of(rnd: random.Random, number: int) -> Sampling:
    """Greedy, seeded, filtered and edited ones, with and without log-probabilities."""
    fields: dict[str, Any] = {"seed": number * 7919 + 1, "temperature": 0.0}
    kind = rnd.randrange(6)
    if kind >= 2:
        fields["temperature"] = rnd.choice((0.3, 0.8, 1.0, 1.7))
    if kind == 3:
        fields |= {"top_k": rnd.choice((1, 2, 20, 100)), "top_p": rnd.choice((1.0, 0.9, 0.4))}
    if kind == 4:
        fields |= {"top_p": rnd.choice((0.95, 0.5)), "min_p": rnd.choice((0.0, 0.05))}
    if kind in (1, 5):
        fields |= {
            "presence_penalty": rnd.choice((0.0, 0.6)),
            "frequency_penalty": rnd.choice((0.0, 0.9)),
            "repetition_penalty": rnd.choice((1.0, 1.2)),
            "logit_bias": ((rnd.randrange(16, VOCAB_SIZE), rnd.uniform(-3, 3)),),
        }
    if rnd.random() < 0.25:
        fields["logprobs"] = rnd.randrange(4)
    if rnd.random() < 0.1:
        fields["prompt_logprobs"] = rnd.randrange(3)
    if rnd.random() < 0.2:
        fields["min_new"] = rnd.randrange(1, 6)
    return Sampling(**fields)


def requests(driver: Driver, rnd: random.Random, count: int) -> Iterator[Submit]:
    """Random requests, half of whose prompts begin like others'."""
    stems = [[rnd.randrange(16, VOCAB_SIZE) for _ in range(length)] for length in (9, 20, 33, 48)]
    for number in range(count):
        own = [rnd.randrange(16, VOCAB_SIZE) for _ in range(rnd.choice((1, 3, 8, 17, 30)))]
        prompt = rnd.choice(stems) + own if rnd.random() < 0.5 else own
        max_new = rnd.randrange(1, 25)
        stop_ids = STOP_IDS if rnd.random() < 0.5 else ()
        sampling = sampling_of(rnd, number)
        yield driver.submit(prompt, max_new, sampling, stop_ids=stop_ids)


class Collecting(Driver):
    """A driver whose steps are made by the test."""

    def collect(self, results: dict[int, Generated]) -> None:
        self._collect(results)


def serve(
    driver: Collecting, device: Device, load: Load, rnd: random.Random
) -> list[tuple[Submit, Generated]]:
    """Keeps `load.open` requests open, one step ahead, until all have ended."""
    todo = requests(driver, rnd, load.requests)
    submits: dict[int, Submit] = {}
    results: dict[int, Generated] = {}
    scheduler = driver.scheduler
    launched: list[tuple[StepPlan, Any]] = []
    while True:
        unfinished = [i for i, result in results.items() if result.finish is None]
        for _ in range(load.open - len(unfinished)):
            submit = next(todo, None)
            if submit is None:
                break
            submits[submit.id], results[submit.id] = submit, Generated()
            scheduler.add(submit)
            unfinished.append(submit.id)
        if unfinished and rnd.random() < load.abort_share:
            scheduler.abort([rnd.choice(unfinished)])
        if not scheduler.busy:
            break
        plan = scheduler.plan()
        if plan is not None:
            launched.append((plan, device.runner.launch(plan)))
        while len(launched) > (1 if plan is not None else 0):
            done, pending = launched.pop(0)
            scheduler.commit(done, pending.result())
        driver.collect(results)
    driver.collect(results)
    return [(submits[i], results[i]) for i in submits]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("captured", [False, True])
def test_thousands_of_requests(tmp_path: Path, captured: bool) -> None:
    folder = write_tiny_model(tmp_path, TinySpec(max_len=MAX_LEN))
    served = device_of(
        folder,
        **{"device": DEVICE, "dtype": "float32", "max_len": MAX_LEN, "block_size": BLOCK},
        **{"max_batch": MAX_BATCH, "num_blocks": 4 * TIGHT_BLOCKS},
    )
    while captured and served.runner.idle():
        pass
    driver = Collecting(served, num_blocks=TIGHT_BLOCKS, step_tokens=48)
    count = REQUESTS if captured else REQUESTS // 4
    rnd = random.Random(4 + captured)
    answers = serve(driver, served, Load(count, 40, 0.1), rnd)
    assert len(answers) == count
    assert driver.scheduler.take_output() is None
    assert (driver.pool.num_held, driver.scheduler.counters.blocks_leaked) == (0, 0)
    assert driver.stats.preemptions > count // 50
    assert driver.stats.prefix_hit_tokens > 0
    check_answers(Oracle(folder), answers)


def check_answers(oracle: Oracle, answers: list[tuple[Submit, Generated]]) -> None:
    """All of them, aborted ones as far as they came. At most one token in 500 may be a tie."""
    num_aborted = num_tokens = num_ties = 0
    for begin in range(0, len(answers), 64):
        part = answers[begin : begin + 64]
        sequences = [unpack_tokens(submit.tokens) + result.tokens for submit, result in part]
        for (submit, result), logits in zip(part, oracle.logits(sequences), strict=True):
            check_end(submit, result)
            num_ties += check_tokens(submit, result, logits)
            num_tokens += len(result.tokens)
            assert result.finish is not None
            if result.finish.reason == "abort":
                num_aborted += 1
            else:
                check_scores(submit, result, logits)
    assert 0 < num_aborted < len(answers) // 2
    assert num_ties <= 1 + num_tokens // 500


# -- what a launch may not do

ROWS, CONTEXT, STEPS = 6, 40, 12
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature": Sampling(temperature=0.8, seed=5),
    "top_k_top_p": Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5),
    "min_p": Sampling(temperature=0.8, min_p=0.05, seed=5),
    "penalties": Sampling(temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.1),
    "logprobs": Sampling(temperature=0.0, logprobs=3),
}


def decode_plans(sampling: Sampling) -> list[StepPlan]:
    """Prompts of `ROWS` sequences, then decode steps of all of them."""
    return _plans(sampling, chunk=0)


def mixed_plans(sampling: Sampling) -> list[StepPlan]:
    """The same, with a new sequence's prompt of 33 tokens beside the decode rows of each step."""
    return _plans(sampling, chunk=33)


def masked_plans(sampling: Sampling) -> list[StepPlan]:
    """The same, where two of the sequences that decode have a grammar."""

    def masks() -> StepMasks:
        matchers = [byte_grammars().matcher(grammar, [], (), 0) for grammar in (DIGITS, ANY_DIGITS)]
        return StepMasks([1, 4], matchers)

    return [
        plan._replace(masks=masks()) if len(plan.rows) > ROWS else plan
        for plan in mixed_plans(sampling)
    ]


def _plans(sampling: Sampling, chunk: int) -> list[StepPlan]:
    each = -(-(CONTEXT + STEPS + 1) // BLOCK)
    tokens = [16 + (7 * i) % 250 for i in range(CONTEXT)]

    def admit(slot: int, count: int) -> Admit:
        blocks = list(range(each * slot, each * slot + each))
        return Admit(slot, tokens[:count], count, blocks, sampling, ())

    admits = [admit(slot, CONTEXT) for slot in range(ROWS)]
    prompts = [Row(slot, slot, 0, CONTEXT, samples=True) for slot in range(ROWS)]
    plans = [StepPlan(0, [row], [one], [], []) for row, one in zip(prompts, admits, strict=True)]
    for step in range(STEPS):
        rows = [Row(slot, slot, CONTEXT + step, 1, samples=True) for slot in range(ROWS)]
        if not chunk:
            plans.append(StepPlan(0, rows, [], [], []))
            continue
        rows.append(Row(ROWS, ROWS, 0, chunk, samples=True))
        plans.append(StepPlan(0, rows, [admit(ROWS, chunk)], [], []))
    return plans


def run_plans(device: Device, plans: list[StepPlan], around: Callable[[Any], Any]) -> None:
    """Launches all one ahead; `around` is what calls each launch."""
    pending: Any = None
    for plan in plans:
        launched = around(lambda plan=plan: device.runner.launch(plan))
        if pending is not None:
            pending.result()
        pending = launched
    pending.result()


def allocations() -> dict[str, int]:
    """How often the driver was asked for memory: the card's, and the host's that it can read."""
    card = torch.cuda.memory_stats()
    found = {name: int(card[name]) for name in ("segment.all.allocated", "num_alloc_retries")}
    found["num_device_alloc"] = int(card.get("num_device_alloc", 0))
    if hasattr(torch.cuda, "host_memory_stats"):
        host = torch.cuda.host_memory_stats()
        found["num_host_alloc"] = int(host.get("num_host_alloc", 0))
    return found


@pytest.fixture(scope="module")
def busy_device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = write_tiny_model(tmp_path_factory.mktemp("busy"), TinySpec(max_len=MAX_LEN))
    options = {"device": DEVICE, "dtype": "float16", "max_len": MAX_LEN, "block_size": BLOCK}
    served = device_of(folder, **options, max_batch=MAX_BATCH, num_blocks=256)
    while served.runner.idle():
        pass
    return served


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("make_plans", [decode_plans, mixed_plans, masked_plans])
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_launch_neither_waits_nor_allocates(
    busy_device: Device, kind: str, make_plans: Callable[[Sampling], list[StepPlan]]
) -> None:
    """In steps such as were run before; waiting is what `result` is for."""
    plans = make_plans(SAMPLINGS[kind])
    for _ in range(10):  # each time one of the missing graphs is captured, but only so often
        time.sleep(0.15)
        run_plans(busy_device, plans, lambda launch: launch())
    torch.cuda.synchronize()

    def strictly(launch: Callable[[], Any]) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    before = allocations()
    run_plans(busy_device, plans, strictly)
    assert allocations() == before


def test_launch_returns_before_the_card_is_done(busy_device: Device) -> None:
    """Torch's own check knows not every way to wait: here the card is kept busy for long."""
    plans = decode_plans(GREEDY)
    for _ in range(2):
        run_plans(busy_device, plans, lambda launch: launch())
    torch.cuda.synchronize()
    # About half a second on any clock a card has.
    torch.cuda._sleep(int(1e9))  # type: ignore[no-untyped-call]  # pyright: ignore[reportPrivateUsage]
    marker = torch.cuda.current_stream().record_event()
    pending = [busy_device.runner.launch(plan) for plan in plans[:2]]
    assert not marker.query(), "launch waited for work that was queued before"
    for launched in pending:
        launched.result()
    assert marker.query()


def test_answers_are_the_same_again(busy_device: Device) -> None:
    """Greedy and seeded ones; other seeds give others."""
    rnd = random.Random(11)
    prompt = [rnd.randrange(16, VOCAB_SIZE) for _ in range(30)]
    for sampling in (GREEDY, SAMPLINGS["top_k_top_p"]):
        driver = Driver(busy_device, prefix_cache=False)
        answers = [driver.run([driver.submit(prompt, 20, sampling)], 1)[0] for _ in range(3)]
        assert answers[0].tokens == answers[1].tokens == answers[2].tokens
    unlike = [msgspec.structs.replace(SAMPLINGS["temperature"], seed=seed) for seed in range(4)]
    driver = Driver(busy_device, prefix_cache=False)
    answers = driver.run([driver.submit(prompt, 20, sampling) for sampling in unlike], 1)
    assert len({tuple(result.tokens) for result in answers}) == len(unlike)


@pytest.mark.parametrize("overlap", [0, 1])
def test_answers_follow_their_grammars(tmp_path: Path, overlap: int) -> None:
    """Beside others, which are what they are without them; some are preempted on the way."""
    folder = write_tiny_model(tmp_path, TinySpec(max_len=MAX_LEN))
    # In float16 the company of a row would round a near tie now and then.
    options = {"device": DEVICE, "dtype": "float32", "max_len": MAX_LEN, "block_size": BLOCK}
    served = device_of(folder, **options, max_batch=MAX_BATCH, num_blocks=256)
    compact = json_grammar(PEOPLE | {"x-guidance": {"whitespace_flexible": False}})
    rnd = random.Random(13)
    prompts = [[rnd.randrange(16, VOCAB_SIZE) for _ in range(12)] for _ in range(60)]

    def run(grammar: str) -> list[Generated]:
        driver = Driver(served, prefix_cache=False, step_tokens=64, num_blocks=TIGHT_BLOCKS)
        driver.learn(byte_vocabulary(0))
        submits = [
            driver.submit(
                prompt, 110, Sampling(temperature=1.0, seed=number),
                stop_ids=(EOS_ID,), grammar=grammar if number % 2 else "",
            )
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip
        results = driver.run(submits, overlap)
        assert driver.stats.preemptions > 0
        return results

    bound = run(compact)
    ended = [result for result in bound[1::2] if result.finish and result.finish.reason == "stop"]
    assert len(ended) > len(prompts) // 3  # the others met the limit of the length
    for result in ended:
        answer = json.loads(decode_tokens(result.tokens))
        assert list(answer) == ["name", "age", "tags"]
        assert len(answer["name"]) <= 12
        assert 0 <= answer["age"] <= 150
        assert set(answer["tags"]) <= {"new", "old"}
    for result in bound[1::2]:
        assert result.finish is not None
        assert result.finish.reason in ("stop", "length")
    free = run("")
    same = sum(a.tokens == b.tokens for a, b in zip(bound[::2], free[::2], strict=True))
    assert same >= len(prompts) // 2 - 1
