"""Which block holds the keys and values of which tokens after which tokens.

Owns the digest chain and the index from content to block. Must not know reference counts, free
order or sequences: `blocks.BlockPool` tells it what to remember and what to forget.

A full block is found by the digest of (digest of all blocks before it, its tokens); the root
digest holds the tenant's salt. Digests are keyed by random bytes of this start, so that nobody
can make two texts collide, and the tokens themselves are compared at each hit. Below every digest
hang the blocks that continue it, full or partial, sorted by their tokens: the one that shares most
with a given text is a neighbour of that text in the sorted order, which gives the granularity of
a radix tree with two flat dictionaries.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from typing import NamedTuple

TOKEN_BYTES = 4
_DIGEST_BYTES = 32
_FIRST = -1  # sorts before every block number


class Nearest(NamedTuple):
    """Block `block` starts with `num_tokens` of the wanted tokens (at least one)."""

    block: int
    num_tokens: int


class _Entry(NamedTuple):
    parent: bytes  # digest of everything before the block
    digest: bytes | None  # of everything up to its end; None for a partial block
    tokens: bytes


class PrefixIndex:
    """Content → block, for at most one block per content. Tokens are packed int32."""

    def __init__(self, key: bytes) -> None:
        """`key`: random bytes, at most 64, fresh for every start."""
        self._key = key
        self._entries: dict[int, _Entry] = {}
        self._full: dict[bytes, int] = {}
        self._children: dict[bytes, list[tuple[bytes, int]]] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def root(self, salt: bytes) -> bytes:
        """The digest before the first block: texts with different salts share nothing."""
        return self._digest(salt, b"root")

    def extend(self, parent: bytes, tokens: bytes) -> bytes:
        """The digest after one more full block."""
        return self._digest(parent + tokens, b"block")  # unambiguous: the parent's size is fixed

    def find(self, digest: bytes, parent: bytes, tokens: bytes) -> int | None:
        """The full block with this digest, if its content is really the same."""
        block = self._full.get(digest)
        if block is None:
            return None
        entry = self._entries[block]
        return block if entry.tokens == tokens and entry.parent == parent else None

    def nearest(self, parent: bytes, tokens: bytes) -> Nearest | None:
        """The block after `parent` that shares the longest start with `tokens`, if any does."""
        children = self._children.get(parent)
        if not children or not tokens:
            return None
        at = bisect_left(children, (tokens, _FIRST))
        best: Nearest | None = None
        for content, block in children[max(0, at - 1) : at + 1]:
            shared = common_tokens(content, tokens)
            if shared and (best is None or shared > best.num_tokens):
                best = Nearest(block, shared)
        return best

    def add(self, block: int, parent: bytes, digest: bytes | None, tokens: bytes) -> bool:
        """Remember a computed block; `digest` is None for a partial one.

        False, and nothing changes, if another block has that content already.
        """
        children = self._children.get(parent, [])
        at = bisect_left(children, (tokens, _FIRST))
        if digest is None:
            known = at < len(children) and children[at][0].startswith(tokens)
        else:
            known = digest in self._full
        if known:
            return False
        if digest is not None:
            self._full[digest] = block
        children.insert(at, (tokens, block))
        self._children[parent] = children
        self._entries[block] = _Entry(parent, digest, tokens)
        return True

    def drop(self, block: int) -> None:
        """Forget a block, if it is known, because its content is about to change."""
        entry = self._entries.pop(block, None)
        if entry is None:
            return
        if entry.digest is not None:
            del self._full[entry.digest]
        children = self._children[entry.parent]
        del children[bisect_left(children, (entry.tokens, block))]
        if not children:
            del self._children[entry.parent]

    def _digest(self, data: bytes, kind: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=self._key, person=kind).digest()


def common_tokens(left: bytes, right: bytes) -> int:
    """How many packed tokens two byte strings share from their start."""
    shortest = min(len(left), len(right))
    if left[:shortest] == right[:shortest]:
        return shortest // TOKEN_BYTES
    differing = int.from_bytes(left[:shortest], "little") ^ int.from_bytes(
        right[:shortest], "little"
    )
    first_bit = (differing & -differing).bit_length() - 1
    return first_bit // (8 * TOKEN_BYTES)
