"""The queues of tools/fake_engine.py: scripted answers instead of a model.

Owns the fake's sequences and its counters. Must not know sockets, processes or the clock: time
comes in as `now`, the seconds of any steady clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from engine.config import EngineConfig
from engine.protocol import (
    BadFrame,
    Embedding,
    Finish,
    FinishReason,
    Limits,
    Logprobs,
    Pooling,
    Started,
    Stats,
    StepOutput,
    Submit,
    pack_floats,
    pack_tokens,
    unpack_tokens,
)
from tools.fake_script import Fault, Rule, Script
from tools.tiny_model import VOCAB_SIZE, decode_tokens


class FakeSequence:
    """One submit, its scripted answer, and how far it has come."""

    __slots__ = (
        "answer", "cached", "due_s", "ends", "faults", "generated", "id", "limit", "num_prompt",
        "pooling", "rule", "s_per_token", "sampling", "stop_ids", "tokens",
    )  # fmt: skip

    def __init__(self, submit: Submit, tokens: list[int], rule: Rule, s_per_token: float) -> None:
        self.id = submit.id
        self.tokens = tokens
        self.num_prompt = submit.num_prompt or len(tokens)
        self.rule = rule
        self.answer = rule.answer(submit, tokens[: self.num_prompt])
        if rule.finish == "stop" and submit.stop_ids and not rule.repeat:
            self.answer = [*self.answer, submit.stop_ids[0]]
        self.pooling = submit.pooling
        self.cached = min(rule.cached, self.num_prompt - 1) if self.pooling is None else 0
        self.generated = len(tokens) - self.num_prompt
        self.limit = self.generated + submit.max_new
        self.sampling = submit.sampling
        self.stop_ids = submit.stop_ids
        self.s_per_token = s_per_token
        self.due_s = 0.0
        self.faults: list[Fault] = []
        self.ends = 1  # how often its end is told

    def delay_s(self) -> float:
        """Seconds between the previous token, or the start, and the next one."""
        if self.generated < len(self.rule.delays_s):
            return self.rule.delays_s[self.generated]
        return self.rule.first_token_s if not self.generated else self.s_per_token

    @property
    def pooled_end(self) -> FinishReason:
        """How a sequence with pooling ends; only with `stop` there is a vector."""
        return "stop" if self.rule.finish == "length" else self.rule.finish

    def replace_next(self, token: int) -> None:
        """The next token to be generated becomes `token`."""
        at = self.generated
        self.answer = [*self.answer[:at], token, *self.answer[at + 1 :]]

    def next_token(self) -> tuple[int | None, Finish | None]:
        """Generates one token, None if there is no more, and the end if that was the last."""
        if self.pooling is not None:
            return None, Finish(self.id, self.pooled_end, self.rule.detail)
        at, answer, least = self.generated, self.answer, self.sampling.min_new
        if at >= self.limit:
            return None, Finish(self.id, "length")
        if not answer or (at >= len(answer) and at >= least and not self.rule.repeat):
            return None, Finish(self.id, self.rule.finish, self.rule.detail)
        token = answer[at % len(answer)]
        self.generated = at = at + 1
        if at >= least and token in self.stop_ids:
            return token, Finish(self.id, "stop")
        if at >= least and at >= len(answer) and not self.rule.repeat:
            return token, Finish(self.id, self.rule.finish, self.rule.detail)
        return token, Finish(self.id, "length") if at >= self.limit else None


class Outbox:
    """The columns of the step that is being made."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.tokens: list[int] = []
        self.finished: list[Finish] = []
        self.started: list[Started] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.embeddings: list[Embedding] = []

    def __bool__(self) -> bool:
        return bool(self.ids or self.finished or self.started)

    def message(self, epoch: int, stats: Stats) -> StepOutput:
        return StepOutput(
            epoch,
            stats.steps,
            tuple(self.ids),
            (),
            pack_tokens(self.tokens),
            tuple(self.finished),
            stats,
            tuple(self.started),
            tuple(self.logprobs),
            tuple(self.prompt_logprobs),
            tuple(self.embeddings),
        )


class FakeBatch:
    """What a scheduler and a device are in a real engine."""

    def __init__(self, script: Script, config: EngineConfig) -> None:
        self.running: dict[int, FakeSequence] = {}
        self.waiting: deque[FakeSequence] = deque()
        self.limits = Limits(
            max_len=script.max_len or config.max_len or 4096,
            vocab_size=script.vocab_size or VOCAB_SIZE,
            block_size=config.block_size,
            num_blocks=script.num_blocks,
            max_batch=script.max_batch or config.max_batch,
            device="fake",
            dtype="none",
            embedding_size=script.embedding_size,
            generates=script.generates,
        )
        self._script = script
        self._config = config
        self._outbox = Outbox()
        self._next_step_s = 0.0
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._hit_tokens = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting or self._outbox)

    def add(self, submit: Submit, now: float) -> None:
        """Queue a sequence; one that makes no sense ends with `error`."""
        try:
            tokens = unpack_tokens(submit.tokens)
        except BadFrame as error:
            self.end(submit.id, "error", str(error))
            return
        problem = self._problem(submit, tokens)
        if problem:
            self.end(submit.id, "error", problem)
            return
        prompt = decode_tokens(tokens[: submit.num_prompt or len(tokens)])
        rule = self._script.rule_for(prompt, self._config)
        speed = self._script.tokens_per_s if rule.tokens_per_s is None else rule.tokens_per_s
        sequence = FakeSequence(submit, tokens, rule, 1 / speed if speed else 0.0)
        sequence.limit = min(sequence.limit, self.limits.max_len - sequence.num_prompt)
        sequence.faults = [fault for fault in rule.faults if fault.concerns(self._config)]
        self.waiting.append(sequence)
        self._admit(now)

    def _problem(self, submit: Submit, tokens: list[int]) -> str:
        limits = self.limits
        if not tokens or len(tokens) > limits.max_len:
            return f"{len(tokens)} tokens do not fit into {limits.max_len}"
        if submit.pooling is None:
            return "" if limits.generates else "this model makes embeddings only"
        return "" if limits.embedding_size else "this model makes no embeddings"

    def abort(self, ids: tuple[int, ...], now: float) -> None:
        """End these sequences; unknown ids are ignored."""
        gone = set(ids)
        for sequence in [s for s in (*self.running.values(), *self.waiting) if s.id in gone]:
            self.end(sequence.id, "abort")
            self.running.pop(sequence.id, None)
        self.waiting = deque(s for s in self.waiting if s.id not in gone)
        self._admit(now)

    def end(self, id_: int, reason: FinishReason, detail: str = "") -> None:
        """Tell an end with the next message."""
        self._outbox.finished.append(Finish(id_, reason, detail))

    def wait_s(self, now: float) -> float | None:
        """How long nothing will be due; None: until something arrives."""
        if self._outbox:
            return 0.0
        if not self.running:
            return None
        due_s = min(sequence.due_s for sequence in self.running.values())
        return max(0.0, max(due_s, self._next_step_s) - now)

    def take_faults(self, now: float) -> list[tuple[FakeSequence, Fault]]:
        """Faults whose moment has come; none of them is given again."""
        if now < self._next_step_s:
            return []
        found: list[tuple[FakeSequence, Fault]] = []
        for sequence in self.running.values():
            if sequence.faults and sequence.due_s <= now:
                due = [f for f in sequence.faults if f.at_token == sequence.generated]
                sequence.faults = [f for f in sequence.faults if f not in due]
                found += [(sequence, fault) for fault in due]
        return found

    def step(self, now: float) -> StepOutput | None:
        """One token for every sequence that is due, as one message; None if there is no news."""
        if now >= self._next_step_s:
            due = [sequence for sequence in self.running.values() if sequence.due_s <= now]
            for sequence in due:
                self._generate(sequence, now)
            if due:
                self._steps += 1
                self._next_step_s = now + self._script.step_ms / 1e3
                self._admit(now)
        if not self._outbox:
            return None
        outbox, self._outbox = self._outbox, Outbox()
        return outbox.message(self._config.epoch, self.stats())

    def stats(self) -> Stats:
        block = self.limits.block_size
        held = sum(
            (sequence.num_prompt + sequence.generated + block - 1) // block
            for sequence in self.running.values()
        )
        return Stats(
            waiting=len(self.waiting),
            running=len(self.running),
            blocks_total=self.limits.num_blocks,
            blocks_held=held,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_query_tokens=self._prompt_tokens,
            prefix_hit_tokens=self._hit_tokens,
        )

    def _admit(self, now: float) -> None:
        while self.waiting and len(self.running) < self.limits.max_batch:
            sequence = self.waiting.popleft()
            sequence.due_s = now + sequence.delay_s()
            self.running[sequence.id] = sequence
            self._prompt_tokens += sequence.num_prompt
            self._hit_tokens += sequence.cached
            self._outbox.started.append(Started(sequence.id, sequence.cached))
            rivals = sequence.sampling.prompt_logprobs
            if rivals >= 0:
                tokens = sequence.tokens[1 : sequence.num_prompt]
                made_up = self._logprobs(sequence.id, 1, tokens, rivals)
                self._outbox.prompt_logprobs.append(made_up)

    def _generate(self, sequence: FakeSequence, now: float) -> None:
        token, finish = sequence.next_token()
        if token is not None:
            self._generated_tokens += 1
            self._outbox.ids.append(sequence.id)
            self._outbox.tokens.append(token)
            rivals = sequence.sampling.logprobs
            if rivals >= 0:
                at = sequence.num_prompt + sequence.generated - 1
                self._outbox.logprobs.append(self._logprobs(sequence.id, at, [token], rivals))
        if sequence.pooling is not None and sequence.pooled_end == "stop":
            values = fake_embedding(sequence.tokens, sequence.pooling, self.limits.embedding_size)
            self._outbox.embeddings.append(Embedding(sequence.id, values))
        if finish is None:
            sequence.due_s = now + sequence.delay_s()
        else:
            self._outbox.finished += [finish] * sequence.ends
            del self.running[sequence.id]

    def _logprobs(self, id_: int, start: int, tokens: list[int], rivals: int) -> Logprobs:
        """Made up: a token's log-probability depends on its id alone, and it is the best one."""
        chosen = [-0.125 - token % 16 / 64 for token in tokens]
        ids = [(t + j) % self.limits.vocab_size for t in tokens for j in range(rivals)]
        top = [logprob - 1.5 * j for logprob in chosen for j in range(rivals)]
        return Logprobs(id_, start, pack_floats(chosen), pack_tokens(ids), pack_floats(top))


def fake_embedding(tokens: Sequence[int], pooling: Pooling, size: int) -> bytes:
    """A vector that depends on the tokens and on how they are to be pooled."""
    kinds = {"mean": sum(tokens) / len(tokens), "cls": tokens[0], "last": tokens[-1]}
    values = [1 + kinds[pooling.kind] * (i + 1) % 7 for i in range(size)]
    values = values[: pooling.dimensions or size]
    length = math.hypot(*values) if pooling.normalize else 1
    return pack_floats([value / length for value in values])
