"""Arguments that are no JSON, made JSON pair by pair: Python's calls and tags.

Owns the conversion. Must not know which syntax stands where: see `router.text.call_syntax`.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, Final

from router.text.window import WHITE, CallSink, Reading, Window

_TAG_END: Final = re.compile(r">")
_TAG_OR_BLANK: Final = re.compile(r"[\s<]")
_PYTHON: Final = re.compile(r"[\"'\\(){}\[\],]")
_KEY: Final = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)")
MAX_LITERAL_CHARS: Final = 65_536  # of one argument; longer ones are taken as texts


class Pairs:
    """Writes a JSON object in pieces, and closes the call with it."""

    def __init__(self, sink: CallSink) -> None:
        self._sink = sink
        self._opening = "{"

    def add(self, key: str, value: str) -> None:
        """`value` is JSON."""
        self._sink.argue(f"{self._opening}{_json(key)}: {value}")
        self._opening = ", "

    def close(self) -> None:
        """All pairs were added."""
        self._sink.argue("{}" if self._opening == "{" else "}")
        self._sink.close_call()


def read_tagged(sink: CallSink) -> Reading[bool]:
    """A name and its arguments in tags, as GLM-4.5 or as Qwen3-Coder writes them.

    What is in tags is a text if the tool's schema says so or if it is no JSON.
    """
    window = sink.window
    within = yield from window.accept("<function=")
    name = yield from window.until(_TAG_END if within else _TAG_OR_BLANK)
    if name is None or not sink.knows(name):
        return False
    window.take(within)
    sink.open_call(name)
    pairs = Pairs(sink)
    while True:
        yield from window.skip()
        pair = yield from _read_pair(window)
        if pair is None:
            break
        key, value = pair
        pairs.add(key, _json(value) if sink.takes_text(name, key) else _json_of_text(value))
    if (yield from window.peek()):  # else it was cut
        pairs.close()
    if within and not sink.done:
        yield from window.accept("</function>")
    return True


def _read_pair(window: Window) -> Reading[tuple[str, str] | None]:
    if (yield from window.accept("<arg_key>")):
        key = yield from window.until_word("</arg_key>")
        yield from window.skip()
        yield from window.accept("<arg_value>")
        value = yield from window.until_word("</arg_value>")
    elif (yield from window.accept("<parameter=")):
        key = yield from window.until(_TAG_END)
        window.take(1)
        value = yield from window.until_word("</parameter>")
        value = value and value.removeprefix("\n").removesuffix("\n")
    else:
        return None
    if key is None or value is None:  # cut
        window.take(len(window.text))
        return None
    return key.strip(WHITE), value


def read_python(sink: CallSink) -> Reading[None]:
    """`key='value', …)`: what stands behind the opening bracket of a call in Python."""
    window, pairs = sink.window, Pairs(sink)
    while True:
        argument = yield from _read_argument(window)
        if argument is None:  # cut
            return
        key = _KEY.match(argument)
        if key is not None:
            pairs.add(key[1], _json_of_literal(argument[key.end() :].strip()))
        if window.take(1) != ",":
            return pairs.close()


def _read_argument(window: Window) -> Reading[str | None]:
    """Up to the comma or bracket that ends it, which is left; None if that never comes."""
    pieces: list[str] = []
    depth, quote = 0, ""
    while True:
        piece = yield from window.until(_PYTHON)
        if piece is None:
            window.take(len(window.text))
            return None
        pieces.append(piece)
        char = yield from window.peek()
        if not quote and not depth and char in ",)":
            return "".join(pieces)
        pieces.append(window.take(1))
        if char == "\\":
            yield from window.peek()
            pieces.append(window.take(1))
        elif char in "\"'":
            quote = "" if char == quote else quote or char
        elif not quote:
            depth += (char in "([{") - (char in ")]}")


def _json_of_literal(text: str) -> str:
    """Of a literal in Python, or in JSON; what is neither becomes a text."""
    if len(text) <= MAX_LITERAL_CHARS:
        try:
            value: Any = ast.literal_eval(text)
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            pass
    return _json_of_text(text)


def _json_of_text(text: str) -> str:
    """The text itself if it is JSON, else a JSON text of it."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _json(text)
    return text.strip(WHITE)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
