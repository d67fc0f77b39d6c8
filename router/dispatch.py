"""Which replica gets a sequence. A pure choice over values, and the bounded memory of prefixes.

`PrefixMap` owns what was sent where (a guess about the engines' caches: being wrong costs time,
never correctness). Must not know sockets, streams' contents or the clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from router.streams import ReplicaView

BLOCK_TOKENS: Final = 32
MAX_CHAIN_BLOCKS: Final = 256  # of a prompt; a longer common prefix decides nothing more

# A shorter reuse than this is worth less than even use of the replicas.
MIN_SAVED_TOKENS: Final = 4 * BLOCK_TOKENS
# Tokens in flight weigh less than tokens to be computed: most of them are decoding.
LOAD_WEIGHT: Final = 0.5
# Differences below this are noise: then the number of requests decides.
EQUAL_TOKENS: Final = 64


def choose(
    views: Sequence[ReplicaView],
    hits: Mapping[int, int],
    max_requests: int,
    *,
    suspect: bool = False,
) -> int | None:
    """The number of the best ready replica, or None if there is none. A `suspect` is given to none
    that works on another one (see `router.blame`).

    `hits[replica]` counts prompt tokens that the replica has probably cached. The best one has the
    highest (tokens saved - weighted tokens in flight); among about equals the fewest requests in
    flight, then the fewest sequences so far, so that equal requests alternate. A replica that
    works on `max_requests` is passed over as long as another one has room. A popular prefix spills
    to the next replica by itself: a request in flight costs its owner as much as half its tokens.
    """
    ready = [view for view in views if view.ready and not (suspect and view.on_trial)]
    roomy = [view for view in ready if view.inflight_requests < max_requests] or ready
    if not roomy:
        return None
    return max(roomy, key=lambda view: _merit(view, hits.get(view.replica, 0))).replica


def _merit(view: ReplicaView, hit_tokens: int) -> tuple[int, int, int, int]:
    saved = hit_tokens if hit_tokens >= MIN_SAVED_TOKENS else 0
    score = round((saved - LOAD_WEIGHT * view.inflight_tokens) / EQUAL_TOKENS)
    return score, -view.inflight_requests, -view.submitted, -view.replica


def chain(tokens: Sequence[int], salt: bytes = b"", model: str = "") -> list[int]:
    """Hashes of the first whole blocks, each one including all before it, `salt` and `model`.

    The last token is left out: an engine must compute at least that one.
    """
    parent = hash((model, salt))
    hashes: list[int] = []
    for end in range(
        BLOCK_TOKENS, min(len(tokens), MAX_CHAIN_BLOCKS * BLOCK_TOKENS + 1), BLOCK_TOKENS
    ):
        parent = hash((parent, *tokens[end - BLOCK_TOKENS : end]))
        hashes.append(parent)
    return hashes


class PrefixMap:
    """Block hash -> the replicas that were given it, with a bound on size and on age.

    Invariant: at most `capacity` hashes; what is older than `ttl_s` never counts.
    """

    def __init__(self, capacity: int = 100_000, ttl_s: float = 600.0) -> None:
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._seen: OrderedDict[int, dict[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def hits(self, hashes: Iterable[int], now: float) -> dict[int, int]:
        """Tokens of the longest known prefix, per replica that has any."""
        matched: dict[int, int] = {}
        alive: set[int] | None = None  # replicas that have every block so far
        for hash_ in hashes:
            seen = self._seen.get(hash_, {})
            fresh = {replica for replica, at in seen.items() if now - at <= self._ttl_s}
            alive = fresh if alive is None else alive & fresh
            if not alive:
                break
            for replica in alive:
                matched[replica] = matched.get(replica, 0) + BLOCK_TOKENS
        return matched

    def record(self, hashes: Iterable[int], replica: int, now: float) -> None:
        """`replica` was given these blocks."""
        for hash_ in hashes:
            self._seen.setdefault(hash_, {})[replica] = now
            self._seen.move_to_end(hash_)
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)

    def forget(self, replica: int) -> None:
        """Its cache is gone: the engine died."""
        for hash_ in [h for h, seen in self._seen.items() if seen.pop(replica, None) is not None]:
            if not self._seen[hash_]:
                del self._seen[hash_]
