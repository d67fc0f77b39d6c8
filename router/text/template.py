"""Chat templates: a conversation to token ids.

Owns the rules of who may write control tokens: the template may, the client may not (P11). Must not
know HTTP. The template is looked for where model folders and GGUF files keep it.

How client text stays text: control tokens typed by a client are replaced by unguessable marks
before rendering; after it, the marks stand in the text exactly where the template put the client's
words, and the encoder sets the words back as plain text. A conversation without such words is
rendered as it is, so that its ids are those of the plain text.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from jinja2.exceptions import SecurityError, TemplateError

from router.checkpoint.gguf import read_gguf
from router.errors import EXIT_CONFIG, BadRequest, StartError
from router.text.sandbox import Program, TemplateRefused
from router.text.settings import optional_config
from router.text.tokenizer import Tokenizer
from router.text.tool_forms import DEFAULT_FORM, thinking_in, tool_form_in
from router.text.tool_text import Message, opened, written_out

MAX_TEMPLATE_BYTES = 1024 * 1024
TOOL_TEMPLATE = "tool_use"  # the name under which a list of templates keeps the one for tools

# Mistral's templates refuse other ids of calls than those that its own server makes.
_SHORT_IDS = re.compile(r"length\s*!=\s*9\b")
SHORT_ID_CHARS = 9

_PROBE = "p5749308126"  # a text that no template has by itself

# A variable of the request must not take the place of one of these.
RESERVED = frozenset(
    (
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
        "range",
        "namespace",
    )
)

# What a wrong template or unexpected message shape makes Python raise inside a rendering.
_RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One model's template, compiled once; several threads may render it at once."""

    opens_line = False

    def __init__(self, source: str, tool_source: str | None = None) -> None:
        """Raises `StartError` when jinja2 cannot compile it."""
        self.source = source
        self._program = _compiled(source)
        self._tool_program = _compiled(tool_source) if tool_source else self._program
        everything = source + (tool_source or "")
        self._knows_developer = "developer" in everything
        self._knows_calls = "tool_calls" in everything
        self._short_ids = bool(_SHORT_IDS.search(everything))
        self.tool_parser = tool_form_in(everything) if self._knows_tools else DEFAULT_FORM
        self.reasoning_parser = thinking_in(everything)

    def render_tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        add_generation_prompt: bool,
        continue_final: bool,
        kwargs: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> list[int]:
        """The prompt's ids, with the model's start token exactly once.

        `messages` are dicts with plain texts as content, `tools` are as OpenAI lists them; where
        the template knows no tools they are written out as text. `continue_final` leaves the last
        message open, so that the answer goes on with it. `kwargs` are further template variables.
        Raises `BadRequest`: the template refused, a reserved variable, a limit of the sandbox.
        """
        clash = sorted(RESERVED.intersection(kwargs))
        if clash:
            raise BadRequest(f"{clash[0]} cannot be set here", param="chat_template_kwargs")
        if continue_final and add_generation_prompt:
            raise BadRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        if tools and not self._knows_tools:
            messages = written_out(messages, tools, system=self._shows_system)
            tools = None
        elif not self._knows_calls and any(map(_is_about_tools, messages)):
            messages = written_out(messages, None, system=self._shows_system)
        marks = _Marks(tokenizer)
        prepared = [self._prepared(message) for message in messages]
        hidden = [marks.hide(message) for message in prepared]
        end = marks.new("") if continue_final else ""
        if continue_final:
            hidden[-1] = {**hidden[-1], "content": _content(hidden[-1]) + end}
        variables = {
            **{name: marks.hide(value) for name, value in kwargs.items()},
            "messages": hidden,
            "tools": [marks.hide(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
            "eos_token": tokenizer.token_text(tokenizer.eos_ids[0]) if tokenizer.eos_ids else "",
        }
        text = _rendered(self._tool_program if tools else self._program, variables)
        if continue_final:
            text, found, _ = text.rpartition(end)
            if not found:
                raise BadRequest(
                    "The model's chat template leaves out the last message, so that it cannot be "
                    "continued.",
                    param="continue_final_message",
                )
        return tokenizer.encode_trusted(text, marks.hidden)

    @cached_property
    def _knows_tools(self) -> bool:
        """Tools stand in what it writes: some only mention them, or look for them elsewhere."""
        if self._tool_program is not self._program:
            return True
        tool = {"name": _PROBE, "description": _PROBE, "parameters": {"type": "object"}}
        return "tools" in self.source and self._shows(
            [{"role": "user", "content": "?"}], [{"type": "function", "function": tool}]
        )

    @cached_property
    def _shows_system(self) -> bool:
        """A system message stands in what it writes: some refuse them, some leave them out."""
        system = {"role": "system", "content": _PROBE}
        return self._shows([system, {"role": "user", "content": "?"}], None)

    def _shows(self, messages: list[Message], tools: list[Message] | None) -> bool:
        variables = {"messages": messages, "tools": tools, "documents": None}
        ends = {"add_generation_prompt": True, "bos_token": "", "eos_token": ""}
        try:
            return _PROBE in self._program.render({**variables, **ends})
        except _RENDER_ERRORS:
            return False

    def _prepared(self, message: Message) -> Message:
        """As templates expect it: known roles, content a text, tool arguments an object.

        Thinking goes by two names.
        """
        prepared = dict(message)
        if prepared.get("role") == "developer" and not self._knows_developer:
            prepared["role"] = "system"
        if prepared.get("content") is None:
            prepared["content"] = ""
        calls: Any = prepared.get("tool_calls")
        if isinstance(calls, list):
            entries: list[Any] = calls
            prepared["tool_calls"] = [self._prepared_call(call) for call in entries]
        if self._short_ids and "tool_call_id" in prepared:
            prepared["tool_call_id"] = _short_id(prepared["tool_call_id"])
        thinking = prepared.get("reasoning_content") or prepared.get("reasoning")
        if thinking:
            prepared["reasoning_content"] = prepared["reasoning"] = thinking
        return prepared

    def _prepared_call(self, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        prepared = dict(cast("Mapping[str, Any]", call))
        if self._short_ids and "id" in prepared:
            prepared["id"] = _short_id(prepared["id"])
        function = prepared.get("function")
        if isinstance(function, Mapping):
            inner = dict(cast("Mapping[str, Any]", function))
            if isinstance(inner.get("arguments"), str):
                inner["arguments"] = opened(inner["arguments"])
            prepared["function"] = inner
        return prepared


def _is_about_tools(message: Message) -> bool:
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def _short_id(given: Any) -> Any:
    """An id of nine letters and digits; the same for the same."""
    text = str(given)
    if len(text) == SHORT_ID_CHARS and text.isascii() and text.isalnum():
        return text
    return hashlib.blake2b(text.encode("utf-8", "replace")).hexdigest()[:SHORT_ID_CHARS]


def load_template(path: Path) -> ChatTemplate | None:
    """The template of a model folder or GGUF file, None if it has none.

    Raises `StartError` naming the file if the template is unusable.
    """
    named = _gguf_templates(path) if path.is_file() else _folder_templates(path)
    if not named:
        return None
    default = named.get("default") or next(iter(named.values()))
    if any(len(source) > MAX_TEMPLATE_BYTES for source in named.values()):
        raise StartError(f"the chat template of {path} is too long", EXIT_CONFIG)
    try:
        return ChatTemplate(default, named.get(TOOL_TEMPLATE))
    except StartError as error:
        raise StartError(f"{path}: {error.message}", EXIT_CONFIG) from error


def read_template(file: Path) -> ChatTemplate:
    """The template that is all of a file. Raises `StartError` naming the file if it is unusable."""
    source = _template_text(file)
    try:
        return ChatTemplate(source)
    except StartError as error:
        raise StartError(f"{file}: {error.message}", EXIT_CONFIG) from error


class _Marks:
    """Stand-ins for control tokens in client text; `hidden` maps each back to what it hides."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.hidden: dict[str, str] = {}
        self._tokenizer = tokenizer
        # digits only: they survive changes of case, trimming and JSON
        self._nonce = f"{secrets.randbelow(10**24):024d}"

    def new(self, original: str) -> str:
        """A fresh mark."""
        mark = f"{self._nonce}{len(self.hidden):06d}"
        self.hidden[mark] = original
        return mark

    def hide(self, value: Any, key: object = None) -> Any:
        """The same value with marks in all its texts, keys of inner objects included.

        Roles and types are compared by templates and stay, as long as they are plain words.
        """
        if isinstance(value, str):
            if key in ("role", "type") and value.isidentifier():
                return value
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self._hide_key(name): self.hide(item, name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def _hide_key(self, key: Any) -> Any:
        return self._hide_text(key, edges=False) if isinstance(key, str) else key

    def _hide_text(self, text: str, *, edges: bool = True) -> str:
        names = self._tokenizer.special_names
        hidden = names.pattern.sub(lambda match: self.new(match[0]), text)
        if not edges:
            return hidden
        # the template's own text, or another message, could complete what a text begins or ends
        inner = hidden.strip()
        if not inner:
            return hidden
        at = hidden.index(inner[0])
        if names.could_end(inner) or names.could_hold(inner):
            hidden = hidden[:at] + self.new(inner[0]) + hidden[at + 1 :]
            inner = hidden.strip()
        if names.could_begin(inner):
            last = at + len(inner) - 1
            hidden = hidden[:last] + self.new(inner[-1]) + hidden[last + 1 :]
        return hidden


def _compiled(source: str) -> Program:
    try:
        return Program(source)
    except (TemplateError, RecursionError) as error:
        raise StartError(f"the chat template is not usable: {error}", EXIT_CONFIG) from error


def _rendered(program: Program, variables: Mapping[str, Any]) -> str:
    try:
        return program.render(variables)
    except TemplateRefused as error:
        message = f"The model's chat template refuses this conversation: {error.message}"
        raise BadRequest(message, param="messages") from error
    except SecurityError as error:
        message = f"The model's chat template was stopped: {error.message}"
        raise BadRequest(message, param="messages") from error
    except _RENDER_ERRORS as error:
        message = "The model's chat template cannot render this conversation"
        raise BadRequest(f"{message}: {str(error)[:200]}", param="messages") from error


def _content(message: Message) -> str:
    content = message["content"]
    if not isinstance(content, str):
        raise BadRequest("the last message has no text to continue", param="messages")
    return content


def _folder_templates(folder: Path) -> dict[str, str]:
    """name -> source, from the first place that has any (the order of transformers)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        found = {"default": _template_text(file)}
        extra = folder / "additional_chat_templates" / f"{TOOL_TEMPLATE}.jinja"
        if extra.is_file():
            found[TOOL_TEMPLATE] = _template_text(extra)
        return found
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _named(optional_config(folder / name).get("chat_template"))
        if found:
            return found
    return {}


def _gguf_templates(file: Path) -> dict[str, str]:
    metadata = read_gguf(file, texts=False).metadata
    keys = {"default": "tokenizer.chat_template"}
    keys[TOOL_TEMPLATE] = f"tokenizer.chat_template.{TOOL_TEMPLATE}"
    found = {name: metadata.get(key) for name, key in keys.items()}
    return {name: source for name, source in found.items() if isinstance(source, str)}


def _named(value: object) -> dict[str, str]:
    """A template as written in a config: its source, or a list of {name, template}."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, Mapping)]
        return {
            str(entry["name"]): str(entry["template"])
            for entry in entries
            if "name" in entry and "template" in entry
        }
    return {}


def _template_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise StartError(f"{file} is larger than {MAX_TEMPLATE_BYTES:,} bytes", EXIT_CONFIG)
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StartError(f"{file} is not readable: {error}", EXIT_CONFIG) from error
