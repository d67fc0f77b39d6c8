"""From the body of POST /v1/responses to a chat request.

Owns what becomes of each kind of item and option; tools and their choice are read as a chat's, in
either form. Must not know templates, engines or HTTP. Items that OpenAI's own servers would act on
are refused by name.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from router.api.field_names import FieldNames
from router.api.options import MAX_LOGPROBS
from router.api.refusals import needed_text, unsupported
from router.api.responses_schema import InputItem, InputPart, ResponsesRequest
from router.api.schemas import ChatMessage, ChatRequest, GenerationRequest
from router.api.turns import Turns
from router.errors import BadRequest

ROLES: Final = ("user", "assistant", "system", "developer")
LOGPROBS: Final = "message.output_text.logprobs"  # of `include`; its other values ask for nothing
MAX_ITEMS: Final = 8192
# Of what is only given back: pairs of metadata, characters of their keys and of other texts.
MAX_PAIRS: Final = 16
MAX_KEY_CHARS: Final = 64
MAX_ECHO_CHARS: Final = 512

# How a chat's fields are called here.
NAMES: Final = FieldNames(
    [
        (r"messages(\[\d+\].*)?", "input"),
        (r"max_completion_tokens", "max_output_tokens"),
        (r"response_format\.json_schema", "text.format"),
        (r"response_format", "text.format"),
        (r"reasoning_effort", "reasoning.effort"),
    ]
)
_TEXT_PARTS: Final = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def chat_of(request: ResponsesRequest) -> ChatRequest:
    """The same request as a chat. Raises BadRequest."""
    _refuse_state(request)
    _check_echoes(request)
    for name in ("n", "best_of"):
        if getattr(request, name) not in (None, 1):
            raise BadRequest(f"'{name}' is not supported: a response is one answer.", param=name)
    if request.truncation not in (None, "auto", "disabled"):
        raise BadRequest("'truncation' must be 'auto' or 'disabled'.", param="truncation")
    with_logprobs = wants_logprobs(request)
    fields = {
        field.name: getattr(request, field.name)
        for field in msgspec.structs.fields(GenerationRequest)
    }
    fields |= {
        "messages": _messages(request),
        "max_completion_tokens": request.max_output_tokens,
        "parallel_tool_calls": request.parallel_tool_calls,
        "logprobs": with_logprobs,
        "top_logprobs": request.top_logprobs if with_logprobs else None,
        "reasoning_effort": request.reasoning.effort if request.reasoning else None,
        "chat_template_kwargs": request.chat_template_kwargs,
    }
    form = request.text.format if request.text else None
    if form is not None:
        if request.response_format is not None:
            raise BadRequest(
                "'text.format' and 'response_format' exclude each other.", param="text.format"
            )
        fields["response_format"] = _response_format(form)
    return ChatRequest(**fields)


def wants_logprobs(request: ResponsesRequest) -> bool:
    """Whether the answer's tokens are told. Raises BadRequest."""
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise BadRequest(
            f"'top_logprobs' must be between 0 and {MAX_LOGPROBS}.", param="top_logprobs"
        )
    return bool(top) or LOGPROBS in (request.include or ())


def _refuse_state(request: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(request, name):
            raise BadRequest(
                f"'{name}' is not supported: this server keeps nothing. Send the whole "
                "conversation as 'input'.",
                param=name,
                code="unsupported_parameter",
            )
    if request.background:
        raise BadRequest(
            "'background' is not supported: this server keeps nothing. Use 'stream'.",
            param="background",
            code="unsupported_parameter",
        )


def _check_echoes(request: ResponsesRequest) -> None:
    metadata = request.metadata or {}
    if len(metadata) > MAX_PAIRS or any(
        len(key) > MAX_KEY_CHARS or len(value) > MAX_ECHO_CHARS for key, value in metadata.items()
    ):
        raise BadRequest(
            f"'metadata' may hold {MAX_PAIRS} pairs, keys of {MAX_KEY_CHARS} and values of "
            f"{MAX_ECHO_CHARS} characters.",
            param="metadata",
        )
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        if len(getattr(request, name) or "") > MAX_ECHO_CHARS:
            raise BadRequest(f"'{name}' may have at most {MAX_ECHO_CHARS} characters.", param=name)


# -- input


def _messages(request: ResponsesRequest) -> list[ChatMessage]:
    turns = Turns()
    if request.instructions:
        turns.say("system", [request.instructions])
    given = request.input
    if isinstance(given, str):
        turns.say("user", [given])
    elif given:
        if len(given) > MAX_ITEMS:
            raise BadRequest(f"'input' may hold at most {MAX_ITEMS} items.", param="input")
        for i, item in enumerate(given):
            _add_item(turns, item, f"input[{i}]")
    else:
        raise BadRequest("'input' is required.", param="input")
    messages = turns.messages
    if not messages:
        raise BadRequest("'input' holds nothing that can be answered.", param="input")
    return messages


def _add_item(turns: Turns, item: InputItem, place: str) -> None:
    match item.type:
        case None | "message":
            if item.role not in ROLES:
                raise BadRequest(
                    f"'{place}.role' must be one of: {', '.join(ROLES)}.", param=f"{place}.role"
                )
            turns.say(item.role, _texts(item.content, f"{place}.content"))
        case "reasoning":
            told = item.content or item.summary or []
            turns.think("\n".join(_texts(told, f"{place}.content")))
        case "function_call":
            name = needed_text(item.name, f"{place}.name")
            arguments = needed_text(item.arguments, f"{place}.arguments")
            turns.call(needed_text(item.call_id, f"{place}.call_id"), name, arguments)
        case "function_call_output":
            texts = _texts(item.output, f"{place}.output")
            turns.result(needed_text(item.call_id, f"{place}.call_id"), "\n".join(texts))
        case "item_reference":
            raise BadRequest(
                "Items of type 'item_reference' are not supported: this server keeps nothing. "
                "Send the item itself.",
                param=f"{place}.type",
            )
        case _:
            raise unsupported("Input items", item.type, f"{place}.type")


def _texts(content: Any, place: str) -> list[str]:
    """The texts of a string or of a list of parts. Raises BadRequest."""
    if isinstance(content, str):
        return [content]
    try:
        parts = msgspec.convert(content, list[InputPart])
    except msgspec.ValidationError as error:
        raise BadRequest(
            f"'{place}' must be a string or a list of content parts.", param=place
        ) from error
    texts: list[str] = []
    for i, part in enumerate(parts):
        if part.type == "refusal":
            texts.append(part.refusal or "")
        elif part.type in _TEXT_PARTS:
            texts.append(needed_text(part.text, f"{place}[{i}].text"))
        else:
            raise unsupported("Content parts", part.type, f"{place}[{i}].type")
    return texts


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
