"""The request bodies of the OpenAI routes, and their one typed decode.

Owns the field names and their types, and what a wrong type is answered. Must not know ranges that
depend on a model, templates, engines or HTTP. Policies: `null` means absent, unknown fields are
ignored, a field that promises something we do not do is refused by name (REFUSED).
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

import msgspec

from router.api.intake import SMALL_BYTES, check_depth, check_shape
from router.errors import BadRequest

T = TypeVar("T")


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options`; its other members are ignored."""

    include_usage: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True, frozen=True):
    """What chats and completions have in common: sampling, ends, shape of the answer.

    Those in REFUSED are read only to be refused: see `refuse_unsupported`.
    """

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    priority: int | None = None
    response_format: Any = None
    tool_choice: Any = None
    modalities: list[str] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    audio: Any = None
    suffix: str | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json_object: Any = None
    guided_whitespace_pattern: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    grammar: Any = None
    stop_regex: Any = None
    bad_words: list[Any] | None = None
    allowed_token_ids: list[Any] | None = None
    logits_processors: Any = None
    prompt_logprobs: int | None = None
    prompt_embeds: Any = None
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool | None = None
    chat_template: str | None = None
    documents: list[Any] | None = None


_EMPTY: Final[tuple[Any, ...]] = ([], {}, "", "none")  # such values ask for nothing

# Names that would change what the answer promises.
REFUSED: Final = (
    "functions",
    "function_call",
    "audio",
    "suffix",
    "stop_regex",
    "bad_words",
    "allowed_token_ids",
    "logits_processors",
    "prompt_embeds",
    "use_beam_search",
    "chat_template",
    "documents",
)


# Names that bind the form of an answer, all spellings in use.
STRUCTURED: Final = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
    "guided_whitespace_pattern",
    "json_schema",
    "regex",
    "ebnf",
    "grammar",
)


class CompletionRequest(GenerationRequest, kw_only=True, frozen=True):
    """Body of POST /v1/completions. `prompt` is checked by hand: its union has no typed form."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; only `text` parts can be used."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a conversation; members that no template reads are ignored."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatRequest(GenerationRequest, kw_only=True, frozen=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of POST /v1/embeddings. `input` is read later, a part at a time: it may be megabytes."""

    input: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    add_special_tokens: bool | None = None
    messages: list[Any] | None = None
    embed_dtype: str | None = None
    endianness: str | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of POST /tokenize: either `prompt` or `messages`. Without `model`, the only one."""

    model: str = ""
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: Any = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of POST /detokenize. Without `model`, the only one."""

    model: str = ""
    tokens: list[int]


_TYPE_NAMES: Final = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_GOT_NAMES: Final = {**_TYPE_NAMES, "float": "a fraction", "bool": "a boolean"}
_WRONG_TYPE: Final = re.compile(r"Expected `([^`]+)`(?:, got `([^`]+)`)?")
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")
_PLACE: Final = re.compile(r" - at `(?:key in `)?\$\.?(.*?)`+$")


def decode_body(body: bytes, kind: type[T]) -> T:
    """One typed decode of a JSON body, for a thread if it is large.

    Raises BadRequest that names the field, PayloadTooLarge.
    """
    if len(body) > SMALL_BYTES:
        check_shape(body)
    try:
        decoded = msgspec.json.decode(body, type=kind)
        check_depth(body)
        return decoded
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(
            "The body is not valid JSON (NaN, Infinity and lone surrogates are not allowed).",
            code="invalid_json",
        ) from error
    except RecursionError as error:
        raise BadRequest("The body is nested too deeply.", code="invalid_json") from error


def refuse_unsupported(request: GenerationRequest) -> None:
    """Raises BadRequest for the first field whose promise we cannot keep."""
    for name in REFUSED:
        value = getattr(request, name)
        if value is not None and value is not False and value not in _EMPTY:
            raise BadRequest(f"'{name}' is not supported by this server.", param=name)
    if request.modalities not in (None, [], ["text"]):
        raise BadRequest("'modalities' other than ['text'] are not supported.", param="modalities")


def asks_for_structure(request: GenerationRequest) -> bool:
    """Whether any of the fields that bind an answer's form is set."""
    return any(getattr(request, name) is not None for name in STRUCTURED)


def refuse_tools(request: GenerationRequest) -> None:
    """Raises BadRequest for tools where no chat is."""
    if request.tools or request.tool_choice not in (None, "none", "auto"):
        raise BadRequest("'tools' are for chats: use /v1/chat/completions.", param="tools")


def _wrong_field(text: str) -> BadRequest:
    """A msgspec complaint in our words: the place becomes `param`, no input is echoed."""
    place = _PLACE.search(text)
    param = place.group(1) if place else None
    missing = _MISSING.match(text)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return BadRequest(f"'{param}' is required.", param=param)
    if param is None:
        return BadRequest("The body must be a JSON object.")
    if param.startswith("logit_bias"):
        param = "logit_bias"  # its keys come from the client and are not echoed
    wrong = _WRONG_TYPE.match(text)
    if wrong is None:
        return BadRequest(f"'{param}' is not valid.", param=param)
    wanted = [_TYPE_NAMES.get(name, name) for name in wrong.group(1).split(" | ")]
    sentence = f"'{param}' must be {' or '.join(name for name in wanted if name != 'null')}"
    got = _GOT_NAMES.get(wrong.group(2) or "")
    return BadRequest(f"{sentence}, not {got}." if got else f"{sentence}.", param=param)
