"""engine.blocks and engine.prefix as a state machine, against a model that remembers everything.

The model keeps the whole text behind every block that may be hit. Two tokens and tiny blocks make
texts collide often, a tiny pool makes every block change hands often.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from engine.blocks import BlockPool, Hit
from engine.prefix import PrefixIndex
from tests.fakes import KEY, check_pool

Text = tuple[int, ...]
texts = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def shared(left: Text, right: Text) -> int:
    """Length of the common start."""
    return next(
        (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


@dataclass(eq=False)
class Table:
    """One sequence: its tokens, how far they are computed, its blocks."""

    tokens: list[int]
    salt: bytes
    chain: list[bytes]
    blocks: list[int]
    computed: int


class PoolMachine(RuleBasedStateMachine):
    """Sequences are opened on what is cached, computed, prolonged and closed in any order."""

    tables: Bundle[Table] = Bundle("tables")

    @initialize(num_blocks=st.integers(2, 7), size=st.integers(1, 3))
    def start(self, num_blocks: int, size: int) -> None:
        self.size = size
        self.pool = BlockPool(num_blocks, size, PrefixIndex(KEY))
        self.open: list[Table] = []
        # What the device holds, and the text (salt, tokens) of the blocks that can be hit.
        self.memory: dict[int, list[Text | None]] = {b: [None] * size for b in range(num_blocks)}
        self.hittable: dict[int, tuple[bytes, Text]] = {}

    @rule(target=tables, tokens=texts, salt=st.sampled_from([b"", b"s"]), reserve=st.integers(0, 2))
    def begin(self, tokens: list[int], salt: bytes, reserve: int) -> object:
        chain = [self.pool.root(salt)]
        hit = self.pool.match(tokens, chain, len(tokens) - 1)
        self.check_hit(hit, salt, tokens)
        count = -(-len(tokens) // self.size)
        held = {block for table in self.open for block in table.blocks}
        wanted = set(hit.blocks) | ({hit.source} - {None})
        left = self.pool.num_free - len(wanted - held) - (count - len(hit.blocks))
        blocks = self.pool.acquire(hit, count, reserve)
        assert (blocks is None) == (left < reserve)
        if blocks is None:
            return multiple()
        fresh = blocks[len(hit.blocks) :]
        assert hit.source not in fresh
        self.taken(fresh)
        if hit.source is not None:
            kept = self.memory[hit.source][: hit.num_copied]
            self.memory[fresh[0]] = kept + [None] * (self.size - len(kept))
            self.pool.release([hit.source])
        computed = len(hit.blocks) * self.size + hit.num_copied
        table = Table(list(tokens), salt, chain, blocks, computed)
        self.open.append(table)
        return table

    @rule(table=tables, count=st.integers(1, 4))
    def compute(self, table: Table, count: int) -> None:
        start, end = table.computed, min(table.computed + count, len(table.tokens))
        for position in range(start, end):
            number, offset = divmod(position, self.size)
            self.memory[table.blocks[number]][offset] = tuple(table.tokens[: position + 1])
        for number in range(start // self.size, end // self.size):
            block, text = table.blocks[number], tuple(table.tokens[: (number + 1) * self.size])
            self.pool.seal(table.tokens, table.chain, number, block)
            if (table.salt, text) not in self.hittable.values():
                self.hittable[block] = (table.salt, text)
        table.computed = end

    @rule(table=tables, token=st.integers(0, 1))
    def prolong(self, table: Table, token: int) -> None:
        if table.computed < len(table.tokens):
            return
        if len(table.tokens) == len(table.blocks) * self.size:
            if self.pool.num_free == 0:
                return
            blocks = self.pool.take(1)
            self.taken(blocks)
            table.blocks += blocks
        table.tokens.append(token)

    @rule(table=consumes(tables), broken=st.booleans())
    def close(self, table: Table, broken: bool) -> None:
        """As the scheduler does at an end or a preemption, or after a failure."""
        start = table.computed - table.computed % self.size
        if broken:
            self.pool.forget(table.blocks)
            for block in table.blocks:
                self.hittable.pop(block, None)
        elif start < table.computed:
            block = table.blocks[start // self.size]
            self.pool.keep(table.tokens, table.chain, table.computed, block)
            text = tuple(table.tokens[: table.computed])
            if not any(
                salt == table.salt
                and self.parent(known) == text[:start]
                and known[: len(text)] == text
                for salt, known in self.hittable.values()
            ):
                self.hittable[block] = (table.salt, text)
        self.pool.release(reversed(table.blocks))
        self.open.remove(table)

    def taken(self, blocks: list[int]) -> None:
        """These blocks have a new owner: whatever was there is gone."""
        for block in blocks:
            self.hittable.pop(block, None)
            self.memory[block] = [None] * self.size

    def parent(self, text: Text) -> Text:
        """What comes before the last block of a text."""
        return text[: (len(text) - 1) // self.size * self.size]

    def check_hit(self, hit: Hit, salt: bytes, tokens: list[int]) -> None:
        """Neither more nor less was found than there is, and the device really holds it."""
        limit = tuple(tokens[:-1])
        known = {text: block for block, (of, text) in self.hittable.items() if of == salt}
        num_full = 0
        while limit[: (num_full + 1) * self.size] in known and (
            (num_full + 1) * self.size <= len(limit)
        ):
            num_full += 1
        start = num_full * self.size
        assert hit.blocks == [known[limit[: (n + 1) * self.size]] for n in range(num_full)]
        rest = limit[start : start + self.size]
        best = max(
            (
                shared(text[start:], rest)
                for text in known
                if len(text) > start and self.parent(text) == limit[:start]
            ),
            default=0,
        )
        assert hit.num_copied == best
        found = list(hit.blocks) + ([] if hit.source is None else [hit.source])
        for position in range(start + best):
            number, offset = divmod(position, self.size)
            assert self.memory[found[number]][offset] == limit[: position + 1]

    @invariant()
    def the_books_agree(self) -> None:
        check_pool(self.pool, [table.blocks for table in self.open])

    @invariant()
    def what_can_be_hit_never_changes(self) -> None:
        index = self.pool._index
        assert index is not None
        assert set(index._entries) == set(self.hittable)
        for block, (_salt, text) in self.hittable.items():
            start = len(self.parent(text))
            expected = [text[: end + 1] for end in range(start, len(text))]
            assert self.memory[block][: len(expected)] == expected

    def teardown(self) -> None:
        for table in list(self.open):
            self.close(table, broken=False)
        self.the_books_agree()
        assert self.pool.num_held == 0


TestPool = PoolMachine.TestCase
