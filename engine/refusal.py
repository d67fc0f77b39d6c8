"""Why a submit can never run, judged before it is queued.

Owns nothing. Must not know queues, pool or device.
"""

from __future__ import annotations

from engine.protocol import Limits, Submit


def refusal(submit: Submit, tokens: list[int], limits: Limits) -> str | None:
    """One sentence for the client, or None if the engine of these limits can run it.

    `tokens` are the submit's, decoded.
    """
    vocab_size, length = limits.vocab_size, len(tokens)
    named = (*submit.stop_ids, *(token for token, _bias in submit.sampling.logit_bias))
    if not tokens:
        return "there are no tokens"
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        return f"a token id is outside the vocabulary of {vocab_size}"
    if named and (min(named) < 0 or max(named) >= vocab_size):
        return f"a stop or bias token id is outside the vocabulary of {vocab_size}"
    if not 0 <= submit.num_prompt <= length:
        return f"{submit.num_prompt} prompt tokens in a list of {length}"
    if submit.max_new < 0:
        return "max_new is negative"
    if length + min(submit.max_new, 1) > limits.max_len:
        return f"{length} tokens leave no room in a context of {limits.max_len}"
    return _pooling_refusal(submit, limits) or _memory_refusal(submit, length, limits)


def _pooling_refusal(submit: Submit, limits: Limits) -> str | None:
    pooling = submit.pooling
    if pooling is None:
        return (
            None if limits.generates else "this model makes embeddings only, it generates no text"
        )
    if limits.embedding_size == 0:
        return "this model makes no embeddings"
    if submit.grammar:
        return "an embedding follows no grammar"
    if submit.max_new:
        return f"an embedding generates nothing, max_new is {submit.max_new}"
    if not 0 <= pooling.dimensions <= limits.embedding_size:
        return f"{pooling.dimensions} dimensions of an embedding of {limits.embedding_size}"
    return None


def _memory_refusal(submit: Submit, length: int, limits: Limits) -> str | None:
    if not limits.generates:  # without generation there is no KV cache
        return None
    max_total = min(length + submit.max_new, limits.max_len)
    # The last token to come needs no keys and values.
    positions, room = max(length, max_total - 1), limits.num_blocks * limits.block_size
    if positions > room:
        return f"{positions} positions do not fit into a KV cache of {room}"
    return None
