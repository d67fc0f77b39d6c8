"""How much a JSON body may hold, judged from its bytes before anything is built of them.

Owns those limits. Must not know fields or HTTP. Building objects holds Python's lock in one piece,
so its time is bounded by their number: CPU time of one decode at each limit, measured on one core,
is 17 ms (containers), 10 ms (texts), 45 ms (values), and 50 ms for 20 MB of text.
Counting goes by slices, between which other threads run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from router.errors import BadRequest, PayloadTooLarge

SMALL_BYTES: Final = 64 * 1024  # nothing of this size takes long, whatever it holds
SLICE_BYTES: Final = 1024 * 1024
MAX_CONTAINERS: Final = 50_000
MAX_TEXTS: Final = 100_000
MAX_VALUES: Final = 1_100_000
MAX_DEPTH: Final = 128  # of objects and lists in each other: what walks them later may recurse

_BACKSLASH: Final = ord("\\")
_NOT_BRACKETS: Final = bytes(sorted(set(range(256)) - set(b"[]{}")))


class Shape(NamedTuple):
    """What a body holds: lists and objects, texts (names of members too), commas."""

    containers: int
    texts: int
    commas: int


def check_shape(body: bytes) -> None:
    """Raises PayloadTooLarge if decoding `body` would build too many objects."""
    for shape in shapes_so_far(body):
        for number, most, what in (
            (shape.containers, MAX_CONTAINERS, "lists and objects"),
            (shape.texts, MAX_TEXTS, "texts"),
            (shape.commas, MAX_VALUES, "values"),
        ):
            if number > most:
                raise PayloadTooLarge(f"The body holds more than {most} {what}.")


def check_depth(body: bytes) -> None:
    """Raises BadRequest if a valid `body` holds containers more than MAX_DEPTH deep."""
    left = b"".join(outsides(body)).translate(None, _NOT_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not left:
            return
        left = left.replace(b"[]", b"").replace(b"{}", b"")  # one level less, at least
    if left:
        raise BadRequest("The body is nested too deeply.", code="invalid_json")


def shapes_so_far(body: bytes) -> Iterator[Shape]:
    """The growing count, after each slice."""
    containers = marks = commas = 0
    for outside in outsides(body):
        containers += outside.count(b"{") + outside.count(b"[")
        commas += outside.count(b",")
        marks += outside.count(b'"')
        yield Shape(containers, marks // 2, commas)


def outsides(body: bytes) -> Iterator[bytes]:
    """The bytes of each slice that belong to no text, and all quotation marks of texts."""
    inside = False
    start = 0
    while start < len(body):
        end = start + SLICE_BYTES
        while end < len(body) and body[end - 1] == _BACKSLASH:
            end += 1  # an escape must not be cut in two
        part = body[start:end]
        if _BACKSLASH in part:
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = part.split(b'"')
        outside = b"".join(pieces[int(inside) :: 2])
        yield outside + b'"' * (len(pieces) - 1)
        inside ^= len(pieces) % 2 == 0
        start = end
