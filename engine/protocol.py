"""The wire between router and engine: frozen, tagged, positional msgspec structs.

Owns nothing. Must not know sockets, torch or HTTP. Rules (tests/contract holds golden bytes):

* fields are appended only, new ones have defaults; a struct's tag never changes;
* ids are integers made by the router; token lists are little-endian int32 bytes;
* every message carries the engine's epoch, and one with a stale epoch changes nothing;
* exactly one end: each `Submit` is answered by exactly one `Finish`, and by nothing else
  but the tokens before it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Literal, TypeVar

import msgspec

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 * 1024 * 1024

_Number = TypeVar("_Number", int, float)
FinishReason = Literal["stop", "length", "abort", "error"]
PoolingKind = Literal["mean", "cls", "last"]


class Wire(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Common options of every struct that crosses the socket."""


class Sampling(Wire, frozen=True):
    """How one request's next token is chosen; neutral values mean "off".

    `seed` is always resolved by the router, so that noise is a pure function of
    (seed, position) and a request can continue on another engine.
    `logprobs` and `prompt_logprobs`: -1 none, 0 the chosen token only, k its k best rivals too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1
    prompt_logprobs: int = -1
    min_new: int = 0


class Pooling(Wire, frozen=True):
    """How a sequence's last hidden states become one vector.

    `mean` over all tokens, `cls` the first token's, `last` the last token's. `dimensions` keeps the
    first so many values (0: all), before `normalize` scales the vector to length 1.
    """

    kind: PoolingKind = "mean"
    dimensions: int = 0
    normalize: bool = True


class Submit(Wire, frozen=True, tag="submit"):
    """Start one sequence. `tokens[:num_prompt]` is the prompt, the rest was already generated.

    `max_new` bounds the generated tokens still to come (those in `tokens` not counted); `min_new`
    counts all generated ones. `num_prompt` 0 means that all of `tokens` is prompt.
    With `pooling` nothing is generated (`max_new` is 0): the sequence ends with an `Embedding` and
    a `Finish` of reason `stop`; its tokens are computed in what other sequences leave of a step.
    With `grammar`, in llguidance's text form, all that is generated follows it, from the first
    token behind the prompt on; the engine must have been told the `Vocabulary` before.
    """

    epoch: int
    id: int
    tokens: bytes
    sampling: Sampling
    max_new: int
    stop_ids: tuple[int, ...] = ()
    salt: bytes = b""
    priority: int = 0
    num_prompt: int = 0
    pooling: Pooling | None = None
    grammar: str = ""


class Vocabulary(Wire, frozen=True, tag="vocabulary"):
    """What the model's token ids stand for: told once, before the first submit with a grammar.

    `pieces` holds the bytes of all ids, one after the other, and `lengths` how many of them each id
    has, as int32; one entry for each of `Limits.vocab_size` ids, 0 for those without a text.
    `special` are control tokens, whose bytes are their names; `eos` end an answer.
    """

    epoch: int
    lengths: bytes
    pieces: bytes
    special: tuple[int, ...]
    eos: tuple[int, ...]


class Abort(Wire, frozen=True, tag="abort"):
    """End these sequences at the next step boundary; unknown ids are ignored."""

    epoch: int
    ids: tuple[int, ...]


class Drain(Wire, frozen=True, tag="drain"):
    """Finish what runs, then exit 0. Submits that arrive later end with `abort`."""

    epoch: int


class Ping(Wire, frozen=True, tag="ping"):
    """Are you there? Answered by `Pong` with the same number from the step loop itself."""

    epoch: int
    n: int


class Limits(Wire, frozen=True):
    """Facts that only the engine knows once the model is loaded.

    `embedding_size` is the length of whole embeddings, 0 if it makes none. An engine that does not
    `generate` (an encoder) takes only submits with pooling.
    """

    max_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    max_batch: int
    weights_bytes: int = 0
    kv_bytes: int = 0
    load_s: float = 0.0
    device: str = ""
    dtype: str = ""
    embedding_size: int = 0
    generates: bool = True
    quant: str = "none"


class Stats(Wire, frozen=True):
    """Gauges and running totals since start, folded into each `StepOutput` and `Pong`."""

    waiting: int = 0
    running: int = 0
    blocks_total: int = 0
    blocks_held: int = 0
    blocks_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    bad_frames: int = 0
    blocks_leaked: int = 0
    frames_sent: int = 0  # before the one that carries this, since `Ready`
    frames_received: int = 0


NO_MEMORY = "insufficient_memory"  # detail of an error: its step found no memory


class Finish(Wire, frozen=True):
    """The one end of sequence `id`; `detail` is the text of an `error`, or NO_MEMORY."""

    id: int
    reason: FinishReason
    detail: str = ""


class Logprobs(Wire, frozen=True):
    """Log-probabilities of `count` consecutive tokens of sequence `id`.

    `start` is the first token's position in the whole sequence. `chosen` holds float32[count];
    `top_ids` int32[count * k] and `top` float32[count * k] the k best rivals of each, best first.
    """

    id: int
    start: int
    chosen: bytes
    top_ids: bytes = b""
    top: bytes = b""


class Embedding(Wire, frozen=True):
    """The pooled vector of sequence `id`: float32 values."""

    id: int
    values: bytes


class Started(Wire, frozen=True):
    """Sequence `id` left the waiting queue; `cached` prompt tokens came from the prefix cache."""

    id: int
    cached: int


class Ready(Wire, frozen=True, tag="ready"):
    """First message of an engine: the model is loaded and submits are welcome."""

    epoch: int
    version: int
    limits: Limits


class StepOutput(Wire, frozen=True, tag="step"):
    """All that one step produced, in columns.

    Sequence `ids[i]` gained `counts[i]` tokens (an empty `counts` means one each); `tokens` holds
    them all, concatenated. The other lists are sparse.
    """

    epoch: int
    step: int
    ids: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: bytes
    finished: tuple[Finish, ...] = ()
    stats: Stats = Stats()
    started: tuple[Started, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    embeddings: tuple[Embedding, ...] = ()


class Pong(Wire, frozen=True, tag="pong"):
    """Answer to `Ping`, sent by the step loop."""

    epoch: int
    n: int
    stats: Stats = Stats()


class Busy(Wire, frozen=True, tag="busy"):
    """The engine will be silent for up to `expected_s` seconds: a load or a very long step."""

    epoch: int
    what: str
    expected_s: float


class Fatal(Wire, frozen=True, tag="fatal"):
    """The engine is about to exit with `code`; `reason` is one sentence for the operator."""

    epoch: int
    reason: str
    code: int = 70


ToEngine = Submit | Abort | Drain | Ping | Vocabulary
ToRouter = Ready | StepOutput | Pong | Busy | Fatal

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)


class BadFrame(ValueError):
    """A frame that is no message of this protocol: to be counted and skipped, never fatal."""


def encode(message: ToEngine | ToRouter) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises `BadFrame`."""
    try:
        return _to_engine.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadFrame(f"{len(frame)} bytes: {error}") from error


def decode_to_router(frame: bytes) -> ToRouter:
    """Raises `BadFrame`."""
    try:
        return _to_router.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadFrame(f"{len(frame)} bytes: {error}") from error


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian int32. Raises OverflowError beyond int32."""
    return _little_endian(array("i", tokens)).tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Inverse of `pack_tokens`. Raises `BadFrame` on a length that is no multiple of 4."""
    return _fill(array("i"), data).tolist()


def pack_floats(values: Iterable[float]) -> bytes:
    """Numbers as little-endian float32."""
    return _little_endian(array("f", values)).tobytes()


def unpack_floats(data: bytes) -> list[float]:
    """Inverse of `pack_floats`. Raises `BadFrame` on a length that is no multiple of 4."""
    return _fill(array("f"), data).tolist()


def _fill(values: array[_Number], data: bytes) -> array[_Number]:
    if len(data) % values.itemsize:
        raise BadFrame(f"{len(data)} bytes are no whole number of {values.itemsize}-byte values")
    values.frombytes(data)
    return _little_endian(values)


def _little_endian(values: array[_Number]) -> array[_Number]:
    if sys.byteorder == "big":
        values.byteswap()
    return values
