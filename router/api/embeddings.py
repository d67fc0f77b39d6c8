"""POST /v1/embeddings.

Owns the forms of `input`, what a text may be, and the JSON of the answer. Must not know engines or
admission. A request may hold thousands of texts: they are read, tokenized and answered in slices
between which the event loop turns, and kept as packed token ids and packed vectors meanwhile.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from engine.protocol import Pooling, pack_tokens, unpack_floats
from router.api.generation import decode_apart, record_of, tenant_of
from router.api.http import read_json_body, send_bytes, send_parts, while_connected
from router.api.schemas import EmbeddingRequest
from router.embed_flow import EmbeddingJob, EmbedFlow
from router.errors import BadRequest, ContextLengthExceeded
from router.text.pool import TextPool
from router.text.served import ModelTable, ServedModel

MAX_TEXTS: Final = 2048
MAX_TEXT_CHARS: Final = 1_000_000  # a second of tokenizing
SLICE_BYTES: Final = 64 * 1024  # of input, read and tokenized in one go
SLICE_VALUES: Final = 32 * 1024  # of vectors, written in one go: 2 ms as decimal numbers

T = TypeVar("T")

EncodingFormat = Literal["float", "base64"]
Side = Literal["left", "right"]

_NUMBERS: Final = re.compile(rb"\[\s*[-0-9]")
_FORMS: Final = "a string, a list of strings, a list of token ids, or a list of such lists"


class Embeddings:
    """The route: one request for embeddings from its body to its answer."""

    def __init__(self, models: ModelTable, flow: EmbedFlow, pool: TextPool) -> None:
        self._models = models
        self._flow = flow
        self._pool = pool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_body(scope, receive)
        request = await decode_apart(self._pool, body, EmbeddingRequest)
        await while_connected(scope, receive, self._answer(scope, request, send))

    async def _answer(self, scope: Scope, request: EmbeddingRequest, send: Send) -> None:
        name: str | None = request.model or scope["path_params"].get("name")
        if not name:
            raise BadRequest("'model' is required.", param="model")
        encoding = _encoding_format(request)
        job = await self._prepare(scope, request, self._models.find(name))
        del request  # the largest thing here by far
        vectors = await self._flow.embed(job)
        tail = {"model": name, "usage": _usage(job.record.prompt_tokens)}
        parts = answer_parts(vectors, encoding, tail)
        if sum(map(len, vectors)) <= SLICE_VALUES:
            await send_bytes(send, b"".join(parts), b"application/json")
        else:
            await send_parts(send, parts, b"application/json")

    async def _prepare(
        self, scope: Scope, request: EmbeddingRequest, model: ServedModel
    ) -> EmbeddingJob:
        """Everything that can be refused is refused here. Raises RequestError."""
        _refuse_unsupported(request)
        limits = self._flow.limits(model)
        dimensions = limits.size if request.dimensions is None else request.dimensions
        if not 1 <= dimensions <= limits.size:
            raise BadRequest(
                f"'dimensions' must be between 1 and {limits.size}, the size of this model's "
                "embeddings.",
                param="dimensions",
            )
        pooling = Pooling(model.pooling.kind, dimensions, request.normalize is not False)
        rule = _length_rule(request, model, limits.max_len)
        texts: list[bytes] = []
        for start, parts in slices(parts_of(request.input), SLICE_BYTES):
            size = sum(map(_size, parts))
            texts += await self._pool.run_sized(size, _encode, parts, start, model, rule)
        return EmbeddingJob(
            record=record_of(scope),
            model=model,
            texts=texts,
            pooling=pooling,
            tenant=tenant_of(scope),
        )


@dataclass(frozen=True, slots=True)
class LengthRule:
    """At most `max_len` tokens; a longer text is cut to `cut_to` of them, or refused if that is 0.

    `keep` says how many ids at both ends are not the text's own and stay.
    """

    max_len: int
    cut_to: int = 0
    side: Side = "right"
    keep: tuple[int, int] = (0, 0)

    def apply(self, ids: list[int], place: str, *, framed: bool) -> list[int]:
        """The ids to be used. Raises ContextLengthExceeded."""
        limit = self.cut_to or self.max_len
        if len(ids) <= limit:
            return ids
        if not self.cut_to:
            raise ContextLengthExceeded(
                f"'{place}' has {len(ids)} tokens, and this model embeds at most {limit}. Split "
                "it, or ask for it to be cut with 'truncate_prompt_tokens': -1.",
                param="input",
            )
        first, last = self.keep if framed else (0, 0)
        own = ids[first : len(ids) - last]
        room = limit - first - last
        kept = own[len(own) - room :] if self.side == "left" else own[:room]
        return [*ids[:first], *kept, *ids[len(ids) - last :]]


def parts_of(raw: msgspec.Raw) -> list[msgspec.Raw]:
    """The JSON of each text of `input`, all of one form. Raises BadRequest."""
    form = _first(raw)
    if form in (b"", b"n"):
        raise BadRequest("'input' is required.", param="input")
    if form == b'"':
        return [raw]
    if form != b"[":
        raise BadRequest(f"'input' must be {_FORMS}.", param="input")
    if _NUMBERS.match(memoryview(raw)):
        return [raw]  # read as ids in one go later, which refuses a mixture too
    parts = msgspec.json.decode(raw, type=list[msgspec.Raw])
    if not parts:
        raise BadRequest("'input' must not be empty.", param="input")
    if len(parts) > MAX_TEXTS:
        raise BadRequest(f"'input' may hold at most {MAX_TEXTS} texts.", param="input")
    if {_first(part) for part in parts} not in ({b'"'}, {b"["}):
        raise BadRequest(f"'input' must be {_FORMS}, not a mixture.", param="input")
    return parts


def slices(parts: Sequence[msgspec.Raw], size: int) -> Iterator[tuple[int, Sequence[msgspec.Raw]]]:
    """(number of the first one, parts) with about `size` bytes of JSON together."""
    start = taken = 0
    for end, part in enumerate(parts, 1):
        taken += _size(part)
        if taken >= size or end == len(parts):
            yield start, parts[start:end]
            start, taken = end, 0


def _encode(
    parts: Sequence[msgspec.Raw], start: int, model: ServedModel, rule: LengthRule
) -> list[bytes]:
    """The packed token ids of some texts. Raises BadRequest naming the first that is none."""
    return [
        _encode_one(part, f"input[{number}]", model, rule)
        for number, part in enumerate(parts, start)
    ]


def _encode_one(part: msgspec.Raw, place: str, model: ServedModel, rule: LengthRule) -> bytes:
    is_text = _first(part) == b'"'
    if is_text:
        text = _decoded(part, str, place)
        if not text:
            raise BadRequest(f"'{place}' must not be an empty text.", param="input")
        if len(text) > MAX_TEXT_CHARS:
            raise ContextLengthExceeded(
                f"'{place}' has {len(text)} characters; at most {MAX_TEXT_CHARS} are read.",
                param="input",
            )
        ids = model.tokenizer.encode_for_embedding(text)
    else:
        ids = _decoded(part, list[int], place)
        if ids and not 0 <= min(ids) <= max(ids) < model.tokenizer.vocab_size:
            raise BadRequest(
                f"'{place}' holds an id outside the model's vocabulary of "
                f"{model.tokenizer.vocab_size}.",
                param="input",
            )
    if not ids:
        raise BadRequest(f"'{place}' has no tokens.", param="input")
    return pack_tokens(rule.apply(ids, place, framed=is_text))


def _decoded(part: msgspec.Raw, kind: type[T], place: str) -> T:
    try:
        return msgspec.json.decode(part, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        text = f"'{place}' is not valid: 'input' must be {_FORMS}."
        raise BadRequest(text, param="input") from error


def answer_parts(
    vectors: Sequence[bytes], encoding: EncodingFormat, tail: dict[str, Any]
) -> Iterator[bytes]:
    """The JSON of the answer in parts of about SLICE_VALUES values; `tail` follows the vectors."""
    per_slice = max(1, SLICE_VALUES * 4 // max(1, len(vectors[0])))
    write = _base64 if encoding == "base64" else _decimal
    opening = b'{"object":"list","data":['
    for start in range(0, len(vectors), per_slice):
        entries = [
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, write(vector))
            for index, vector in enumerate(vectors[start : start + per_slice], start)
        ]
        yield opening + b",".join(entries)
        opening = b","
    yield b"]," + msgspec.json.encode(tail)[1:]


def _base64(vector: bytes) -> bytes:
    return b'"%b"' % base64.b64encode(vector)


def _decimal(vector: bytes) -> bytes:
    return msgspec.json.encode(unpack_floats(vector))


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _encoding_format(request: EmbeddingRequest) -> EncodingFormat:
    match request.encoding_format:
        case None | "float":
            return "float"
        case "base64":
            return "base64"
        case _:
            raise BadRequest(
                "'encoding_format' must be 'float' or 'base64'.", param="encoding_format"
            )


def _length_rule(request: EmbeddingRequest, model: ServedModel, max_len: int) -> LengthRule:
    """Raises BadRequest."""
    match request.truncation_side:
        case None | "right":
            side: Side = "right"
        case "left":
            side = "left"
        case _:
            text = "'truncation_side' must be 'left' or 'right'."
            raise BadRequest(text, param="truncation_side")
    wanted = request.truncate_prompt_tokens
    if wanted is None:
        return LengthRule(max_len)
    keep = model.embedding_frame
    least = sum(keep) + 1
    if wanted != -1 and not least <= wanted <= max_len:
        raise BadRequest(
            f"'truncate_prompt_tokens' must be between {least} and {max_len} for this model, or "
            "-1 for as many as it takes.",
            param="truncate_prompt_tokens",
        )
    return LengthRule(max_len, max_len if wanted == -1 else wanted, side, keep)


def _refuse_unsupported(request: EmbeddingRequest) -> None:
    """Raises BadRequest for the first field whose promise we cannot keep."""
    kept = {
        "messages": not request.messages,
        "add_special_tokens": request.add_special_tokens is not False,
        "embed_dtype": request.embed_dtype in (None, "float32"),
        "endianness": request.endianness in (None, "native", "little"),
    }
    for name, is_kept in kept.items():
        if not is_kept:
            raise BadRequest(f"'{name}' is not supported here with this value.", param=name)


def _size(part: msgspec.Raw) -> int:
    return memoryview(part).nbytes


def _first(part: msgspec.Raw) -> bytes:
    return bytes(memoryview(part)[:1])
