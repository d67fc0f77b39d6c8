"""What grammars forbid becomes -inf, before bias, penalties and the sampler. Owns nothing."""

# Triton is untyped, and kernels take what a launch passes: pointers, strides, constants.
# pyright: basic
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def mask_rows(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Overwrites float32 `logits` [n, vocab], in the rows that int32 `rows` [m] names.

    Id i of row rows[k] stays if bit i % 32 of int32 `bits` [m, words] at [k, i // 32] is set. What
    is not a number or infinite stays too: it tells the sampler that the row is broken.
    """
    vocab = logits.shape[-1]
    _mask_rows[(len(rows), triton.cdiv(vocab, _BLOCK))](
        logits, rows, bits, logits.stride(0), bits.stride(0), vocab, BLOCK=_BLOCK, num_warps=8
    )


@triton.jit
def _mask_rows(logits, rows, bits, logits_stride, bits_stride, vocab, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    row = logits + tl.load(rows + number).to(tl.int64) * logits_stride
    words = tl.load(bits + number * bits_stride + columns // 32, mask=inside, other=-1)
    values = tl.load(row + columns, mask=inside, other=0.0)
    allowed = ((words >> (columns % 32)) & 1) == 1
    broken = (values != values) | (values == float("inf"))
    tl.store(row + columns, -float("inf"), mask=inside & (allowed == 0) & (broken == 0))
