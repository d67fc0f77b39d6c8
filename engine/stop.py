"""When a sequence has ended, as far as token ids can tell (stop strings are the router's).

Owns nothing. Must not know how tokens came about.
"""

from __future__ import annotations

from engine.protocol import FinishReason
from engine.request import Sequence


def finish_reason(sequence: Sequence) -> FinishReason | None:
    """Why the sequence ends with its newest token, which is a generated one; None: it goes on.

    A stop id is kept as a token of the output, it ends nothing before `min_new` tokens are there,
    and it wins over the length limits. So does a grammar that is complete, whatever `min_new` says;
    one that cannot be followed any further is an error.
    """
    tokens, matcher = sequence.tokens, sequence.matcher
    if matcher is not None and (matcher.failed or matcher.complete):
        return "error" if matcher.failed else "stop"
    if tokens[-1] in sequence.stop_ids and sequence.num_generated >= sequence.sampling.min_new:
        return "stop"
    return "length" if len(tokens) >= sequence.max_total else None
