"""Grammars are made in processes of their own, which may die of what a client wants compiled.

`GrammarProcesses.make` is `router.text.grammar.make` over there: a grammar that takes the compiler
more than `cpu_s` seconds of its time or `MEMORY_BYTES`, or that ends its process, is refused, and
nobody else notices. Owns these processes, started when first needed, each with one socket, whose
end ends it, and the threads that wait for them: those of other texts would be held up. Must not
know HTTP, models or engines.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import msgspec

from router import logs
from router.errors import GrammarError, Overloaded
from router.text.grammar import Kind, Make, make
from router.text.pool import TextPool

P = ParamSpec("P")
T = TypeVar("T")

CPU_S: Final = 5.0  # of one grammar
PATIENCE_S: Final = 9.0  # with one, on a machine that has more to do
THREADS: Final = 2  # so many grammars at a time
MAX_WAITING: Final = 64
WAIT_S: Final = 60.0  # for all those before it
MEMORY_BYTES: Final = 1 << 30
_LENGTH: Final = struct.Struct(">I")
_COMMAND: Final = (sys.executable, "-m", "router.text.grammar_process")


class _Answer(msgspec.Struct, frozen=True):
    """One of the two."""

    grammar: str = ""
    fault: str = ""


class _Died(Exception):
    """The process ended, or had to be ended, before it answered."""

    def __init__(self, cause: str, *, too_long: bool = False) -> None:
        super().__init__(cause)
        self.too_long = too_long


class GrammarProcesses:
    """`run` is for the event loop, `make` for threads; one job of a process at a time."""

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        cpu_s: float = CPU_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`environment`: all that the processes know of ours."""
        self._environment = environment
        self._cpu_s = cpu_s
        self._patience_s = patience_s
        self._pool = TextPool(threads=THREADS, max_waiting=MAX_WAITING, limit_s=WAIT_S)
        self._lock = threading.Lock()  # guards the rest
        self._all: set[_Child] = set()
        self._idle: list[_Child] = []
        self._closed = False

    async def run(
        self, function: Callable[Concatenate[Make, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`function(make, ...)`, in a thread. Raises what it raises, and as `TextPool.run` does."""
        return await self._pool.run(function, self.make, *args, **kwargs)

    def make(self, kind: Kind, value: Any) -> str:
        """As `router.text.grammar.make`. Raises GrammarError, and Overloaded if no process starts.

        One that died is no proof, since somebody else may have ended it: it is tried once more.
        """
        order = _encode([kind, value, self._cpu_s])
        for _ in range(2):
            child = self._take()
            try:
                answer = child.ask(order, self._patience_s)
            except _Died as error:
                self._drop(child)
                logs.warning("grammar_process_died", cause=str(error))
                if error.too_long:
                    raise GrammarError(
                        f"It takes more than {self._cpu_s:g} s to compile."
                    ) from error
                continue
            except BaseException:
                self._drop(child)
                raise
            self._put_back(child)
            if answer.fault:
                raise GrammarError(answer.fault)
            return answer.grammar
        raise GrammarError("It cannot be compiled.")

    def pids(self) -> list[int]:
        """Of the processes that live."""
        with self._lock:
            return [child.pid for child in self._all]

    def close(self) -> None:
        """Ends them all; who waits for one is refused."""
        self._pool.close()
        with self._lock:
            self._closed = True
            doomed = list(self._all)
        for child in doomed:
            child.kill()

    def _take(self) -> _Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._closed:
                raise Overloaded("The server is stopping.")
            try:
                child = _Child(self._environment)
            except OSError as error:
                raise Overloaded("The process that compiles grammars does not start.") from error
            self._all.add(child)
            return child

    def _put_back(self, child: _Child) -> None:
        with self._lock:
            self._idle.append(child)

    def _drop(self, child: _Child) -> None:
        with self._lock:
            self._all.discard(child)
        child.kill()


class _Child:
    """One process and our end of its socket."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Raises OSError."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    _COMMAND,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=dict(environment),
                    start_new_session=True,
                )
            except OSError:
                self._socket.close()
                raise

    @property
    def pid(self) -> int:
        return self._popen.pid

    def ask(self, order: bytes, patience_s: float) -> _Answer:
        """Its answer. Raises _Died."""
        try:
            self._socket.settimeout(patience_s)
            self._socket.sendall(order)
            frame = _receive(self._socket)
        except TimeoutError as error:
            raise _Died(f"no answer within {patience_s:g} s", too_long=True) from error
        except OSError as error:
            raise _Died(self._end()) from error
        if frame is None:
            cause = self._end()
            raise _Died(cause, too_long=self._popen.returncode == -signal.SIGPROF)
        return msgspec.json.decode(frame, type=_Answer)

    def kill(self) -> None:
        """Ends and reaps it; more than once does no harm."""
        self._popen.kill()
        self._popen.wait()
        self._socket.close()

    def _end(self) -> str:
        """How it ended: it closed its socket, so it is about to if it has not yet."""
        try:
            code = self._popen.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _encode(order: list[Any]) -> bytes:
    try:
        text = json.dumps(order, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError("It is not valid JSON.") from error
    return _LENGTH.pack(len(text)) + text


def _receive(connection: socket.socket) -> bytes | None:
    """The next frame; None at the end of the stream."""
    head = _read(connection, _LENGTH.size)
    return None if head is None else _read(connection, *_LENGTH.unpack(head))


def _read(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 16))
        if not part:
            return None
        data += part
    return bytes(data)


# -- the other side


def serve(connection: socket.socket) -> None:
    """Makes what is asked for until the router closes its end, or is gone."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is in
    while (order := _receive(connection)) is not None:
        kind, value, cpu_s = json.loads(order)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        answer = msgspec.json.encode(_answer(kind, value))
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(_LENGTH.pack(len(answer)) + answer)


def _answer(kind: Kind, value: Any) -> _Answer:
    try:
        return _Answer(grammar=make(kind, value))
    except GrammarError as error:
        return _Answer(fault=error.message)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(socket.socket(fileno=sys.stdin.fileno()))
