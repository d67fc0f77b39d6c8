"""Submits whose grammars are being compiled, by a thread of their own.

Owns that thread and the submits on their way through it; each leaves by `take` or `abort`, once.
Compiling takes milliseconds, seldom a second, and running sequences must not wait for it. It is the
only thread beside the engine's loop, and touches nothing but grammars. Must not know the scheduler.
"""

from __future__ import annotations

from collections import deque
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from engine.grammar import GrammarError, Grammars, Matcher
from engine.protocol import BadFrame, Submit, Vocabulary, unpack_tokens


class Compiled(NamedTuple):
    """A submit and its matcher; None if it cannot run, for the reason `problem`."""

    submit: Submit
    matcher: Matcher | None
    problem: str = ""


class Compiling:
    """First come, first served."""

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size`: ids of the model."""
        self._vocab_size = vocab_size
        self._pending: dict[int, Submit] = {}
        self._todo: SimpleQueue[Submit | Vocabulary] = SimpleQueue()
        self._done: deque[Compiled] = deque()
        self._thread: Thread | None = None
        self._grammars: Grammars | None = None  # the thread's
        self._problem = "a grammar came before the model's vocabulary"  # why there is none

    @property
    def busy(self) -> bool:
        """Is there a submit that `take` has not given yet?"""
        return bool(self._pending)

    def learn(self, vocabulary: Vocabulary) -> None:
        """The vocabulary of all grammars from here on."""
        self._put(vocabulary)

    def begin(self, submit: Submit) -> bool:
        """Takes a submit with a grammar; False if its id is on its way already."""
        if submit.id in self._pending:
            return False
        self._pending[submit.id] = submit
        self._put(submit)
        return True

    def abort(self, ids: tuple[int, ...]) -> list[int]:
        """Forgets these submits; returns the ids of those that were here."""
        return [i for i in ids if self._pending.pop(i, None) is not None]

    def take(self) -> list[Compiled]:
        """Those that are ready, in the order of their arrival."""
        ready: list[Compiled] = []
        while self._done:
            compiled = self._done.popleft()
            # An aborted one is not pending any more, or another one has its id.
            if self._pending.get(compiled.submit.id) is compiled.submit:
                del self._pending[compiled.submit.id]
                ready.append(compiled)
        return ready

    def _put(self, item: Submit | Vocabulary) -> None:
        self._todo.put(item)
        if self._thread is None or not self._thread.is_alive():
            # A daemon: what it compiles when the engine leaves is of no use to anybody.
            self._thread = Thread(target=self._work, name="grammars", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            item = self._todo.get()
            if isinstance(item, Vocabulary):
                self._learn(item)
                continue
            compiled = Compiled(item, None, "the grammar cannot be compiled")
            try:
                compiled = self._compile(item)
            finally:  # whatever happens, the submit gets its end
                self._done.append(compiled)

    def _learn(self, vocabulary: Vocabulary) -> None:
        try:
            self._grammars = Grammars(vocabulary, self._vocab_size)
        except (GrammarError, BadFrame) as error:
            self._grammars, self._problem = None, str(error)

    def _compile(self, submit: Submit) -> Compiled:
        if self._grammars is None:
            return Compiled(submit, None, self._problem)
        try:
            tokens = unpack_tokens(submit.tokens)
            generated = tokens[submit.num_prompt :] if submit.num_prompt else []
            min_new = submit.sampling.min_new
            matcher = self._grammars.matcher(submit.grammar, generated, submit.stop_ids, min_new)
        except (GrammarError, BadFrame) as error:
            return Compiled(submit, None, str(error))
        return Compiled(submit, matcher)
