"""A real engine process and the router's end of its wire, for system tests.

Not the router: no supervision, no dispatch, one engine. Everything blocks, with a time limit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import zmq

from engine.config import EngineConfig, encode_config
from engine.protocol import (
    MAX_FRAME_BYTES,
    Finish,
    Logprobs,
    Ready,
    Sampling,
    Started,
    StepOutput,
    Submit,
    ToEngine,
    ToRouter,
    decode_to_router,
    encode,
    pack_tokens,
    unpack_tokens,
)
from tools.tiny_model import decode_tokens, encode_text

ROOT = Path(__file__).resolve().parent.parent
REAL = (sys.executable, "-m", "engine.main")
FAKE = (sys.executable, "tools/fake_engine.py")
PATIENCE_S = 60.0
EPOCH = 1

Message = TypeVar("Message", bound=ToRouter)


@dataclass
class Answer:
    """All that was said about one sequence."""

    tokens: list[int] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    embeddings: list[bytes] = field(default_factory=list)

    @property
    def text(self) -> str:
        return decode_tokens(self.tokens)

    @property
    def reason(self) -> str:
        """Of its one end."""
        (finish,) = self.finishes
        return finish.reason


class EngineProcess:
    """Speaks with one engine; frames arrive in order, one at a time."""

    def __init__(
        self, process: subprocess.Popen[bytes], socket: zmq.Socket[bytes], config: EngineConfig
    ) -> None:
        self.process = process
        self.config = config
        self.messages: list[ToRouter] = []
        self.answers: dict[int, Answer] = {}
        self._socket = socket

    def receive(self, timeout_s: float = PATIENCE_S) -> ToRouter | None:
        """The next message, noted in `messages` and `answers`; None if none came in time."""
        if not self._socket.poll(int(timeout_s * 1e3)):
            return None
        identity, frame = self._socket.recv_multipart()
        assert identity == self.config.identity
        message = decode_to_router(frame)
        self.messages.append(message)
        if isinstance(message, StepOutput):
            self._note(message)
        return message

    def expect(self, kind: type[Message], timeout_s: float = PATIENCE_S) -> Message:
        """The next message of this kind; those before it are only noted."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            message = self.receive(left_s)
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__} in {timeout_s} s, but {self.messages}")

    def ready(self) -> Ready:
        return self.expect(Ready)

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self.send_frame(encode(message))

    def send_frame(self, *frames: bytes) -> None:
        """As they are: not one message of the protocol, if the test wants that."""
        self._socket.send_multipart([self.config.identity, *frames])

    def submit(self, id_: int, text: str, max_new: int = 8, **fields: Any) -> None:
        """A prompt in the byte-level tokens of `tools.tiny_model`."""
        sampling = fields.pop("sampling", Sampling(temperature=0.0))
        tokens = pack_tokens(encode_text(text))
        self.send(Submit(EPOCH, id_, tokens, sampling, max_new, **fields))

    def finish(self, ids: Iterable[int], timeout_s: float = PATIENCE_S) -> dict[int, Answer]:
        """The answers of `ids`, once all of them have ended."""
        wanted = list(ids)
        deadline_s = time.monotonic() + timeout_s
        while not all(id_ in self.answers and self.answers[id_].finishes for id_ in wanted):
            left_s = deadline_s - time.monotonic()
            assert self.receive(max(left_s, 0)), f"unfinished: {self.answers}"
        return {id_: self.answers[id_] for id_ in wanted}

    def close_pipe(self) -> None:
        """What the kernel does when the router dies."""
        assert self.process.stdin
        self.process.stdin.close()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code; what it still says is noted."""
        deadline_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, "the engine lives on"
            self.receive(0.02)
        while self.receive(0.1):
            pass
        return self.process.returncode

    def stderr(self) -> str:
        """Everything the ended engine wrote for the operator."""
        assert self.process.stderr
        return self.process.stderr.read().decode()

    def _note(self, output: StepOutput) -> None:
        counts = output.counts or (1,) * len(output.ids)
        tokens = iter(unpack_tokens(output.tokens))
        for started in output.started:
            self._answer(started.id).started.append(started)
        for id_, count in zip(output.ids, counts, strict=True):
            self._answer(id_).tokens += [next(tokens) for _ in range(count)]
        for part in output.logprobs:
            self._answer(part.id).logprobs.append(part)
        for part in output.prompt_logprobs:
            self._answer(part.id).prompt_logprobs.append(part)
        for vector in output.embeddings:
            self._answer(vector.id).embeddings.append(vector.values)
        for end in output.finished:
            self._answer(end.id).finishes.append(end)

    def _answer(self, id_: int) -> Answer:
        return self.answers.setdefault(id_, Answer())


@contextmanager
def engine_process(command: Sequence[str], **fields: Any) -> Iterator[EngineProcess]:
    """Start `command` as the router would, with these fields of its configuration."""
    folder = tempfile.mkdtemp(prefix="e-")  # not pytest's: an ipc path has only 107 bytes
    endpoint = f"ipc://{folder}/s"
    orders = {"model": "none", "replica": 0, "epoch": EPOCH} | fields
    config = EngineConfig(endpoint=endpoint, **orders)
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.bind(endpoint)
    process = start(command)
    assert process.stdin
    assert process.stderr
    try:
        process.stdin.write(encode_config(config))
        process.stdin.flush()
        yield EngineProcess(process, socket, config)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stderr):
            stream.close()
        socket.close()
        context.term()
        shutil.rmtree(folder)


def start(command: Sequence[str], stdout: int | None = None) -> subprocess.Popen[bytes]:
    """The process in the repository's root, with pipes for stdin and stderr."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        bufsize=0,
    )
