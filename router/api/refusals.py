"""Refusals that several routes share.

Owns their words. Must not know which members a route has.
"""

from __future__ import annotations

import re
from typing import Any, Final

from router.errors import BadRequest

_TYPE: Final = re.compile(r"[a-z0-9_]{1,40}")


def unsupported(what: str, kind: object, place: str) -> BadRequest:
    """For things of a type that we cannot use; the type is named if it looks like one."""
    if isinstance(kind, str) and _TYPE.fullmatch(kind):
        return BadRequest(f"{what} of type '{kind}' are not supported by this server.", param=place)
    return BadRequest(f"{what} of this type are not supported by this server.", param=place)


def needed_text(value: Any, place: str) -> str:
    """A string that must be there. Raises BadRequest."""
    if value is None:
        raise BadRequest(f"'{place}' is required.", param=place)
    if not isinstance(value, str):
        raise BadRequest(f"'{place}' must be a string.", param=place)
    return value
