"""The rows of `bench.gpu`: which loads, what vLLM gave for them, and what the card allows. Pure.

Anchors: vLLM 0.26.0 (FA3, CUDA graphs, torch.compile), float16, one
H100 80 GB, 2026-11-25, the better of its two runs where there were two. Goals: what
the project set itself for this card.

The floor of a row is the time below which no engine of this kind gets, for `c` requests:

    compute_s   c * (prompt tokens still to compute + output) * 2 * parameters / 720 TFLOP/s
    read_s      output steps * (weights + c * mean context * KV bytes of a token) / 3.07 TB/s

The larger of the two for c > 1: prompts can be computed while others' weights are read. For c = 1
nothing overlaps: the prompt (at least one reading of the weights), then the steps. Attention's own
arithmetic, activations, sampling and the host are left out, so 100 % is out of reach. Both rates
are measured on an H100 (reads alone; linear layers at 2,048 tokens): of another card the share
means nothing. Quantized weights count as the bytes they take, computing as in 16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

READ_BYTES_PER_S = 3.07e12
FLOPS_PER_S = 720e12
KV_BLOCK_TOKENS = 32  # prefixes are found in whole blocks

# Bytes of a weight's read in a step, of those in 16 bits: the load's figures in README.md.
QUANT_BYTES = {"none": 1.0, "int8": 0.5, "bnb-int8": 0.5, "fp8": 0.5, "nf4": 0.29}


class Facts(NamedTuple):
    """Of one model: weights that a step reads (all but the embedding), KV of a token in 16 bits."""

    parameters: float
    kv_bytes: int


FACTS = {
    "chatglm2-6b": Facts(5.975e9, 28 * 2 * 2 * 128 * 2),
    "vicuna-7b": Facts(6.605e9, 32 * 2 * 32 * 128 * 2),
}


class Reference(NamedTuple):
    """Output tokens a second and median TTFT in ms; 0: not known."""

    tok_s: float = 0.0
    ttft_ms: float = 0.0


class Row(NamedTuple):
    """One load: `requests` in all, `c` at once, of `prefix` shared and `unique` prompt tokens.

    `hits`: the same prompts were asked for just before, so that the cache knows them whole.
    """

    model: str
    c: int
    requests: int
    unique: int
    output: int
    prefix: int = 0
    procs: int = 1
    hits: bool = False
    vllm: Reference = Reference()
    goal: Reference = Reference()

    @property
    def name(self) -> str:
        """What `--rows` looks through."""
        prompt = f"{self.prefix}+{self.unique}" if self.prefix else f"{self.unique}"
        return f"{self.model} {prompt}/{self.output} c={self.c}{' hit' if self.hits else ''}"


def _load(model: str, c: int, vllm: Reference, goal: Reference) -> Row:
    """512 tokens in, 128 out."""
    requests = 6 if c == 1 else max(32, 3 * c)
    return Row(model, c, requests, 512, 128, procs=4 if c >= 64 else 1, vllm=vllm, goal=goal)


_GLM, _VICUNA = "chatglm2-6b", "vicuna-7b"
_R = Reference

MATRIX: tuple[Row, ...] = (
    _load(_GLM, 1, _R(182, 17.0), _R(218, 12)),
    Row(_GLM, 1, 8, 32, 256, vllm=_R(184, 20.8), goal=_R(0, 7)),
    Row(_GLM, 1, 4, 2048, 64, vllm=_R(166, 38), goal=_R(0, 37)),
    Row(_GLM, 1, 8, 8, 16, prefix=2040, hits=True, vllm=_R(0, 48), goal=_R(0, 8)),
    _load(_GLM, 8, _R(1310, 79), _R(1560)),
    _load(_GLM, 32, _R(4182, 219), _R(4850)),
    _load(_GLM, 64, _R(6807, 277), _R(7450)),
    _load(_GLM, 128, _R(9484, 376), _R(9750)),
    _load(_GLM, 256, _R(8627, 594), _R(10600)),
    Row(_GLM, 64, 256, 128, 64, prefix=1024, procs=4, vllm=_R(5869, 320), goal=_R(6500)),
    Row(_GLM, 64, 192, 64, 512, procs=4, vllm=_R(10385), goal=_R(11500)),
    Row(_GLM, 256, 768, 64, 512, procs=4, vllm=_R(17411), goal=_R(28000)),
    _load(_VICUNA, 1, _R(163, 20.1), _R(192)),
    _load(_VICUNA, 8, _R(1054, 92), _R(1260)),
    _load(_VICUNA, 32, _R(2743, 217), _R(3080)),
    _load(_VICUNA, 64, _R(3929, 287), _R(4150)),
    _load(_VICUNA, 128, _R(4600, 679), _R(4760)),
    _load(_VICUNA, 256, _R(4287, 1326), _R(4760)),
    Row(_VICUNA, 32, 96, 2048, 128, vllm=_R(1126, 564), goal=_R(1320)),
)


def floor_tok_s(row: Row, quant: str = "none") -> float:
    """Output tokens a second that no engine exceeds; see the module's docstring.

    Of a shared prefix only the first time is computed; 0.0 for a model without facts.
    """
    facts = FACTS.get(row.model)
    if facts is None:
        return 0.0
    token_s = 2 * facts.parameters / FLOPS_PER_S
    weights_s = 2 * facts.parameters * QUANT_BYTES[quant] / READ_BYTES_PER_S
    prompt = row.unique + row.prefix * min(1.0, 8 / row.requests)
    if row.hits:
        prompt = (row.prefix + row.unique) % KV_BLOCK_TOKENS or 1
    context = row.prefix + row.unique + row.output / 2
    step_s = weights_s + row.c * context * facts.kv_bytes / READ_BYTES_PER_S
    if row.c == 1:
        seconds = max(prompt * token_s, weights_s) + (row.output - 1) * max(step_s, token_s)
    else:
        compute_s = row.c * (prompt + row.output) * token_s
        seconds = max(compute_s, row.output * step_s)
    return row.c * row.output / seconds


def estimated_s(rows: list[Row]) -> float:
    """Seconds that the rows take at vLLM's rates (without starts and warm-ups)."""
    return sum(
        row.requests * row.output / row.vllm.tok_s if row.vllm.tok_s else 2.0 for row in rows
    )
