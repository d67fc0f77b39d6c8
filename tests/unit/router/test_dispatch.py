"""The choice of a replica, by examples and by properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.dispatch import BLOCK_TOKENS, MIN_SAVED_TOKENS, PrefixMap, chain, choose
from router.streams import ReplicaState, ReplicaView


def view(
    replica: int,
    requests: int = 0,
    tokens: int = 0,
    submitted: int = 0,
    state: ReplicaState = "serving",
) -> ReplicaView:
    return ReplicaView(replica, state, 1, requests, tokens, submitted, None)


def test_nobody_ready() -> None:
    assert choose([], {}, 64) is None
    states: list[ReplicaState] = ["starting", "draining", "dead", "parked"]
    assert choose([view(i, state=s) for i, s in enumerate(states)], {}, 64) is None


def test_least_tokens_in_flight_win() -> None:
    assert choose([view(0, 1, 900), view(1, 2, 100)], {}, 64) == 1


def test_equal_requests_alternate() -> None:
    counts = [0, 0, 0]
    for _ in range(100):
        chosen = choose([view(i, submitted=count) for i, count in enumerate(counts)], {}, 64)
        assert chosen is not None
        counts[chosen] += 1
        assert max(counts) - min(counts) <= 1


def test_a_small_difference_of_tokens_is_none() -> None:
    assert choose([view(0, 2, 90), view(1, 1, 100)], {}, 64) == 1


def test_a_long_common_prefix_decides_until_its_owner_is_busy() -> None:
    hits = {1: 1024}
    assert choose([view(0), view(1, submitted=5)], hits, 64) == 1
    assert choose([view(0), view(1, 1, 1024)], hits, 64) == 1
    assert choose([view(0), view(1, 3, 3072)], hits, 64) == 0


def test_a_short_common_prefix_does_not() -> None:
    assert choose([view(0), view(1, submitted=1)], {1: MIN_SAVED_TOKENS - 1}, 64) == 0


def test_full_replicas_are_passed_over() -> None:
    assert choose([view(0, 2, 10), view(1, 1, 5000)], {0: 9999}, 2) == 1
    assert choose([view(0, 2, 10), view(1, 2, 5000)], {}, 2) == 0


views = st.lists(
    st.builds(
        ReplicaView,
        st.integers(0, 7),
        st.sampled_from(["serving", "starting", "parked"]),
        st.just(1),
        st.integers(0, 100),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.none(),
    ),
    max_size=8,
    unique_by=lambda v: v.replica,
)


@given(views, st.dictionaries(st.integers(0, 7), st.integers(0, 10**5)), st.integers(1, 64))
def test_choice_is_ready_whenever_one_is(
    replicas: list[ReplicaView], hits: dict[int, int], max_requests: int
) -> None:
    chosen = choose(replicas, hits, max_requests)
    ready = {v.replica: v for v in replicas if v.ready}
    assert (chosen is None) == (not ready)
    if chosen is not None:
        assert chosen in ready
        if any(v.inflight_requests < max_requests for v in ready.values()):
            assert ready[chosen].inflight_requests < max_requests
        assert choose(list(reversed(replicas)), hits, max_requests) == chosen


def test_chain_covers_whole_blocks_and_leaves_one_token() -> None:
    tokens = list(range(3 * BLOCK_TOKENS))
    assert len(chain(tokens)) == 2
    assert len(chain([*tokens, 1])) == 3
    assert chain(tokens) == chain([*tokens[:64], 9])
    assert chain(tokens)[0] != chain([7, *tokens[1:]])[0]
    assert chain(tokens, b"a") != chain(tokens, b"b")
    assert chain(tokens, model="a") != chain(tokens, model="b")
    assert chain([]) == []


def test_map_tells_the_longest_prefix_of_each() -> None:
    known = PrefixMap()
    known.record([1, 2, 3], 0, now=0.0)
    known.record([1, 2], 1, now=0.0)
    assert known.hits([1, 2, 3, 4], now=1.0) == {0: 96, 1: 64}
    assert known.hits([9, 2, 3], now=1.0) == {}
    known.forget(0)
    assert known.hits([1, 2, 3], now=1.0) == {1: 64}


def test_map_forgets_with_time() -> None:
    known = PrefixMap(ttl_s=10)
    known.record([1], 0, now=0.0)
    assert known.hits([1], now=10.0) == {0: 32}
    assert known.hits([1], now=10.5) == {}


@given(st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=9), st.integers(0, 3))))
def test_map_is_bounded_and_keeps_the_latest(records: list[tuple[list[int], int]]) -> None:
    known = PrefixMap(capacity=10)
    for now, (hashes, replica) in enumerate(records):
        known.record(hashes, replica, float(now))
        assert len(known) <= 10
        unique = list(dict.fromkeys(hashes))
        expected = {replica: len(unique) * BLOCK_TOKENS} if unique else {}
        hits = known.hits(unique, float(now))
        assert {replica: hits[replica]} == expected if unique else hits == {}


@pytest.mark.parametrize("length", [1, 32, 33, 100_000])
def test_chain_is_bounded(length: int) -> None:
    assert len(chain([1] * length)) == min((length - 1) // BLOCK_TOKENS, 256)
