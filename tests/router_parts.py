"""The router in one process, without sockets: real fleet, flow and routes, scripted engines.

`LoopbackEngines` stands where the socket would be. What it answers to a prompt is a `Play`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message

from engine import protocol
from engine.config import EngineConfig
from engine.protocol import (
    Embedding,
    Finish,
    Limits,
    Logprobs,
    Ready,
    Started,
    StepOutput,
    Submit,
    Vocabulary,
)
from router.admission import EMBEDDING_SHARE, Admission, Gate, QueueBounds
from router.app import Access, Parts, build_app
from router.embed_flow import EmbedFlow
from router.engine_process import EngineSpec
from router.fleet import Fleet, SendResult
from router.flow import Flow
from router.metrics import Metrics
from router.operations import Operations
from router.quarantine import Quarantine
from router.streams import StreamTable
from router.supervisor import Supervisor
from router.text.grammar import make
from router.text.model import load_text, thinking_of, tool_form_of
from router.text.pool import TextPool
from router.text.pooling import PoolingRule
from router.text.served import ModelTable, ServedModel
from router.text.wire_vocabulary import vocabulary_of
from router.waiting import FlowSettings
from tools.fake_batch import fake_embedding
from tools.tiny_model import VOCAB_SIZE, decode_tokens, encode_text, write_tiny_model

MAX_LEN = 512
EMBEDDING_SIZE = 8
MODEL = "tiny"


@dataclass(frozen=True)
class Play:
    """What one sequence generates: `steps[i]` come in one step, then the end.

    `stop`: the end is a stop token (counted, sent last). `dies_at`: the engine is lost before this
    many tokens are out (-1 never), as often as `deaths` says. `waits`: nothing after the steps.
    `gate`: the first step waits for it.
    """

    steps: Sequence[Sequence[int]]
    stop: bool = True
    dies_at: int = -1
    deaths: int = 1
    waits: bool = False
    error: str = ""
    gate: asyncio.Event | None = None


def text_play(*texts: str, stop: bool = True) -> Play:
    """One step for each text."""
    return Play([encode_text(text) for text in texts], stop=stop)


def token_logprob(token: int) -> float:
    """The made-up log-probability of a token, exact in float32."""
    return -(token % 8) / 4


@dataclass
class LoopbackEngines:
    """Answers each Submit by `plays(prompt text)`; keeps what it was sent."""

    plays: Callable[[str], Play]
    fleet: Fleet | None = None
    submits: list[Submit] = field(default_factory=list)
    vocabularies: list[Vocabulary] = field(default_factory=list)
    sent_to: set[bytes] = field(default_factory=set)  # engines that got one
    aborted: list[int] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    restarts: bool = True
    embedding_size: int = EMBEDDING_SIZE
    max_len: int = MAX_LEN
    vocab_size: int = VOCAB_SIZE
    logprob: Callable[[int], float] = token_logprob
    tokens_running: int = 0  # of texts to be embedded
    most_running: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def send(self, identity: bytes, frame: bytes) -> SendResult:
        """The socket's side of `EngineLink`."""
        message = protocol.decode_to_engine(frame)
        if isinstance(message, Submit):
            self.submits.append(message)
            self.sent_to.add(identity)
            task = asyncio.ensure_future(self._run(identity, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Vocabulary):
            self.vocabularies.append(message)
        elif isinstance(message, protocol.Abort):
            self.aborted += message.ids
            self.running.difference_update(message.ids)
        return "sent"

    def start(self, replica: int) -> None:
        """A fresh engine for a replica, ready at once."""
        assert self.fleet is not None
        epoch = self.fleet.replicas[replica].epoch + 1
        identity = f"engine-{replica}-{epoch}".encode()
        self.fleet.start(replica, epoch, identity)
        size = self.embedding_size
        limits = Limits(self.max_len, self.vocab_size, 32, 100, 64, embedding_size=size)
        ready = Ready(epoch, protocol.PROTOCOL_VERSION, limits)
        self.fleet.receive(identity, protocol.encode(ready))

    async def stop(self) -> None:
        """Ends the players."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, identity: bytes, submit: Submit) -> None:
        self.running.add(submit.id)
        tokens = protocol.unpack_tokens(submit.tokens)
        num_prompt = submit.num_prompt or len(tokens)
        prompt = decode_tokens(tokens[:num_prompt])
        play = self.plays(prompt)
        if submit.pooling is not None:
            await self._embed(identity, submit, tokens, play)
            return
        skip = len(tokens) - num_prompt  # generated by an engine before this one
        started: tuple[Started, ...] = (Started(submit.id, min(32, num_prompt - 1)),)
        if submit.sampling.prompt_logprobs >= 0:
            await self._tell_prompt(identity, submit, tokens[:num_prompt])
        if play.gate is not None:
            await play.gate.wait()
        out, made = 0, 0
        for step in play.steps:
            await asyncio.sleep(0)
            new: list[int] = []
            for token in step:
                if self._dies(prompt, play, out):
                    await self._flush(identity, submit, new, started, skip + made)
                    self._die(identity)
                    return
                out += 1
                if out > skip and made < submit.max_new:
                    new.append(token)
                    made += 1
            ended = made == submit.max_new
            finish = (Finish(submit.id, "length"),) if ended else ()
            await self._flush(identity, submit, new, started, skip + made - len(new), finish)
            started = ()
            if ended:
                return
        if play.waits:
            await asyncio.Event().wait()
        if play.error:
            await self._flush(
                identity, submit, [], started, 0, (Finish(submit.id, "error", play.error),)
            )
        elif play.stop and submit.stop_ids:
            end = (Finish(submit.id, "stop"),)
            await self._flush(identity, submit, [submit.stop_ids[0]], started, skip + made, end)
        else:
            await self._flush(identity, submit, [], started, 0, (Finish(submit.id, "length"),))

    async def _embed(self, identity: bytes, submit: Submit, tokens: list[int], play: Play) -> None:
        """An embedding as the real engine would send it."""
        assert submit.max_new == 0
        assert submit.pooling is not None
        self.tokens_running += len(tokens)
        self.most_running = max(self.most_running, self.tokens_running)
        await asyncio.sleep(0)
        self.tokens_running -= len(tokens)
        if submit.id not in self.running:
            return  # aborted
        if self._dies(decode_tokens(tokens), play, 0):
            self._die(identity)
        elif play.waits:
            await asyncio.Event().wait()
        elif play.error:
            finish = (Finish(submit.id, "error", play.error),)
            await self._flush(identity, submit, [], (), 0, finish)
        else:
            self.running.discard(submit.id)
            vector = Embedding(submit.id, fake_embedding(tokens, submit.pooling, EMBEDDING_SIZE))
            started, finish = (Started(submit.id, 0),), (Finish(submit.id, "stop"),)
            self._send(
                identity,
                StepOutput(
                    submit.epoch, 1, (), (), b"", finish, started=started, embeddings=(vector,)
                ),
            )

    def _dies(self, prompt: str, play: Play, out: int) -> bool:
        if out != play.dies_at or self.deaths.get(prompt, 0) >= play.deaths:
            return False
        self.deaths[prompt] = self.deaths.get(prompt, 0) + 1
        return True

    def _die(self, identity: bytes) -> None:
        assert self.fleet is not None
        for replica in self.fleet.replicas:
            if replica.identity == identity:
                self.fleet.lose(replica.index, "the test says so")
                if self.restarts:
                    asyncio.get_running_loop().call_later(0.01, self.start, replica.index)

    async def _tell_prompt(self, identity: bytes, submit: Submit, prompt: list[int]) -> None:
        told = self._logprobs(submit.id, 1, prompt[1:], submit.sampling.prompt_logprobs)
        self._send(
            identity, StepOutput(self._epoch(identity), 1, (), (), b"", prompt_logprobs=(told,))
        )

    async def _flush(
        self,
        identity: bytes,
        submit: Submit,
        new: list[int],
        started: tuple[Started, ...],
        position: int,
        finish: tuple[Finish, ...] = (),
    ) -> None:
        if finish:
            self.running.discard(submit.id)
        k = submit.sampling.logprobs
        logprobs = (self._logprobs(submit.id, position, new, k),) if k >= 0 and new else ()
        self._send(
            identity,
            StepOutput(
                submit.epoch,
                1,
                (submit.id,),
                (len(new),),
                protocol.pack_tokens(new),
                finish,
                started=started,
                logprobs=logprobs,
            ),
        )

    def _logprobs(self, id_: int, start: int, tokens: list[int], k: int) -> Logprobs:
        top = [(token + i) % self.vocab_size for token in tokens for i in range(k)]
        return Logprobs(
            id_,
            start,
            protocol.pack_floats([self.logprob(token) for token in tokens]),
            protocol.pack_tokens(top),
            protocol.pack_floats([-float(i) for _ in tokens for i in range(k)]),
        )

    def _epoch(self, identity: bytes) -> int:
        return int(identity.rpartition(b"-")[2])

    def _send(self, identity: bytes, message: StepOutput) -> None:
        assert self.fleet is not None
        self.fleet.receive(identity, protocol.encode(message))


@dataclass
class Router:
    """All parts, wired as the command line would."""

    app: ASGIApp
    flow: Flow
    fleet: Fleet
    table: StreamTable
    engines: LoopbackEngines
    admission: Admission
    metrics: Metrics
    model: ServedModel


class AlwaysWell:
    """A life cycle that is past its start."""

    started = True
    ready = True


@asynccontextmanager
async def router_parts(
    folder: Path,
    plays: Callable[[str], Play],
    *,
    replicas: int = 1,
    max_queue: int = 64,
    settings: FlowSettings | None = None,
    keys: tuple[bytes, ...] = (),
    access: Access | None = None,
    with_template: bool = True,
    started: bool = True,
    generates: bool = True,
    pooling: PoolingRule | None = None,
    embedding_size: int = EMBEDDING_SIZE,
    max_len: int = MAX_LEN,
) -> AsyncIterator[Router]:
    """A router over `replicas` scripted engines; at the end nothing may be left running."""
    settings = settings or FlowSettings()
    text = load_text(folder if (folder / "config.json").exists() else write_tiny_model(folder))
    template = text.template if with_template else None
    model = ServedModel(
        (MODEL, "a/b"),
        text.tokenizer,
        template,
        max_len,
        1_700_000_000,
        generates=generates,
        pooling=pooling or PoolingRule(),
        tool_form=tool_form_of(text, ""),
        thinking=thinking_of(text, ""),
    )
    metrics, table = Metrics(), StreamTable()
    engines = LoopbackEngines(
        plays,
        embedding_size=embedding_size,
        max_len=max_len,
        vocab_size=text.tokenizer.vocab_size,
    )
    served = ModelTable([model])
    vocabularies = vocabulary_of(served)
    fleet = Fleet([MODEL] * replicas, table, engines, metrics, time.monotonic, vocabularies)
    engines.fleet = fleet

    def gate(permits_each: int) -> Gate:
        def permits() -> int:
            return fleet.serving_count(MODEL) * permits_each

        return Gate(MODEL, QueueBounds(max_queue), permits, time.monotonic)

    most = settings.max_concurrency
    admission = Admission([gate(most)], [gate(max(1, most // EMBEDDING_SHARE))])
    fleet.subscribe(lambda replica: admission.refresh(replica.model))
    quarantine = Quarantine(time.monotonic)
    flow = Flow(fleet, admission, metrics, settings, quarantine, time.monotonic)
    pool = TextPool()
    for replica in range(replicas if started else 0):
        engines.start(replica)
    embed_flow = EmbedFlow(fleet, admission, metrics, settings, quarantine, time.monotonic)
    access = access or Access(keys)
    config = EngineConfig(endpoint="", replica=0, epoch=0, model=MODEL)
    specs = [EngineSpec(MODEL, ("true",), {}, config)] * replicas  # kept, but never run
    supervisor = Supervisor(specs, fleet, metrics, on_fatal="wait", clock=time.monotonic)
    operations = Operations(fleet, supervisor, served, time.monotonic)
    parts = Parts(
        served,
        flow,
        embed_flow,
        pool,
        GrammarsHere(),
        metrics,
        AlwaysWell(),
        access,
        operations=operations,
    )
    app = build_app(parts)
    try:
        yield Router(app, flow, fleet, table, engines, admission, metrics, model)
        assert len(table) == 0, "a stream was not closed"
        assert admission.active == 0, "a permit was not given back"
    finally:
        await engines.stop()
        pool.close()


T = TypeVar("T")


class GrammarsHere:
    """Makes grammars in this process, which no client of a test will end."""

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.to_thread(function, make, *args)


@dataclass
class Answer:
    """One HTTP answer as its parts arrived."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    ended: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The stream's events, decoded; `[DONE]` must be the last and is left out."""
        blocks = [block for block in self.body.decode().split("\n\n") if block]
        data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
        assert data[-1] == "[DONE]", data
        return [json.loads(event) for event in data[:-1]]


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    raw: bytes | None = None,
    leave_after: int | None = None,
    query: bytes = b"",
) -> Answer:
    """One request. `leave_after`: the client hangs up after so many parts of the answer."""
    answer = Answer()
    gone = asyncio.Event()
    data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "scheme": "http",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in given.items()],
    }
    inbox = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Message:
        if inbox:
            return inbox.pop()
        if leave_after == 0:
            await asyncio.sleep(0.02)
            return {"type": "http.disconnect"}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode(): v.decode("latin-1") for k, v in message["headers"]}
            return
        answer.parts.append(message.get("body", b""))
        answer.ended = not message.get("more_body", False)
        if leave_after is not None and len(answer.parts) >= leave_after:
            gone.set()

    await app(scope, receive, send)
    return answer


async def chat(app: ASGIApp, text: str = "hi", **fields: Any) -> Answer:
    """POST /v1/chat/completions with one user message."""
    messages = fields.pop("messages", [{"role": "user", "content": text}])
    body = {"model": MODEL, "messages": messages, **fields}
    return await call(app, "POST", "/v1/chat/completions", body)


async def complete(app: ASGIApp, prompt: Any = "hi", **fields: Any) -> Answer:
    """POST /v1/completions."""
    body = {"model": MODEL, "prompt": prompt, **fields}
    return await call(app, "POST", "/v1/completions", body)
