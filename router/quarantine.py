"""Prompts that killed engines, refused for a while before they reach another one.

Owns their digests. Must not know requests, engines or HTTP; time comes from the clock it is given.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from engine.protocol import pack_tokens

QUARANTINE_S: Final = 600.0
CAPACITY: Final = 1024  # prompts; the oldest make room


class Quarantine:
    """Invariant: at most `capacity` prompts, none older than `ttl_s` counts."""

    def __init__(
        self,
        clock: Callable[[], float],
        ttl_s: float = QUARANTINE_S,
        capacity: int = CAPACITY,
    ) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._capacity = capacity
        self._until_s: OrderedDict[bytes, float] = OrderedDict()  # in order of their ends

    def __len__(self) -> int:
        self._expire()
        return len(self._until_s)

    def add(self, model: str, salt: bytes, prompt: Sequence[int] | bytes) -> None:
        """Refuse this prompt of this model from now on. `prompt`: token ids, packed or not.

        The salt keeps apart whose prompt it is: one key's quarantine says nothing to another.
        """
        digest = _digest(model, salt, prompt)
        self._until_s[digest] = self._clock() + self._ttl_s
        self._until_s.move_to_end(digest)
        while len(self._until_s) > self._capacity:
            self._until_s.popitem(last=False)

    def holds(self, model: str, salt: bytes, prompt: Sequence[int] | bytes) -> bool:
        """Is it to be refused? Costs nothing while there is no quarantine."""
        return bool(self) and _digest(model, salt, prompt) in self._until_s

    def __bool__(self) -> bool:
        return len(self) > 0

    def _expire(self) -> None:
        now = self._clock()
        while self._until_s and next(iter(self._until_s.values())) <= now:
            self._until_s.popitem(last=False)


def _digest(model: str, salt: bytes, prompt: Sequence[int] | bytes) -> bytes:
    tokens = prompt if isinstance(prompt, bytes) else pack_tokens(prompt)
    head = b"%d %d " % (len(model.encode()), len(salt)) + model.encode() + salt
    return hashlib.blake2b(head + tokens, digest_size=16).digest()
