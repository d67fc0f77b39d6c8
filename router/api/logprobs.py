"""Log-probabilities in the two shapes of the OpenAI API.

Owns how a token is named and that no number leaves that JSON cannot hold. Must not know streams,
engines or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from router.streams import TokenLogprob
from router.text.assembly import Entry
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import Tokenizer

VERY_UNLIKELY: Final = -9999.0  # OpenAI's stand-in for minus infinity


class TokenNames:
    """How token ids are written: as text, and as the true bytes."""

    def __init__(self, tokenizer: Tokenizer, pieces: Sequence[bytes]) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces

    def detokenizer(self) -> Detokenizer:
        """A new text state over the same bytes."""
        return Detokenizer(self._pieces)

    def bytes_of(self, token: int) -> bytes:
        """What the token adds to the answer; empty for hidden ones."""
        return self._pieces[token] if token < len(self._pieces) else b""

    def text_of(self, token: int) -> str:
        """A unique name: the text, or the escaped bytes where they are no whole characters."""
        data = self.bytes_of(token)
        if not data:
            return self._tokenizer.token_text(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(entries: Iterable[Entry], names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""

    def named(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names.text_of(token),
            "logprob": finite(logprob),
            "bytes": list(names.bytes_of(token)),
        }

    content = [
        {
            **named(entry.token, entry.logprob.logprob),
            "top_logprobs": [named(token, value) for token, value in entry.logprob.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Iterable[Entry], names: TokenNames, shift: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion: four lists of one length.

    `shift` characters stand before the generated text (an echoed prompt).
    """
    given = list(entries)
    return {
        "tokens": [names.text_of(entry.token) for entry in given],
        "token_logprobs": [finite(entry.logprob.logprob) for entry in given],
        "top_logprobs": [_rivals(entry.token, entry.logprob, names) for entry in given],
        "text_offset": [shift + entry.offset for entry in given],
    }


def prompt_logprobs(
    prompt: Sequence[int], told: Sequence[TokenLogprob], names: TokenNames
) -> dict[str, Any]:
    """The echoed prompt in the same four lists; the first token has no logprob, hence nulls.

    `told[i]` belongs to `prompt[i + 1]`.
    """
    offsets: list[int] = []
    offset = 0
    detokenizer = names.detokenizer()
    for token in prompt:
        offsets.append(offset)
        offset += len(detokenizer.push((token,)))
    return {
        "tokens": [names.text_of(token) for token in prompt],
        "token_logprobs": [None, *(finite(known.logprob) for known in told)][: len(prompt)],
        "top_logprobs": [
            None,
            *(_rivals(token, known, names) for token, known in zip(prompt[1:], told, strict=False)),
        ][: len(prompt)],
        "text_offset": offsets,
    }


def listed_prompt_logprobs(
    prompt: Sequence[int], told: Sequence[TokenLogprob], names: TokenNames
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` in vLLM's form: id -> logprob, rank and text of each prompt token.

    `told[i]` belongs to `prompt[i + 1]`; the first token has none. The rank of a token that is
    not among the listed ones is not known.
    """
    listed: list[dict[str, Any] | None] = [None]
    for token, known in zip(prompt[1:], told, strict=False):
        ranks = {rival: rank for rank, (rival, _) in enumerate(known.top, 1)}
        values = {**dict(known.top), token: known.logprob}
        listed.append(
            {
                str(rival): {
                    "logprob": finite(value),
                    "rank": ranks.get(rival),
                    "decoded_token": names.text_of(rival),
                }
                for rival, value in values.items()
            }
        )
    return listed[: len(prompt)]


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two results in the completion shape, one behind the other."""
    return {key: first[key] + second[key] for key in first}


def finite(value: float) -> float:
    """The number, or OpenAI's sentinel where JSON has none."""
    return value if math.isfinite(value) else VERY_UNLIKELY


def _rivals(token: int, known: TokenLogprob, names: TokenNames) -> dict[str, float]:
    """Name -> logprob. The chosen token comes last, so that no rival of equal name hides it."""
    rivals = {names.text_of(rival): finite(value) for rival, value in known.top}
    rivals[names.text_of(token)] = finite(known.logprob)
    return rivals
