"""How families of models write tool calls, as parsers over a `Window`.

Owns the syntaxes. Must not know requests, templates or what becomes of a call. Each returns False
as soon as the text cannot be a call of a known tool; once a call is open its arguments are passed
on as they come, also where the model breaks its own syntax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import ClassVar, Final

import jiter

from router.text.call_pairs import read_python, read_tagged
from router.text.window import WHITE, CallSink, Reading, Window

ARGUMENT_KEYS: Final = ("arguments", "parameters")
OTHER_KEYS: Final = ("type", "id", "index")  # may stand before the name; any other key is no call's

_QUOTE_OR_ESCAPE: Final = re.compile(r'["\\]')
_STRUCTURE: Final = re.compile(r'["{}\[\]<]')
_AFTER_SCALAR: Final = re.compile(r"[,}\]\s<]")
_NAME_END: Final = re.compile(r"[^a-zA-Z0-9_.\-]")


class TaggedCalls:
    """`<tool_call>{"name": …, "arguments": …}</tool_call>` (Hermes, Qwen).

    Or a list of such objects (Granite, Phi-4), or pairs in tags: `<tool_call>name<arg_key>…`
    (GLM-4.5), `<tool_call><function=name>…` (Qwen3-Coder).
    """

    marks: ClassVar[tuple[str, ...]] = ("<tool_call>", "<|tool_call|>")
    turns: ClassVar[tuple[str, ...]] = ()
    words: ClassVar[tuple[str, ...]] = (
        *marks,
        *("</tool_call>", "<|/tool_call|>"),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    )
    bare: ClassVar[bool] = False

    def read(self, sink: CallSink, mark: str) -> Reading[bool]:
        """See `CallSyntax`."""
        window = sink.window
        first = yield from window.skip()
        if first == "[":
            window.take(1)
            found = yield from _read_list(sink)
        elif first == "{":
            found = yield from _read_object(sink)
        else:
            found = yield from read_tagged(sink)
        if found and not sink.done:
            yield from window.skip(WHITE + "}]")  # a brace too many is common
            yield from window.accept("</tool_call>" if mark == "<tool_call>" else "<|/tool_call|>")
        return found


class JsonCalls:
    """`{"name": …, "parameters": …}` at the start of an answer, several behind `;` (Llama 3).

    Perhaps after a mark.
    """

    marks: ClassVar[tuple[str, ...]] = ("<|python_tag|>",)
    words: ClassVar[tuple[str, ...]] = marks
    turns: ClassVar[tuple[str, ...]] = ()
    bare: ClassVar[bool] = True

    def read(self, sink: CallSink, mark: str) -> Reading[bool]:
        """See `CallSyntax`."""
        window = sink.window
        yield from window.skip()
        if not (yield from _read_object(sink, certain=bool(mark))):
            return False
        while not sink.done:
            window.mark()
            char = yield from window.skip()
            if char == ";":
                window.take(1)
                yield from window.skip()
            if not (yield from _read_object(sink, certain=bool(mark))):
                window.back()
                break
        return True


class MarkedCalls:
    """`[TOOL_CALLS]` and a list of objects, or `name[ARGS]{…}` (Mistral)."""

    marks: ClassVar[tuple[str, ...]] = ("[TOOL_CALLS]",)
    words: ClassVar[tuple[str, ...]] = (*marks, "[CALL_ID]", "[ARGS]")
    turns: ClassVar[tuple[str, ...]] = ()
    bare: ClassVar[bool] = False

    def read(self, sink: CallSink, mark: str) -> Reading[bool]:  # noqa: ARG002 - there is one
        """See `CallSyntax`."""
        window = sink.window
        first = yield from window.skip()
        if first == "[":
            window.take(1)
            return (yield from _read_list(sink))
        if first == "{":
            return (yield from _read_object(sink))
        return (yield from self._read_named(sink))

    @staticmethod
    def _read_named(sink: CallSink) -> Reading[bool]:
        window = sink.window
        name = yield from window.until(_NAME_END)
        if name is None or not sink.knows(name):
            return False
        yield from window.skip()
        if (yield from window.accept("[CALL_ID]")):
            yield from window.until(_NAME_END)
        marked = yield from window.accept("[ARGS]")
        char = yield from window.skip()
        if not marked and char != "{":
            return False
        sink.open_call(name)
        yield from _read_arguments(sink)
        return True


class LineCalls:
    """The name on a line of its own, then JSON (GLM-4) or `tool_call(key='value')` (ChatGLM3).

    An answer has parts, each of which may be such a call.
    """

    marks: ClassVar[tuple[str, ...]] = ()
    turns: ClassVar[tuple[str, ...]] = ("<|assistant|>",)
    words: ClassVar[tuple[str, ...]] = turns
    bare: ClassVar[bool] = True

    def read(self, sink: CallSink, mark: str) -> Reading[bool]:  # noqa: ARG002 - there is none
        """See `CallSyntax`."""
        window = sink.window
        yield from window.skip()
        name = yield from self._read_name(sink)
        if not name:
            return False
        char = yield from window.skip()
        if char == "{":
            sink.open_call(name)
            yield from _read_arguments(sink)
            return True
        fenced = yield from window.accept("```python")
        yield from window.skip()
        if not (yield from window.accept("tool_call(")):
            return False
        sink.open_call(name)
        yield from read_python(sink)
        if fenced and not sink.done:
            yield from window.skip()
            yield from window.accept("```")
        return True

    @staticmethod
    def _read_name(sink: CallSink) -> Reading[str]:
        """The name on this line, "" if it is none: that is known before the line ends."""
        window = sink.window
        while True:
            line, end, _ = window.text[window.at :].partition("\n")
            name = line.rstrip(WHITE)
            if end:
                window.take(len(line) + 1)
                return name if sink.knows(name) else ""
            expected = sink.could_know(name) if name == line else sink.knows(name)
            if window.ended or not expected:
                return ""
            yield


# -- JSON


def _read_list(sink: CallSink) -> Reading[bool]:
    """Objects that are calls, behind the opening bracket of their list."""
    window = sink.window
    yield from window.skip()
    if not (yield from _read_object(sink)):
        return False
    while not sink.done:
        window.mark()
        char = yield from window.skip()
        if char == ",":
            window.take(1)
            yield from window.skip()
            if (yield from _read_object(sink)):
                continue
        elif char == "]":
            window.take(1)
            window.forget()
            break
        window.back()
        break
    return True


def _read_object(sink: CallSink, *, certain: bool = True) -> Reading[bool]:
    """`{"name": …, "arguments": {…}}`, keys in any order.

    Unless it is `certain` that a call was meant, it must have arguments to be one.
    """
    if (yield from sink.window.peek()) != "{":
        return False
    sink.window.take(1)
    return (yield from _ObjectCall(sink, certain).read())


class _ObjectCall:
    """What the members of an object have said so far."""

    def __init__(self, sink: CallSink, certain: bool) -> None:
        self._sink = sink
        self._certain = certain
        self._name = ""
        self._early = ""  # arguments that came before the name
        self._opened = False
        self._argued = False

    def read(self) -> Reading[bool]:
        """Reads all members and the closing bracket. False if it is no call."""
        window = self._sink.window
        char = ","
        while char == ",":
            if not (yield from self._read_member()) or self._sink.done:
                break
            char = yield from window.skip()
            window.take(char in (",", "}"))
        if self._opened and not self._argued and (yield from window.peek()):
            self._sink.argue("{}")
            self._sink.close_call()
        return self._opened

    def _read_member(self) -> Reading[bool]:
        """False if no further one is to be read."""
        window = self._sink.window
        char = yield from window.skip()
        if char != '"':
            window.take(char == "}")
            return False
        key = yield from _read_string(window)
        colon = yield from window.skip()
        if key is None or colon != ":":
            return False
        window.take(1)
        char = yield from window.skip()
        if key == "name" and not self._name:
            return char == '"' and self._take_name((yield from _read_string(window)) or "")
        if key in ARGUMENT_KEYS and not self._argued and not self._early:
            yield from self._read_arguments()
        elif self._name or key in OTHER_KEYS:
            yield from _read_value(window, _drop)
        else:
            return False
        return True

    def _take_name(self, name: str) -> bool:
        if not self._sink.knows(name):
            return False
        self._name = name
        if self._certain or self._early:
            self._open()
        if self._early:
            self._sink.argue(self._early)
            self._sink.close_call()
            self._argued = True
        return True

    def _read_arguments(self) -> Reading[None]:
        if not self._name:
            pieces: list[str] = []
            yield from _read_value(self._sink.window, pieces.append)
            self._early = "".join(pieces)
            return
        if not self._opened:
            self._open()
        self._argued = True
        yield from _read_arguments(self._sink)

    def _open(self) -> None:
        self._opened = True
        self._sink.open_call(self._name)


def _drop(_text: str) -> None: ...


def _read_arguments(sink: CallSink) -> Reading[None]:
    """One JSON value, passed on as it comes; closes the call when it is complete."""
    char = yield from sink.window.skip()
    if not char:
        return
    if char not in '{["tfn-0123456789':  # no JSON: there are none
        sink.argue("{}")
        sink.close_call()
    elif (yield from _read_value(sink.window, sink.argue)):
        sink.close_call()


def _read_value(window: Window, put: Callable[[str], None]) -> Reading[bool]:
    """Any JSON value; a text is put unquoted, null as {}. False if it is cut."""
    char = yield from window.peek()
    if char == '"':
        quoted = yield from _read_quoted(window)
        put(_unquoted(quoted))
        return quoted[-1:] == '"' and len(quoted) > 1
    if char in ("{", "["):
        return (yield from _read_structure(window, put))
    scalar = yield from window.until(_AFTER_SCALAR)
    if scalar is None:
        window.take(len(window.text))
        return False
    put("{}" if scalar == "null" else scalar)
    return True


def _read_structure(window: Window, put: Callable[[str], None]) -> Reading[bool]:
    """An object or list, by its brackets alone. A `<` outside of texts is the next tag: cut."""
    depth, quoted = 0, False
    at = window.at
    while True:
        found = (_QUOTE_OR_ESCAPE if quoted else _STRUCTURE).search(window.text, at)
        if found is None or (found[0] == "\\" and found.end() == len(window.text)):
            end = len(window.text) if found is None else found.start()
            if window.ended:
                put(window.take(len(window.text)))
                return False
            put(window.take(end - window.at))
            yield
            at = window.at
            continue
        at = found.end()
        match found[0]:
            case "\\":
                at += 1
            case '"':
                quoted = not quoted
            case "{" | "[":
                depth += 1
            case "<":
                put(window.take(found.start() - window.at))
                return False
            case _:
                depth -= 1
                if not depth:
                    put(window.take(at - window.at))
                    return True


def _read_quoted(window: Window) -> Reading[str]:
    """A JSON text with its quotes, which the last one lacks if it is cut."""
    pieces = [window.take(1)]
    while True:
        piece = yield from window.until(_QUOTE_OR_ESCAPE)
        if piece is None:
            return "".join([*pieces, window.take(len(window.text))])
        pieces.append(piece)
        char = window.take(1)
        pieces.append(char)
        if char == '"':
            return "".join(pieces)
        yield from window.peek()
        pieces.append(window.take(1))


def _read_string(window: Window) -> Reading[str | None]:
    """The value of a JSON text; None if it is cut or wrong."""
    quoted = yield from _read_quoted(window)
    try:
        value = json.loads(quoted, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _unquoted(quoted: str) -> str:
    """The text in quotes, also of one that is cut."""
    try:
        value = jiter.from_json(quoted.encode("utf-8", "replace"), partial_mode="trailing-strings")
    except ValueError:
        return quoted.strip('"')
    return value if isinstance(value, str) else ""
