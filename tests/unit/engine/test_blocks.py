"""engine.blocks: counts, order of eviction, reuse."""

from __future__ import annotations

import pytest

from engine.blocks import MISS, BlockPool, Hit, OutOfBlocks
from engine.prefix import PrefixIndex
from tests.fakes import check_pool, make_limits, make_pool

TEXT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]  # two full blocks of four and a half one


def pool_of(num_blocks: int, *, prefix_cache: bool = True) -> BlockPool:
    return make_pool(make_limits(num_blocks=num_blocks), prefix_cache=prefix_cache)


def cache(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """As a sequence that computes `tokens` and ends; returns its blocks."""
    chain = [pool.root(salt)]
    blocks = pool.take(-(-len(tokens) // pool.block_size))
    for number in range(len(tokens) // pool.block_size):
        pool.seal(tokens, chain, number, blocks[number])
    pool.keep(tokens, chain, len(tokens), blocks[-1])
    pool.release(reversed(blocks))
    return blocks


def match(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> Hit:
    return pool.match(tokens, [pool.root(salt)], len(tokens))


def test_take_and_release_return_to_the_start() -> None:
    pool = pool_of(3)
    first, second = pool.take(1), pool.take(2)
    assert sorted(first + second) == [0, 1, 2]
    assert (pool.num_free, pool.num_held, pool.num_cached) == (0, 3, 0)
    pool.release(first)
    pool.release(second)
    check_pool(pool, [])
    assert pool.num_free == 3


def test_taking_too_many_changes_nothing() -> None:
    pool = pool_of(2)
    with pytest.raises(OutOfBlocks):
        pool.take(3)
    check_pool(pool, [])


def test_a_second_release_is_a_broken_book() -> None:
    pool = pool_of(2)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="more often than held"):
        pool.release(blocks)


def test_a_text_is_matched_by_blocks_and_then_by_tokens() -> None:
    pool = pool_of(8)
    blocks = cache(pool, TEXT)
    assert match(pool, TEXT) == Hit(blocks[:2], blocks[2], 2)
    assert match(pool, [*TEXT[:9], 99]) == Hit(blocks[:2], blocks[2], 1)
    assert match(pool, TEXT[:8]) == Hit(blocks[:2], None, 0)
    assert match(pool, TEXT[:7]) == Hit(blocks[:1], blocks[1], 3)
    assert match(pool, [*TEXT[:4], 99]) == Hit(blocks[:1], None, 0)
    assert match(pool, [5, 6, 99]) == Hit([], blocks[0], 2)
    assert match(pool, [99]) == MISS
    check_pool(pool, [])


def test_the_limit_is_a_number_of_tokens() -> None:
    pool = pool_of(8)
    blocks = cache(pool, TEXT)
    chain = [pool.root(b"")]
    assert pool.match(TEXT, chain, 8) == Hit(blocks[:2], None, 0)
    assert pool.match(TEXT, chain, 7) == Hit(blocks[:1], blocks[1], 3)
    assert pool.match(TEXT, chain, 0) == MISS


def test_the_digest_memo_is_extended_and_used_again() -> None:
    pool = pool_of(8)
    blocks = cache(pool, TEXT)
    chain = [pool.root(b"")]
    first = pool.match(TEXT, chain, len(TEXT))
    assert len(chain) == 3
    assert pool.match(TEXT, chain, len(TEXT)) == first == Hit(blocks[:2], blocks[2], 2)
    assert len(chain) == 3


def test_salts_share_nothing() -> None:
    pool = pool_of(8)
    blocks = cache(pool, TEXT, b"mine")
    assert match(pool, TEXT, b"yours") == MISS
    assert match(pool, TEXT, b"mine").blocks == blocks[:2]


def test_without_an_index_nothing_is_reused() -> None:
    pool = pool_of(8, prefix_cache=False)
    assert not pool.reuses
    cache(pool, TEXT)
    assert match(pool, TEXT) == MISS
    assert pool.num_cached == 0
    check_pool(pool, [])


def test_blank_blocks_go_first_then_the_least_recently_used_tail_first() -> None:
    pool = pool_of(6)
    old, young = cache(pool, [1, 1, 1, 1, 2, 2, 2, 2]), cache(pool, [3, 3, 3, 3, 4, 4, 4, 4])
    assert pool.num_cached == 4
    blank = pool.take(2)
    assert not set(blank) & set(old + young)
    assert pool.take(4) == [old[1], old[0], young[1], young[0]]


def test_a_hit_makes_blocks_young_again() -> None:
    pool = pool_of(4)
    old, young = cache(pool, [1] * 8), cache(pool, [3] * 8)
    held = pool.acquire(match(pool, [1] * 8), 2, 0)
    assert held == old
    pool.release(reversed(old))
    assert pool.take(4) == [young[1], young[0], old[1], old[0]]


def test_an_evicted_block_is_hit_no_more() -> None:
    pool = pool_of(3)
    cache(pool, TEXT)
    taken = pool.take(3)
    assert match(pool, TEXT) == MISS
    check_pool(pool, [taken])


def test_a_held_block_can_be_shared_and_outlives_its_first_holder() -> None:
    pool = pool_of(4)
    chain = [pool.root(b"")]
    mine = pool.take(2)
    pool.seal(TEXT, chain, 0, mine[0])
    yours = pool.acquire(match(pool, TEXT[:6]), 2, 0)
    assert yours is not None
    assert yours[0] == mine[0]
    check_pool(pool, [mine, yours])
    pool.release(reversed(mine))
    check_pool(pool, [yours])
    assert pool.num_held == 2


def test_content_computed_twice_stays_known_once() -> None:
    pool = pool_of(4)
    chain = [pool.root(b"")]
    mine, yours = pool.take(1), pool.take(1)
    pool.seal(TEXT, chain, 0, mine[0])
    pool.seal(TEXT, chain, 0, yours[0])
    pool.release(yours)
    assert match(pool, TEXT[:4]).blocks == mine
    assert pool.num_cached == 0
    check_pool(pool, [mine])


def test_acquire_counts_cached_hits_as_taken_and_keeps_the_reserve() -> None:
    pool = pool_of(4)
    cache(pool, [1] * 8)
    hit = match(pool, [1] * 8)
    assert pool.acquire(hit, 5, 0) is None
    assert pool.acquire(hit, 4, 1) is None
    check_pool(pool, [])
    blocks = pool.acquire(hit, 4, 0)
    assert blocks is not None
    assert blocks[:2] == hit.blocks
    check_pool(pool, [blocks])


def test_the_source_of_a_copy_is_never_its_target() -> None:
    """The last free block but one is the source: it must not be evicted for the copy itself."""
    pool = pool_of(2)
    blocks = cache(pool, TEXT[:6])
    hit = match(pool, [*TEXT[:3], 99, 99])
    assert hit == Hit([], blocks[0], 3)
    assert pool.acquire(hit, 2, 0) is None, "one block is the source, one is left"
    table = pool.acquire(hit, 1, 0)
    assert table == [blocks[1]]
    check_pool(pool, [[blocks[0]], table])
    pool.release([blocks[0]])
    assert match(pool, TEXT[:4]) == Hit([blocks[0]], None, 0)


def test_forgotten_blocks_are_blank_once_released() -> None:
    pool = pool_of(4)
    blocks = cache(pool, TEXT)
    table = pool.acquire(match(pool, TEXT[:8]), 2, 0)
    assert table == blocks[:2]
    pool.forget(table)
    assert match(pool, TEXT) == MISS
    pool.release(table)
    check_pool(pool, [])
    assert pool.num_cached == 1  # the tail, which can be found no more, ages


def test_a15_reclaim_heals_a_leak_and_tells_its_size() -> None:
    pool = pool_of(4)
    cache(pool, TEXT)
    assert pool.acquire(match(pool, TEXT[:4]), 2, 0)
    assert pool.reclaim() == 2
    check_pool(pool, [])
    assert pool.reclaim() == 0


def test_an_index_is_not_shared_between_pools() -> None:
    one, two = BlockPool(4, 4, PrefixIndex(b"a")), BlockPool(4, 4, PrefixIndex(b"a"))
    cache(one, TEXT)
    assert match(two, TEXT) == MISS
