"""What is asked: sessions of requests, made from a seed, and the times at which they arrive.

Owns the four workloads and the arrival process. Pure: the same arguments give the same sessions.
Must not know sockets, servers or clocks.

* random         prompts that share nothing
* shared-prefix  prompts that begin with one of P prefixes and end with a part of their own
* multi-turn     conversations that grow by the server's real answers
* file           one request per JSON line: {"prompt": text or ids} or {"messages": […]}, and
                 optionally "max_tokens"
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

Endpoint = Literal["completions", "chat"]
PromptKind = Literal["ids", "words"]
Message = dict[str, Any]

# Frequent words that most vocabularies hold as one token with the space before them.
_WORD_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city name president team minute idea kid body back parent face others "
    "level office door health person art war history party result change morning reason research "
    "girl guy moment air teacher force education foot boy age policy music market sense nation "
    "plan college interest death experience effect use class control field development role "
    "effort rate heart drug show leader light voice wife police mind price report decision son "
    "view relationship town road arm difference value building action season society tax director"
)
WORDS = tuple(_WORD_TEXT.split())
# The lowest ids are special tokens in most vocabularies.
FIRST_PLAIN_ID = 32


class Lengths(msgspec.Struct, frozen=True):
    """A number of tokens, drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, rnd: random.Random) -> int:
        """One length."""
        return rnd.randint(self.low, self.high)


def parse_lengths(text: str) -> Lengths:
    """Reads `512` or `100:500`. Raises ValueError."""
    low, _, high = text.partition(":")
    lengths = Lengths(int(low), int(high or low))
    if not 1 <= lengths.low <= lengths.high:
        raise ValueError(f"{text!r}: lengths are at least 1 and LOW:HIGH is not falling")
    return lengths


class Turn(msgspec.Struct, frozen=True):
    """One request. Of `ids`, `text` and `messages` the one that is set is its new input."""

    max_tokens: int
    ids: tuple[int, ...] = ()
    text: str = ""
    messages: tuple[Message, ...] = ()


class Session(msgspec.Struct, frozen=True):
    """Requests that follow each other, each after the answer to the one before.

    `arrival_s` counts from the start of the run; 0 in a closed loop.
    """

    id: int
    turns: tuple[Turn, ...]
    arrival_s: float = 0.0


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests of which size; the lengths are in tokens (words count as one each)."""

    requests: int
    input: Lengths
    output: Lengths
    kind: PromptKind = "ids"
    vocab: int = 30_000
    prefixes: int = 8
    prefix_len: int = 256
    turns: int = 4


def random_sessions(shape: Shape, seed: int) -> list[Session]:
    """Prompts of `shape.input` tokens with nothing in common."""
    rnd = random.Random(seed)
    return [
        Session(i, (_turn(shape, rnd, _draw(shape, rnd, shape.input.draw(rnd))),))
        for i in range(shape.requests)
    ]


def shared_prefix_sessions(shape: Shape, seed: int) -> list[Session]:
    """`shape.prefixes` prefixes taken in turn, each followed by `shape.input` unique tokens."""
    rnd = random.Random(seed)
    prefixes = [_draw(shape, rnd, shape.prefix_len) for _ in range(shape.prefixes)]
    return [
        Session(
            i,
            (_turn(shape, rnd, prefixes[i % len(prefixes)] + _draw(shape, rnd, length)),),
        )
        for i in range(shape.requests)
        for length in (shape.input.draw(rnd),)
    ]


def multi_turn_sessions(shape: Shape, seed: int) -> list[Session]:
    """Conversations of `shape.turns` requests, the last one perhaps cut short.

    Each turn adds `shape.input` words to what was said before; the first one stands after
    `shape.prefix_len` words that all sessions share (a system prompt).
    """
    rnd = random.Random(seed)
    words = msgspec.structs.replace(shape, kind="words")
    prefix = _draw(words, rnd, shape.prefix_len)
    sessions: list[Session] = []
    left = shape.requests
    while left > 0:
        inputs = [_draw(words, rnd, shape.input.draw(rnd)) for _ in range(min(left, shape.turns))]
        inputs[0] = prefix + inputs[0]
        sessions.append(Session(len(sessions), tuple(_turn(words, rnd, new) for new in inputs)))
        left -= len(inputs)
    return sessions


class FileRequest(msgspec.Struct, frozen=True):
    """One line of a workload file."""

    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    max_tokens: int | None = None


def file_sessions(lines: Iterable[bytes], shape: Shape, endpoint: Endpoint) -> list[Session]:
    """The file's requests in order, taken again from its start if `shape.requests` is more.

    `shape.requests` 0 means each line once. Raises ValueError, naming the line.
    """
    turns = [
        _file_turn(number, line, shape, endpoint)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not turns:
        raise ValueError("the workload file holds no request")
    count = shape.requests or len(turns)
    return [Session(i, (turns[i % len(turns)],)) for i in range(count)]


def arrivals(
    sessions: Sequence[Session], rate: float, burstiness: float, seed: int
) -> list[Session]:
    """The same sessions with arrival times, `rate` a second on average.

    The gaps are gamma distributed with shape `burstiness`: 1 is a Poisson process, less comes in
    bursts, more is more even, and infinity is constant.
    """
    rnd = random.Random(seed)
    at = 0.0
    result: list[Session] = []
    for session in sessions:
        result.append(msgspec.structs.replace(session, arrival_s=at))
        if burstiness == float("inf"):
            at += 1 / rate
        else:
            at += rnd.gammavariate(burstiness, 1 / (rate * burstiness))
    return result


def stream_body(model: str, temperature: float, ignore_eos: bool) -> dict[str, Any]:
    """What every request body has: a stream that ends with its token counts."""
    body: dict[str, Any] = {
        "model": model,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | {"ignore_eos": True} if ignore_eos else body


def request_body(
    turn: Turn, endpoint: Endpoint, history: Sequence[Message], common: dict[str, Any]
) -> dict[str, Any]:
    """The JSON body of `turn` after what was said before (`history`, in chat form)."""
    body = {**common, "max_tokens": turn.max_tokens}
    if endpoint == "chat":
        return {**body, "messages": [*history, *turn_messages(turn)]}
    if turn.ids:
        return {**body, "prompt": list(turn.ids)}
    # An answer follows its prompt without a gap, as it was generated, so that it can be reused.
    said = "".join(
        message["content"] + ("\n" if message["role"] == "assistant" else "") for message in history
    )
    return {**body, "prompt": said + turn.text}


def turn_messages(turn: Turn) -> list[Message]:
    """What the turn adds to a conversation."""
    return list(turn.messages) or [{"role": "user", "content": turn.text}]


def _draw(shape: Shape, rnd: random.Random, length: int) -> list[Any]:
    if shape.kind == "words":
        return rnd.choices(WORDS, k=length)
    first = min(FIRST_PLAIN_ID, shape.vocab - 1)
    return [rnd.randrange(first, shape.vocab) for _ in range(length)]


def _turn(shape: Shape, rnd: random.Random, content: list[Any]) -> Turn:
    max_tokens = shape.output.draw(rnd)
    if shape.kind == "words":
        return Turn(max_tokens, text=" ".join(content))
    return Turn(max_tokens, ids=tuple(content))


def _file_turn(number: int, line: bytes, shape: Shape, endpoint: Endpoint) -> Turn:
    try:
        found = msgspec.json.decode(line, type=FileRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"line {number} of the workload file: {error}") from error
    max_tokens = found.max_tokens or shape.output.high
    if found.messages and endpoint == "chat":
        return Turn(max_tokens, messages=tuple(found.messages))
    if isinstance(found.prompt, str) and found.prompt:
        return Turn(max_tokens, text=found.prompt)
    if isinstance(found.prompt, list) and found.prompt and endpoint == "completions":
        return Turn(max_tokens, ids=tuple(found.prompt))
    raise ValueError(
        f"line {number} of the workload file has nothing to send to /v1/{endpoint}: "
        "text in `prompt`, ids in `prompt` (completions) or `messages` (chat)"
    )
