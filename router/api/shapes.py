"""What answers look like, as structs: for the description at /openapi.json only.

Owns the names and types of the members that clients may rely on. Nothing is encoded with these:
hot answers are written by their routes. Tests hold real answers against the schemas made of them.
A member that is left out in some answers is `UNSET` by default.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "abort"]


class ErrorDetail(Struct, frozen=True):
    """`param` names the field at fault, `code` is made for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Struct, frozen=True):
    """Any failure of an OpenAI route; in a stream that has begun, its last event but `[DONE]`."""

    error: ErrorDetail


class AnthropicErrorDetail(Struct, frozen=True):
    """`type` is one of Anthropic's names of errors."""

    type: str
    message: str


class AnthropicError(Struct, frozen=True):
    """Any failure of an Anthropic route; in a stream that has begun, its last event."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class PromptTokensDetails(Struct, frozen=True):
    """How many of the prompt's tokens were not computed again."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """Tokens of the request; hidden end tokens count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType | None = UNSET


class CalledFunction(Struct, frozen=True):
    """`arguments` is a JSON text; in a stream, the next piece of it."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCall(Struct, frozen=True):
    """One call of a function; in a stream, `index` tells to which one a piece belongs."""

    function: CalledFunction
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    index: int | UnsetType = UNSET


class AnswerMessage(Struct, frozen=True):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType | None = UNSET


class ChatChoice(Struct, frozen=True):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason | None
    logprobs: dict[str, Any] | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType | None = UNSET


class ChatAnswer(Struct, frozen=True):
    """A whole answer of a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET


class Delta(Struct, frozen=True):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """The part of a chunk that belongs to one choice."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: dict[str, Any] | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType | None = UNSET


class ChatChunk(Struct, frozen=True):
    """The data of one event of a streamed chat; `[DONE]` ends the stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET


class CompletionChoice(Struct, frozen=True):
    """One continuation of one prompt."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: dict[str, Any] | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET


class CompletionAnswer(Struct, frozen=True):
    """A whole answer, or the data of one event; `[DONE]` ends a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType | None = UNSET


class EmbeddingUsage(Struct, frozen=True):
    """Tokens of all texts together."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingEntry(Struct, frozen=True):
    """One vector: numbers, or the base64 of little-endian float32 if asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(Struct, frozen=True):
    """One vector for each text, in their order."""

    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


class ModelEntry(Struct, frozen=True):
    """One name of a model. `max_model_len` bounds prompt and answer together, in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    capabilities: dict[str, bool]
    embeddings: dict[str, Any] | UnsetType = UNSET
    state: str | UnsetType = UNSET


class OperatedReplica(Struct, frozen=True):
    """One engine slot: where it runs, and in which state."""

    index: int
    device: str
    state: str


class OperatedModel(Struct, frozen=True):
    """One model for the operator. `needed_bytes` are those of all its engines, as planned."""

    id: str
    object: Literal["model"]
    names: list[str]
    state: Literal["ready", "loading", "unloading", "unloaded", "asleep", "failed"]
    waiting: int
    needed_bytes: int
    replicas: list[OperatedReplica]


class OperatedModels(Struct, frozen=True):
    """All of them."""

    object: Literal["list"]
    data: list[OperatedModel]


class ReloadedModel(Struct, frozen=True):
    """What a reload did to one model."""

    model: str
    change: Literal["add", "remove", "replace", "rename", "replicas"]
    detail: str


class Reload(Struct, frozen=True):
    """What a reload did; `limits` as sentences."""

    object: Literal["reload"]
    models: list[ReloadedModel]
    limits: list[str]


class ModelList(Struct, frozen=True):
    """All names of all models."""

    object: Literal["list"]
    data: list[ModelEntry]


class AnthropicModel(Struct, frozen=True):
    """One name of a model, for clients that send `anthropic-version`."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str


class AnthropicModelList(Struct, frozen=True):
    """All names of all models, for clients that send `anthropic-version`; always one page."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class TokenizerInfo(Struct, frozen=True):
    """The tokens that frame a text; `model_max_length` in tokens. The template is not told."""

    model: str
    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None
    has_chat_template: bool
    vocab_size: int
    model_max_length: int


class TokenizeAnswer(Struct, frozen=True):
    """Token ids of a text or of a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeAnswer(Struct, frozen=True):
    """The text of token ids."""

    prompt: str


class StatusAnswer(Struct, frozen=True):
    """What a health route says when all is well."""

    status: Literal["live", "ready", "started"]


class VersionAnswer(Struct, frozen=True):
    """The version of the installed distribution."""

    version: str


class ResponseTokens(Struct, frozen=True):
    """Tokens of a response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class Response(Struct, frozen=True):
    """An answer in items: `reasoning`, `message` and `function_call`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseTokens | None


class ResponseEvent(Struct, frozen=True):
    """One event of a streamed response; further members hang on its type."""

    type: str
    sequence_number: int


class ResponseInputTokens(Struct, frozen=True):
    """The prompt's size."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class MessageUsage(Struct, frozen=True):
    """Tokens of a message."""

    input_tokens: int
    output_tokens: int


class Message(Struct, frozen=True):
    """An answer in blocks: `thinking`, `text` and `tool_use`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(Struct, frozen=True):
    """One event of a streamed message; further members hang on its type."""

    type: str


class MessageTokens(Struct, frozen=True):
    """The prompt's size."""

    input_tokens: int
