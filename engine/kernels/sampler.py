"""Logits -> next tokens, rows of any kind together, without a sort. Owns nothing.

One program a row. A row that is greedy, or samples from all tokens, reads its logits once or twice;
top-k and top-p are thresholds, found by bisection over the bits of float32 values, which are
ordered as integers are: exact after at most 32 readings of a row that lies in the cache.
The noise is that of `engine.device.sampling`: a pure function of (seed, position).
"""

# Triton is untyped, and kernels take what a launch passes: pointers, strides, constants.
# pyright: basic
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 16
_GREEDY_BELOW = tl.constexpr(1e-5)


class SamplerParams(NamedTuple):
    """One value a slot: int64 `seed`, int32 `top_k`, the others float32; temperature 0: greedy."""

    seed: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor


class SampledRows(NamedTuple):
    """int32 [n] of the rows: `slots` (-1: not sampled at all), `positions` of the new tokens."""

    slots: Tensor
    positions: Tensor


def sample_rows(
    logits: Tensor,
    params: SamplerParams,
    rows: SampledRows,
    tokens: Tensor,
    out: Tensor,
    text_ids: int,
) -> None:
    """Chooses a token for each row of float32 `logits` [n, vocab]; `out` int32 [n] and `tokens`.

    Row i samples as its slot says; its token goes to `out`, and to tokens[slot, position]. Ids from
    `text_ids` on are never chosen (0: all may be). A row whose largest logit is NaN or infinite
    gives -1, and leaves token 0 in `tokens`.
    """
    count, vocab = logits.shape
    _sample_rows[(count,)](
        logits, *params, *rows, tokens, out,
        logits.stride(0), tokens.stride(0), vocab, text_ids or vocab,
        BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip


@triton.jit
def _row_block(row, at, vocab, allowed, BLOCK: tl.constexpr):
    """Columns and logits of one block; what may not be chosen is -inf."""
    columns = at + tl.arange(0, BLOCK)
    values = tl.load(row + columns, mask=columns < vocab, other=-float("inf"))
    return columns, tl.where(columns < allowed, values, -float("inf"))


@triton.jit
def _first_best(best, where):
    """Of each lane's best and its id: the largest, and the smallest id that has it."""
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, where, 0x7FFFFFFF), 0)


@triton.jit
def _best(row, vocab, allowed, BLOCK: tl.constexpr):
    """(how many are NaN or infinite, largest allowed logit, the first id that has it)."""
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    broken = where
    for at in range(0, vocab, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        values = tl.load(row + columns, mask=columns < vocab, other=-float("inf"))
        broken += ((values != values) | (values == float("inf"))).to(tl.int32)
        values = tl.where(columns < allowed, values, -float("inf"))
        where = tl.where(values > best, columns, where)
        best = tl.maximum(best, values)
    top, index = _first_best(best, where)
    return tl.sum(broken, 0), top, index


@triton.jit
def _mass(row, at_least, top, temperature, vocab, allowed, BLOCK: tl.constexpr):
    """(count, sum of exp((logit - top) / temperature)) of logits >= at_least."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for at in range(0, vocab, BLOCK):
        _, values = _row_block(row, at, vocab, allowed, BLOCK)
        kept = (values >= at_least) & (values > -float("inf"))
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp((values - top) / temperature), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _key(value):
    """int32 that is ordered as float32 values are."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unkey(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(
    row, low_key, high_key, wanted, BY_COUNT: tl.constexpr,
    top, temperature, vocab, allowed, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest logit value, as a key, of which those >= it reach `wanted` (count or mass).

    Between low_key, which reaches it, and high_key, which is the largest logit.
    """
    low, high = low_key.to(tl.int64), high_key.to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) // 2
        count, mass = _mass(
            row, _unkey(middle.to(tl.int32)), top, temperature, vocab, allowed, BLOCK
        )
        reached = (count.to(tl.float32) if BY_COUNT else mass) >= wanted
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low.to(tl.int32)


@triton.jit
def _mix(z):
    """splitmix64's finaliser (Steele, Lea and Flood, 2014), of uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _race(row, at_least, key, top, temperature, vocab, allowed, BLOCK: tl.constexpr):
    """The winner of the exponential race among logits >= at_least."""
    best = tl.full([BLOCK], -1.0, tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for at in range(0, vocab, BLOCK):
        columns, values = _row_block(row, at, vocab, allowed, BLOCK)
        kept = (values >= at_least) & (values > -float("inf"))
        chance = tl.where(kept, tl.exp((values - top) / temperature), 0.0)
        z = _mix(columns.to(tl.uint64) * 0x9E3779B97F4A7C15 + key)
        # 63 bits, as `exponentials` takes them: floats are finest near 0, where winners are.
        uniform = (z & 0x7FFFFFFFFFFFFFFF).to(tl.int64).to(tl.float32) * (2.0**-63)
        # -log(1 - u), exact for small u: Kahan's correction of log(1 + x) by the rounding of 1 + x.
        one_less = 1.0 - uniform
        gap = 1.0 - one_less
        noise = tl.where(gap == 0.0, uniform, -tl.log(one_less) * (uniform / gap))
        noise = tl.minimum(tl.maximum(noise, 1e-30), 20.0)
        speed = tl.where(kept, chance / noise, -1.0)
        where = tl.where(speed > best, columns, where)
        best = tl.maximum(best, speed)
    _, index = _first_best(best, where)
    return index


@triton.jit(do_not_specialize=["allowed"])
def _sample_rows(
    logits, seeds, temperatures, top_ps, min_ps, top_ks, row_slots, positions, tokens, out,
    logits_stride, tokens_stride, vocab, allowed, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    slot = tl.load(row_slots + number).to(tl.int64)
    if slot >= 0:
        row = logits + number.to(tl.int64) * logits_stride
        broken, top, chosen = _best(row, vocab, allowed, BLOCK)
        sound = (broken == 0) & (top > -float("inf"))
        temperature = tl.load(temperatures + slot)
        top_k, top_p = tl.load(top_ks + slot), tl.load(top_ps + slot)
        position = tl.load(positions + number)
        greedy = (temperature < _GREEDY_BELOW) | (top_k == 1) | (top_p <= 0.0)
        if sound & (greedy == 0):
            min_p = tl.load(min_ps + slot)
            lowest = tl.full([], -3.4028234663852886e38, tl.float32)
            at_least = lowest
            if min_p > 0.0:
                at_least = tl.maximum(lowest, top + temperature * tl.log(min_p))
            high = _key(top)
            if (top_k > 0) & (top_k < vocab):
                count, _ = _mass(row, at_least, top, temperature, vocab, allowed, BLOCK)
                if count > top_k:
                    at_least = _unkey(
                        _threshold(
                            row, _key(at_least), high, top_k.to(tl.float32), True,
                            top, temperature, vocab, allowed, BLOCK,
                        )
                    )  # fmt: skip
            if top_p < 1.0:
                _, mass = _mass(row, at_least, top, temperature, vocab, allowed, BLOCK)
                at_least = _unkey(
                    _threshold(
                        row, _key(at_least), high, mass * top_p, False,
                        top, temperature, vocab, allowed, BLOCK,
                    )
                )  # fmt: skip
            seed = tl.load(seeds + slot).to(tl.uint64)
            key = _mix(_mix(seed + 0x9E3779B97F4A7C15) + (position + 1).to(tl.uint64))
            chosen = _race(row, at_least, key, top, temperature, vocab, allowed, BLOCK)
        tl.store(out + number, tl.where(sound, chosen, -1))
        tl.store(tokens + slot * tokens_stride + position, tl.where(sound, chosen, 0))
