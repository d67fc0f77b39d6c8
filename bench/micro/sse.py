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
import time
from dataclasses import dataclass, field
from typing import Any

from engine import protocol
from engine.protocol import Limits, Ready, StepOutput
from router.admission import Admission, Gate
from router.api.chat import ChatCompletions
from router.api.generation import RECORD, Generations
from router.api.sse import ChunkTemplate
from router.fleet import Fleet, SendResult
from router.flow import Flow, FlowSettings, RequestRecord
from router.metrics import Metrics
from router.streams import StreamTable
from router.text.pool import TextPool
from router.text.served import ModelTable, ServedModel
from router.text.template import ChatTemplate
from router.text.tokenizer import FastTokenizer
from router.text.vocabulary import Vocabulary

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

    def send(self, _identity: bytes, frame: bytes) -> SendResult:
        """Never full, never gone."""
        message = protocol.decode_to_engine(frame)
        if isinstance(message, protocol.Submit):
            self.ids.append(message.id)
        return "sent"
