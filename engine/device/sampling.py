"""Logits -> next tokens, on the device, rows of a batch together.

Pure functions of tensors. Randomness is a pure function of (seed, position): a request gives the
same text whatever runs beside it, and can continue on another engine. Order as in vLLM: bias and
penalties on the raw logits, then temperature, min-p, top-k, top-p. What a grammar forbids is -inf
before all of these, so that no bias brings it back and top-k counts only what is allowed.
Log-probabilities are those of the model: of the raw logits, before masks, bias and penalties.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.plan import Admit, TokenLogprobs
from engine.protocol import Sampling

# Below this temperature the answer is the greedy one (and the division would overflow).
_GREEDY_BELOW = 1e-5
# Constants of splitmix64, as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15
_GOLDEN_GAMMA = _GAMMA - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_INT64_MAX = (1 << 63) - 1
_UINT64_MAX = (1 << 64) - 1
# Candidates that are sorted for top-p before the whole vocabulary is.
_TOP_P_WINDOW = 256


class SlotSampling(NamedTuple):
    """What a slot's sampling needs, prepared once at admission."""

    params: Sampling
    num_prompt: int
    bias_ids: Tensor | None
    bias: Tensor | None
    stop_ids: Tensor | None

    @staticmethod
    def of(admit: Admit, device: torch.device) -> SlotSampling:
        params = admit.sampling
        bias_ids = bias = stop_ids = None
        if params.logit_bias:
            bias_ids = torch.tensor([token for token, _ in params.logit_bias], device=device)
            bias = torch.tensor([value for _, value in params.logit_bias], device=device)
        if params.min_new and admit.stop_ids:
            stop_ids = torch.tensor(admit.stop_ids, device=device)
        return SlotSampling(params, admit.num_prompt, bias_ids, bias, stop_ids)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken."""
        params = self.params
        return params.temperature < _GREEDY_BELOW or params.top_k == 1 or params.top_p <= 0.0

    @property
    def edits_logits(self) -> bool:
        """True if bias, penalties or a minimum length change the logits."""
        params = self.params
        return (
            self.bias is not None
            or self.stop_ids is not None
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or params.repetition_penalty != 1.0
        )


def sample(logits: Tensor, slots: list[SlotSampling], known: list[Tensor]) -> Tensor:
    """float32 [n, vocab] -> int64 [n].

    `known[i]` holds row i's tokens so far: its length is the position of the token to be chosen.
    `logits` may be overwritten for rows that edit them.
    """
    for row, slot in enumerate(slots):
        if slot.edits_logits:
            edit_logits(logits[row], slot, known[row])
    tokens = logits.argmax(-1)
    random = [row for row, slot in enumerate(slots) if not slot.greedy]
    if random:
        rows = torch.tensor(random, device=logits.device)
        tokens[rows] = _draw(
            logits[rows], [slots[row] for row in random], [known[row] for row in random]
        )
    return tokens


def mask_logits(logits: Tensor, rows: list[int], bits: npt.NDArray[np.int32]) -> None:
    """Ids of `rows` that a grammar forbids get -inf, in place. `bits`: see `plan.StepMasks`."""
    flags = np.unpackbits(bits.view(np.uint8), axis=1, count=logits.shape[-1], bitorder="little")
    forbidden = torch.from_numpy(flags == 0).to(logits.device)
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, float("-inf"))
    else:
        for row, one in zip(rows, forbidden, strict=True):
            logits[row].masked_fill_(one, float("-inf"))


def edit_logits(logits: Tensor, slot: SlotSampling, known: Tensor) -> None:
    """Applies bias, penalties and the minimum length to one row [vocab], in place."""
    params = slot.params
    generated = known[slot.num_prompt :]
    if slot.bias is not None and slot.bias_ids is not None:
        logits.index_add_(0, slot.bias_ids, slot.bias)
    if params.repetition_penalty != 1.0:
        penalty = params.repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits.copy_(torch.where(_counts(known, logits) > 0, penalized, logits))
    if (params.presence_penalty or params.frequency_penalty) and generated.numel():
        counts = _counts(generated, logits)
        logits.sub_(params.presence_penalty * (counts > 0) + params.frequency_penalty * counts)
    if slot.stop_ids is not None and generated.numel() < params.min_new:
        logits[slot.stop_ids] = float("-inf")


def _counts(tokens: Tensor, logits: Tensor) -> Tensor:
    """How often each id occurs, like `logits`; found without waiting for the device."""
    ones = logits.new_ones(1).expand(len(tokens))
    return torch.zeros_like(logits).index_add_(0, tokens, ones)


def _draw(logits: Tensor, slots: list[SlotSampling], known: list[Tensor]) -> Tensor:
    """One token a row by an exponential race: the largest probability / noise wins.

    The race (Gumbel-max, said with exponentials) rather than the inverse of the cumulative sum:
    a rounding error of the logits moves every border of a cumulative sum, and in the flat tail of
    49,000 tokens that is another token; here it only matters between two that nearly tie.
    """
    device = logits.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    probabilities = torch.softmax(logits / column([s.params.temperature for s in slots]), -1)
    if any(slot.params.min_p > 0.0 for slot in slots):
        floor = column([slot.params.min_p for slot in slots]) * probabilities.amax(-1, keepdim=True)
        probabilities.masked_fill_(probabilities < floor, 0.0)
    for row, slot in enumerate(slots):
        _keep_top(probabilities[row], slot.params)
    keys = [noise_key(slot.params.seed, len(row)) for slot, row in zip(slots, known, strict=True)]
    race = exponentials(torch.tensor(keys, device=device), logits.shape[-1])
    return probabilities.div_(race).argmax(-1)


def _keep_top(probabilities: Tensor, params: Sampling) -> None:
    """Zeroes what top-k and top-p leave out of one row [vocab], without sorting all of it."""
    vocab = probabilities.shape[-1]
    if 0 < params.top_k < vocab:
        least = probabilities.topk(params.top_k).values[-1]
        probabilities.masked_fill_(probabilities < least, 0.0)
    if params.top_p < 1.0:
        total = probabilities.sum()
        window = min(_TOP_P_WINDOW, vocab)
        best = probabilities.topk(window).values
        if best.sum() < params.top_p * total:
            best = probabilities.sort(descending=True).values
        # A token stays if those before it do not reach top_p: the likeliest one always does.
        before = best.cumsum(-1) - best
        kept = best[before < params.top_p * total]
        probabilities.masked_fill_(probabilities < kept[-1], 0.0)


def noise_key(seed: int, position: int) -> int:
    """64 bits for one token's noise, as a signed integer: a hash of (seed, position).

    Arithmetic that a kernel does as well: `engine.kernels.sampler` draws the same noise.
    """
    key = _mixed(_mixed(seed + _GAMMA) + position + 1)
    return key - (1 << 64) if key >> 63 else key


def _mixed(z: int) -> int:
    """splitmix64's finaliser, of the last 64 bits."""
    z &= _UINT64_MAX
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _UINT64_MAX
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _UINT64_MAX
    return z ^ (z >> 31)


def exponentials(keys: Tensor, vocab: int) -> Tensor:
    """int64 [n] keys -> float32 [n, vocab], exponentially distributed and above 0.

    A counter-based generator: entry i is the splitmix64 output number i of its row's key (Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    z = torch.arange(vocab, device=keys.device).mul_(_GOLDEN_GAMMA) + keys[:, None]
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        z.bitwise_xor_((z >> shift).bitwise_and_(_INT64_MAX >> (shift - 1))).mul_(factor)
    z.bitwise_xor_((z >> 31).bitwise_and_(_INT64_MAX >> 30))
    # Floats are finest near 0, and the winners of the race are there.
    uniform = z.bitwise_and_(_INT64_MAX).float().mul_(2.0**-63)
    # One in 2^25 rounds to 1 and would be infinite, which no quotient survives.
    return uniform.neg_().log1p_().neg_().clamp_(min=1e-30, max=20.0)


class Scores(NamedTuple):
    """Log-probabilities on their way to the host: to be read once the device has been waited for.

    `chosen` float32 [n]; of the best rivals `values` float32 and `ids` int64, both [n, rivals].
    """

    chosen: Tensor
    values: Tensor | None
    ids: Tensor | None

    def read(self) -> TokenLogprobs:
        """The numbers. No earlier than when the step is done."""
        chosen = self.chosen.tolist()
        if self.values is None or self.ids is None:
            return TokenLogprobs(chosen, [[] for _ in chosen])
        pairs = zip(self.ids.tolist(), self.values.tolist(), strict=True)
        return TokenLogprobs(chosen, [list(zip(i, v, strict=True)) for i, v in pairs])

    @staticmethod
    def join(parts: list[Scores]) -> TokenLogprobs:
        """The numbers of consecutive parts as one."""
        read = [part.read() for part in parts]
        chosen = [value for part in read for value in part.chosen]
        return TokenLogprobs(chosen, [rivals for part in read for rivals in part.top])


def score(logits: Tensor, tokens: Tensor, rivals: int) -> Scores:
    """Log-probabilities of chosen tokens and their `rivals` best, from raw logits [n, vocab]."""
    scale = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, tokens[:, None].long()) - scale).squeeze(-1)
    if rivals <= 0:
        return Scores(to_host(chosen), None, None)
    best = logits.topk(min(rivals, logits.shape[-1]), -1)
    return Scores(to_host(chosen), to_host(best.values - scale), to_host(best.indices))


def wait_for(device: torch.device) -> None:
    """Until the work queued so far is done, copies of `to_host` included."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_host(values: Tensor) -> Tensor:
    """A copy in main memory, complete once the work queued so far is; itself if it is there."""
    return values.to("cpu", non_blocking=True)
