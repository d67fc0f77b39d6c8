"""One sequence on its way through the engine.

The scheduler owns every instance and is the only one that changes them. Must not know the pool,
the device or the socket. Stored are facts only; what follows from them is a property.
"""

from __future__ import annotations

from typing import Literal

from engine.grammar import Matcher
from engine.protocol import Submit

Phase = Literal["waiting", "running", "ended"]


class Sequence:
    """Tokens known to the host and how far the device has come with them.

    There is no prefill phase: `scheduled` has to catch up with the tokens. Positions below
    `computed` have their keys and values in the cache for sure, those from there to `scheduled`
    belong to steps in flight. A device row may refer to a token that the host has not seen yet,
    so `scheduled` may exceed the number of known tokens minus one.

    `chain[i]` is the digest of the first i full blocks: a memo, valid for ever because tokens are
    only appended.
    """

    __slots__ = (
        "blocks",
        "chain",
        "computed",
        "ended",
        "id",
        "matcher",
        "max_total",
        "num_kv",
        "num_prompt",
        "pooling",
        "prompt_reported",
        "rank",
        "sampling",
        "scheduled",
        "slot",
        "started",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        submit: Submit,
        tokens: list[int],
        max_total: int,
        arrival: int,
        root: bytes,
        matcher: Matcher | None = None,
    ) -> None:
        """`tokens` are the submit's, decoded; at most `max_total` tokens will ever be known.

        `max_total` equal to the number of tokens means that nothing is to be generated. `matcher`
        has seen the generated ones of `tokens`.
        """
        self.id = submit.id
        self.tokens = tokens
        self.num_prompt = submit.num_prompt or len(tokens)
        self.max_total = max_total
        # Positions that ever need keys and values: the last token to come needs none.
        self.num_kv = max_total - 1 if max_total > len(tokens) else len(tokens)
        self.sampling = submit.sampling
        self.stop_ids = submit.stop_ids
        self.pooling = submit.pooling
        self.matcher = matcher
        # The lowest runs first and is preempted last.
        self.rank = (submit.pooling is not None, submit.priority, arrival)
        self.chain = [root]
        self.blocks: list[int] = []
        self.slot: int | None = None
        self.scheduled = 0
        self.computed = 0
        self.started = False  # left the waiting queue at least once
        self.ended = False
        self.prompt_reported = 1  # prompt positions told; the first one has no log-probability

    def append(self, token: int) -> None:
        """A generated token has become known."""
        self.tokens.append(token)
        if self.matcher is not None:
            self.matcher.advance(token)

    @property
    def length(self) -> int:
        """Tokens known to the host."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Generated tokens known to the host, those of an earlier engine included."""
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated, those in flight included."""
        return self.max_total - len(self.tokens)

    @property
    def inflight(self) -> int:
        """Sampled tokens that steps in flight will bring: 0, 1, or 2 between plan and commit."""
        if not self.generates:
            return 0
        return max(0, self.scheduled - len(self.tokens) + 1)

    @property
    def generates(self) -> bool:
        """Is any token to be generated at all?"""
        return self.max_total > self.num_kv

    @property
    def phase(self) -> Phase:
        """Which queue holds it."""
        if self.ended:
            return "ended"
        return "waiting" if self.slot is None else "running"

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Are there prompt positions whose logits must still be computed for the client?"""
        return self.sampling.prompt_logprobs >= 0 and self.prompt_reported < self.num_prompt
