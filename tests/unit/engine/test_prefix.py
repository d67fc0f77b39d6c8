"""engine.prefix: digests tell texts apart, the index finds what shares most."""

from __future__ import annotations

import pytest

from engine.prefix import Nearest, PrefixIndex, common_tokens
from engine.protocol import pack_tokens
from tests.fakes import check_index


def packed(*tokens: int) -> bytes:
    return pack_tokens(tokens)


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex(b"key")


def add(index: PrefixIndex, block: int, parent: bytes, *tokens: int) -> bytes:
    digest = index.extend(parent, packed(*tokens))
    assert index.add(block, parent, digest, packed(*tokens))
    return digest


def test_digests_depend_on_key_salt_order_and_kind(index: PrefixIndex) -> None:
    root = index.root(b"")
    first, second = packed(1, 2), packed(3, 4)
    digests = {
        root,
        index.root(b"tenant"),
        PrefixIndex(b"other key").root(b""),
        index.extend(root, first),
        index.extend(root, second),
        index.extend(index.extend(root, first), second),
        index.extend(index.extend(root, second), first),
        index.root(root + first),  # a salt chosen to look like a block
    }
    assert len(digests) == 8
    assert index.extend(root, first) == PrefixIndex(b"key").extend(root, first)


def test_a_full_block_is_found_by_its_whole_history(index: PrefixIndex) -> None:
    root = index.root(b"")
    first = add(index, 5, root, 1, 2)
    second = add(index, 3, first, 1, 2)
    assert index.find(first, root, packed(1, 2)) == 5
    assert index.find(second, first, packed(1, 2)) == 3
    assert index.find(index.extend(root, packed(2, 2)), root, packed(2, 2)) is None


def test_s18_a_digest_that_collides_is_no_hit(
    index: PrefixIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and parent are compared, so that even a broken hash cannot give a wrong answer."""
    monkeypatch.setattr(PrefixIndex, "extend", lambda self, parent, tokens: b"always the same")
    root, other = index.root(b""), index.root(b"tenant")
    digest = add(index, 0, root, 1, 2)
    assert index.find(digest, root, packed(1, 2)) == 0
    assert index.find(digest, root, packed(1, 3)) is None
    assert index.find(digest, other, packed(1, 2)) is None
    assert not index.add(1, other, digest, packed(1, 2))
    check_index(index)


def test_content_is_kept_once(index: PrefixIndex) -> None:
    root = index.root(b"")
    digest = add(index, 0, root, 1, 2, 3)
    assert not index.add(1, root, digest, packed(1, 2, 3))
    assert not index.add(1, root, None, packed(1, 2)), "the start of a known block is known"
    assert index.add(1, root, None, packed(1, 3))
    assert 1 in index
    assert len(index) == 2
    check_index(index)


def test_a_full_block_may_repeat_a_partial_one(index: PrefixIndex) -> None:
    root = index.root(b"")
    assert index.add(0, root, None, packed(1, 2))
    add(index, 1, root, 1, 2, 3)
    assert index.nearest(root, packed(1, 2, 3)) == Nearest(1, 3)
    check_index(index)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((1, 2, 3, 4), Nearest(0, 4)),
        ((1, 2, 3, 9), Nearest(0, 3)),
        ((1, 2, 9), Nearest(0, 2)),
        ((1, 2), Nearest(0, 2)),
        ((1, 9, 9, 9), Nearest(2, 2)),
        ((2, 256, 1, 1), Nearest(3, 2)),
        ((2, 1, 1, 1), Nearest(3, 1)),
        ((9,), None),
        ((), None),
    ],
)
def test_nearest_shares_the_longest_start(
    index: PrefixIndex, wanted: tuple[int, ...], expected: Nearest | None
) -> None:
    root = index.root(b"")
    add(index, 0, root, 1, 2, 3, 4)
    assert index.add(1, root, None, packed(1, 3))
    add(index, 2, root, 1, 9, 1, 1)
    add(index, 3, root, 2, 256, 0, 0)
    add(index, 4, index.root(b"tenant"), 9, 9, 9, 9)
    found = index.nearest(root, packed(*wanted))
    if expected is None or found is None:
        assert found == expected
    else:
        assert found.num_tokens == expected.num_tokens


def test_dropped_blocks_are_forgotten_and_strangers_ignored(index: PrefixIndex) -> None:
    root = index.root(b"")
    digest = add(index, 0, root, 1, 2)
    assert index.add(1, digest, None, packed(1))
    for block in (0, 1, 1, 7):
        index.drop(block)
    assert len(index) == 0
    assert index.find(digest, root, packed(1, 2)) is None
    assert index.nearest(root, packed(1)) is None
    assert index.nearest(digest, packed(1)) is None
    check_index(index)
    assert not index._children, "an empty entry for each text ever seen would be a leak"


def test_a_child_is_found_again_after_its_parent_was_recomputed(index: PrefixIndex) -> None:
    root = index.root(b"")
    first = add(index, 0, root, 1, 2)
    second = add(index, 1, first, 3, 4)
    index.drop(0)
    assert add(index, 2, root, 1, 2) == first
    assert index.find(second, first, packed(3, 4)) == 1


@pytest.mark.parametrize(
    ("left", "right", "shared"),
    [
        ((), (1,), 0),
        ((1,), (1,), 1),
        ((1, 2, 3), (1, 2), 2),
        ((1, 2, 3), (1, 2, 4), 2),
        ((256, 1), (257, 1), 0),
        ((1, 65536), (1, 0), 1),
        ((2**31 - 1, 5), (2**31 - 1, 6), 1),
    ],
)
def test_common_tokens(left: tuple[int, ...], right: tuple[int, ...], shared: int) -> None:
    assert common_tokens(packed(*left), packed(*right)) == shared
    assert common_tokens(packed(*right), packed(*left)) == shared
