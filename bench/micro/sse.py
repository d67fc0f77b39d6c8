"""What a streamed chunk costs the router: `python -m bench.micro.sse`.

Prints the median cost of formatting one chunk, and that of a chunk's whole way through the router,
from the engine's frame to the bytes handed to the HTTP server, at 64 streams. No sockets: what the
HTTP server and the kernel add is measured by `python -m bench.cpu --only chunk`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import Message

from engine import protocol
from engine.protocol import Limits, Ready, StepOutput
from router.admission import Admission, Gate
from router.api.sse import ChunkTemplate
from router.app import Parts, build_app
from router.embed_flow import EmbedFlow
from router.fleet import Fleet, SendResult
from router.flow import Flow
from router.metrics import Metrics
from router.quarantine import Quarantine
from router.streams import StreamTable
from router.text.grammar_process import GrammarProcesses
from router.text.model import load_text
from router.text.pool import TextPool
from router.text.served import ModelTable, ServedModel
from router.waiting import FlowSettings
from tools.tiny_model import FIRST_BYTE, write_tiny_model

FORMAT_BUDGET_US = 2.0
PATH_BUDGET_US = 30.0
STREAMS = 64
STEPS = 200
ROUNDS = 20_000
MODEL = "bench"
BODY = json.dumps(
    {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
).encode()


def measure_format() -> float:
    """Median µs of formatting one chunk of a usual token."""
    head = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    opening = b'"delta":{"content":'
    chunks = ChunkTemplate(head, 1, opening=opening, closing=b"}", include_usage=True)
    samples: list[float] = []
    for _ in range(9):
        started = time.perf_counter()
        for _ in range(ROUNDS):
            chunks.text(0, " token")
        samples.append((time.perf_counter() - started) / ROUNDS * 1e6)
    return statistics.median(samples)


@dataclass
class Loopback:
    """Where the socket would be: remembers which streams were submitted."""

    ids: list[int] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)  # all streams are there

    def send(self, _identity: bytes, frame: bytes) -> SendResult:
        """Never full, never gone."""
        message = protocol.decode_to_engine(frame)
        if isinstance(message, protocol.Submit):
            self.ids.append(message.id)
            if len(self.ids) == STREAMS:
                self.complete.set()
        return "sent"


@dataclass
class Arrivals:
    """Counts parts of all answers; `complete` is set when none of a step is missing."""

    num_missing: int = 0
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def expect(self, count: int) -> None:
        """From now on so many parts are missing."""
        self.num_missing = count
        self.complete.clear()

    def arrived(self) -> None:
        """One part."""
        self.num_missing -= 1
        if self.num_missing == 0:
            self.complete.set()


@dataclass
class Client:
    """One streaming request as ASGI sees it."""

    arrivals: Arrivals
    asked: bool = False

    async def receive(self) -> Message:
        """The body once, then silence."""
        if self.asked:
            await asyncio.Event().wait()
        self.asked = True
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(self, message: Message) -> None:
        """Takes one part."""
        if message["type"] == "http.response.body":
            self.arrivals.arrived()


async def measure_path(folder: Path) -> float:
    """Median µs per chunk from the engine's frame to the HTTP server, STREAMS streams at once."""
    text = load_text(write_tiny_model(folder))
    model = ServedModel((MODEL,), text.tokenizer, text.template, 10 * STEPS, 0)
    metrics, link = Metrics(), Loopback()
    fleet = Fleet([MODEL], StreamTable(), link, metrics, time.monotonic)
    gate = Gate(MODEL, 0, lambda: STREAMS, time.monotonic)
    owners = (
        fleet,
        Admission([gate]),
        metrics,
        FlowSettings(),
        Quarantine(time.monotonic),
        time.monotonic,
    )
    flow, embed_flow = Flow(*owners), EmbedFlow(*owners)
    pool = TextPool()
    grammars, well = GrammarProcesses({}), AlwaysWell()
    app = build_app(Parts(ModelTable([model]), flow, embed_flow, pool, grammars, metrics, well))
    limits = Limits(10 * STEPS, text.tokenizer.vocab_size, 32, 1000, STREAMS)
    fleet.start(0, 1, b"engine")
    fleet.receive(b"engine", protocol.encode(Ready(1, protocol.PROTOCOL_VERSION, limits)))
    arrivals = Arrivals()
    arrivals.expect(STREAMS)  # the role chunks
    clients = [Client(arrivals) for _ in range(STREAMS)]
    tasks = [asyncio.ensure_future(app(_scope(), c.receive, c.send)) for c in clients]
    await link.complete.wait()
    await arrivals.complete.wait()
    samples = [await _step(fleet, link, arrivals, step) for step in range(STEPS)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    pool.close()
    return statistics.median(samples) / STREAMS


async def _step(fleet: Fleet, link: Loopback, arrivals: Arrivals, step: int) -> float:
    """µs from one frame to the last of its chunks."""
    tokens = protocol.pack_tokens([FIRST_BYTE + ord("x")] * STREAMS)
    frame = protocol.encode(StepOutput(1, step, tuple(link.ids), (), tokens))
    arrivals.expect(STREAMS)
    started = time.perf_counter()
    fleet.receive(b"engine", frame)
    await arrivals.complete.wait()
    return (time.perf_counter() - started) * 1e6


def _scope() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"content-type", b"application/json")],
    }


class AlwaysWell:
    """A server past its start."""

    started = True
    ready = True


def main() -> None:
    """Prints one line."""
    gc.disable()
    per_format = measure_format()
    with tempfile.TemporaryDirectory() as folder:
        per_path = asyncio.run(measure_path(Path(folder) / MODEL))
    print(
        f"sse: one chunk: format {per_format:.2f} µs (budget {FORMAT_BUDGET_US:.0f}), "
        f"frame to HTTP server {per_path:.1f} µs (budget {PATH_BUDGET_US:.0f}, {STREAMS} streams)"
    )


if __name__ == "__main__":
    main()
