"""From a typed request to the checked options of a job: ranges, limits, defaults, seeds.

Owns the ranges of api policy P7 and the limits on everything that a client can enlarge. Must not
know HTTP, templates or engines. What leaves here is valid; nothing behind it checks again.
"""

from __future__ import annotations

import os
from typing import Final

from engine.protocol import Sampling
from router.api.schemas import GenerationRequest
from router.errors import BadRequest
from router.text.assembly import TextRules
from router.text.served import ServedModel
from router.text.stops import StopStrings

MAX_CHOICES: Final = 128
MAX_PROMPTS: Final = 1024
MAX_SEQUENCES: Final = 1024
MAX_LOGPROBS: Final = 20
MAX_BEST_OF: Final = 20
TINY_TEMPERATURE: Final = 1e-3
MAX_STOPS: Final = 32
MAX_STOP_CHARS: Final = 1000
MAX_STOP_IDS: Final = 128
MAX_BIASES: Final = 1024
MAX_SALT_CHARS: Final = 1024
INT64: Final = (-(2**63), 2**63 - 1)
INT31: Final = (-(2**31), 2**31 - 1)

# name -> (lowest, highest), both allowed
RANGES: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (-1, INT31[1]),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": INT64,
    "n": (1, MAX_CHOICES),
    "min_tokens": (0, INT31[1]),
    "priority": INT31,
}


def check_ranges(request: GenerationRequest) -> None:
    """Raises BadRequest for the first number out of its range."""
    for name, (low, high) in RANGES.items():
        value = getattr(request, name)
        if value is not None and not low <= value <= high:
            raise BadRequest(f"'{name}' must be between {low} and {high}.", param=name)
    penalty = request.repetition_penalty
    if penalty is not None and not 0 < penalty <= 2:
        raise BadRequest(
            "'repetition_penalty' must be above 0 and at most 2.", param="repetition_penalty"
        )
    if request.best_of is not None:
        _check_best_of(request.best_of, request)
    if request.stream_options is not None and not request.stream:
        raise BadRequest("'stream_options' needs 'stream': true.", param="stream_options")
    salt = request.cache_salt
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise BadRequest(
            f"'cache_salt' must have 1 to {MAX_SALT_CHARS} characters.", param="cache_salt"
        )


def _check_best_of(best_of: int, request: GenerationRequest) -> None:
    if not (request.n or 1) <= best_of <= MAX_BEST_OF:
        raise BadRequest(
            f"'best_of' must be between 'n' and {MAX_BEST_OF}.",
            param="best_of",
        )
    if request.stream and best_of > (request.n or 1):
        raise BadRequest("'best_of' above 'n' cannot be streamed.", param="best_of")


def num_run(request: GenerationRequest) -> int:
    """How many answers to each prompt are generated; `n` of them are kept."""
    return max(request.n or 1, request.best_of or 1)


def prompt_logprobs_of(request: GenerationRequest) -> int:
    """-1 none, else how many rivals of each prompt token are wanted. Raises BadRequest."""
    wanted = request.prompt_logprobs
    if wanted is None:
        return -1
    if not 0 <= wanted <= MAX_LOGPROBS:
        raise BadRequest(
            f"'prompt_logprobs' must be between 0 and {MAX_LOGPROBS}.", param="prompt_logprobs"
        )
    if request.stream:
        raise BadRequest("'prompt_logprobs' cannot be streamed.", param="prompt_logprobs")
    return wanted


def truncated(prompt: list[int], wanted: int | None, max_len: int) -> list[int]:
    """The last `wanted` ids of the prompt; -1 for as many as leave room for an answer.

    Raises BadRequest.
    """
    if wanted is None:
        return prompt
    if wanted != -1 and not 1 <= wanted < max_len:
        raise BadRequest(
            f"'truncate_prompt_tokens' must be between 1 and {max_len - 1} for this model, or -1 "
            "for as many as it takes.",
            param="truncate_prompt_tokens",
        )
    return prompt[-(max_len - 1 if wanted == -1 else wanted) :]


def sampling_of(
    request: GenerationRequest, model: ServedModel, *, logprobs: int, prompt_logprobs: int = -1
) -> Sampling:
    """The sampling of choice 0; the two `logprobs` as in `Sampling`. Raises BadRequest.

    Without a seed one is drawn, so that a request can always be continued on another engine.
    """
    seed = request.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "little")
    if logprobs < 0 and (request.best_of or 1) > (request.n or 1):
        logprobs = 0  # which answers are best is judged by them
    top_p = _or(request.top_p, 1.0)
    temperature = _or(request.temperature, 1.0)
    return Sampling(
        # Tiny temperatures would overflow the logits; top_p 0 leaves only the best token.
        temperature=0.0 if top_p == 0 or temperature < TINY_TEMPERATURE else temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if top_p == 0 else top_p,
        min_p=_or(request.min_p, 0.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        seed=seed % 2**63,
        logit_bias=_logit_bias(request, model.tokenizer.vocab_size),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        min_new=request.min_tokens or 0,
    )


def text_rules_of(
    request: GenerationRequest, model: ServedModel, *, logprobs: bool, continues: bool
) -> TextRules:
    """Stop strings, stop ids and what is shown of them. Raises BadRequest.

    `continues`: the answer goes on with the prompt's text, so its first space is meant.
    """
    given = request.stop_token_ids or []
    if len(given) > MAX_STOP_IDS:
        raise BadRequest(
            f"'stop_token_ids' may hold at most {MAX_STOP_IDS} ids.", param="stop_token_ids"
        )
    if not all(0 <= token < model.tokenizer.vocab_size for token in given):
        raise BadRequest(
            "'stop_token_ids' holds an id outside the model's vocabulary.", param="stop_token_ids"
        )
    ends = () if request.ignore_eos else model.tokenizer.eos_ids
    stops = _stop_strings(request.stop)
    return TextRules(
        pieces=model.tokenizer.pieces(skip_special=request.skip_special_tokens is not False),
        strip_space=model.tokenizer.strips_space and not continues,
        errors=model.tokenizer.decode_errors,
        stops=StopStrings(stops) if stops else None,
        stop_ids=frozenset((*ends, *given)),
        include_stop=bool(request.include_stop_str_in_output),
        logprobs=logprobs or (request.best_of or 1) > (request.n or 1),
    )


def wanted_tokens(value: int | None, name: str, *, lowest: int = 1) -> int | None:
    """A `max_tokens`-like bound. Raises BadRequest below `lowest`; huge values are clamped."""
    if value is not None and value < lowest:
        raise BadRequest(f"'{name}' must be at least {lowest}.", param=name)
    return None if value is None else min(value, INT31[1])


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"'stop' may hold at most {MAX_STOPS} strings.", param="stop")
    if any(len(text) > MAX_STOP_CHARS for text in stops):
        raise BadRequest(f"A stop string may have {MAX_STOP_CHARS} characters.", param="stop")
    return tuple(dict.fromkeys(text for text in stops if text))


def _logit_bias(request: GenerationRequest, vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = request.logit_bias or {}
    if len(given) > MAX_BIASES:
        raise BadRequest(f"'logit_bias' may hold at most {MAX_BIASES} ids.", param="logit_bias")
    bias: dict[int, float] = {}
    for key, value in given.items():
        token = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1
        if not 0 <= token < vocab_size:
            raise BadRequest(
                "The keys of 'logit_bias' must be token ids of the model's vocabulary.",
                param="logit_bias",
            )
        if not -100 <= value <= 100:
            raise BadRequest(
                "The values of 'logit_bias' must be between -100 and 100.", param="logit_bias"
            )
        bias[token] = value
    return tuple(sorted(bias.items()))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
