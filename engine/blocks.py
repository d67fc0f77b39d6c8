"""The KV cache's bookkeeping: who holds which block, which one is given away next.

Owns reference counts, the free order and the prefix index. Must not know sequences, the device or
the clock. A block is in exactly one of three states:

    held     count > 0: in the table of that many sequences (or the source of a planned copy)
    cached   count 0, content known to the index: evicted in least-recently-used order
    blank    count 0, content worthless: given away first

Blocks come back at once when they are released, also while a step in flight still touches them:
one device stream executes steps in order, so the next owner writes later.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from engine.prefix import TOKEN_BYTES, PrefixIndex
from engine.protocol import pack_tokens


class Hit(NamedTuple):
    """What of a text is cached: whole `blocks`, then `num_copied` tokens that start `source`.

    `source` is None without such a block; its tokens are to be copied, never shared.
    """

    blocks: list[int]
    source: int | None
    num_copied: int


MISS = Hit([], None, 0)


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free: the caller did not look first."""


class BlockPool:
    """Reference-counted blocks of `block_size` tokens with reuse of what they hold."""

    def __init__(self, num_blocks: int, block_size: int, index: PrefixIndex | None) -> None:
        """Without an `index` nothing is ever reused."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._index = index
        self._counts = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be hit."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    @property
    def reuses(self) -> bool:
        """Can `match` ever hit?"""
        return self._index is not None

    def root(self, salt: bytes) -> bytes:
        """First entry of a sequence's digest chain."""
        return b"" if self._index is None else self._index.root(salt)

    def match(self, tokens: list[int], chain: list[bytes], limit: int) -> Hit:
        """What is cached of `tokens[:limit]`; holds nothing and changes nothing but the memo.

        `chain` (see `request.Sequence`) is extended as far as digests were needed.
        """
        index = self._index
        if index is None:
            return MISS
        data = pack_tokens(tokens[:limit])
        step = self.block_size * TOKEN_BYTES
        blocks: list[int] = []
        for at in range(0, len(data) - step + 1, step):
            content = data[at : at + step]
            number = len(blocks)
            if len(chain) == number + 1:
                chain.append(index.extend(chain[number], content))
            block = index.find(chain[number + 1], chain[number], content)
            if block is None:
                break
            blocks.append(block)
        at = len(blocks) * step
        nearest = index.nearest(chain[len(blocks)], data[at : at + step])
        return Hit(blocks, None, 0) if nearest is None else Hit(blocks, *nearest)

    def acquire(self, hit: Hit, count: int, reserve: int) -> list[int] | None:
        """A table of `count` blocks that starts with the hit ones; the source is held too.

        None, and nothing changes, if fewer than `reserve` free blocks would be left.
        """
        counts = self._counts
        free = self.num_free - sum(not counts[block] for block in hit.blocks)
        if hit.source is not None:
            free -= not counts[hit.source]
        num_fresh = count - len(hit.blocks)
        if free - num_fresh < reserve:
            return None
        for block in hit.blocks:
            self._hold(block)
        if hit.source is not None:
            self._hold(hit.source)  # before anything is evicted
        return hit.blocks + self.take(num_fresh)

    def take(self, count: int) -> list[int]:
        """`count` blocks with worthless content, each held once. Raises `OutOfBlocks`."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} free")
        blocks: list[int] = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _unused = self._cached.popitem(last=False)
                self._forget(block)
            self._counts[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each; those given first are the first to be evicted.

        Raises RuntimeError for a block that nobody holds: the books are wrong.
        """
        counts = self._counts
        for block in blocks:
            if counts[block] == 0:
                raise RuntimeError(f"block {block} was released more often than held")
            counts[block] -= 1
            if counts[block] == 0:
                self._free(block)

    def seal(self, tokens: list[int], chain: list[bytes], number: int, block: int) -> None:
        """Offer the `number`-th block of `tokens`, which is computed whole, for reuse."""
        index = self._index
        if index is None:
            return
        start = number * self.block_size
        content = pack_tokens(tokens[start : start + self.block_size])
        if len(chain) == number + 1:
            chain.append(index.extend(chain[number], content))
        index.add(block, chain[number], chain[number + 1], content)

    def keep(self, tokens: list[int], chain: list[bytes], end: int, block: int) -> None:
        """Offer `block`, which ends with position `end - 1` of `tokens`, as a source of copies.

        For the last, partly filled block of a sequence that will write to it no more.
        """
        start = end - end % self.block_size
        if self._index is not None and start < end:
            parent = chain[start // self.block_size]
            self._index.add(block, parent, None, pack_tokens(tokens[start:end]))

    def forget(self, blocks: Iterable[int]) -> None:
        """These held blocks may contain garbage: nobody shall hit them again."""
        for block in blocks:
            self._forget(block)

    def reclaim(self) -> int:
        """Free every held block, to be called when nobody can be a holder; tells how many."""
        lost = [block for block, count in enumerate(self._counts) if count]
        for block in lost:
            self._counts[block] = 0
            self._free(block)
        return len(lost)

    def _hold(self, block: int) -> None:
        if self._counts[block] == 0:
            del self._cached[block]
        self._counts[block] += 1

    def _free(self, block: int) -> None:
        if self._index is not None and block in self._index:
            self._cached[block] = None
        else:
            self._blank.append(block)

    def _forget(self, block: int) -> None:
        if self._index is not None:
            self._index.drop(block)
