"""Whether a text satisfies a JSON schema, judged by the jsonschema package and exact numbers.

Owns the checks of formats: the package checks few of them without more packages.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import urllib.parse
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import jsonschema

_DURATION = re.compile(
    r"P(?:\d+W|(?=.)(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=.)(?:\d+H)?(?:\d+M)?(?:\d+S)?)?)"
)
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")


def _time(text: str) -> bool:
    return datetime.time.fromisoformat(text).tzinfo is not None


def _date_time(text: str) -> bool:
    return datetime.datetime.fromisoformat(text).tzinfo is not None and text[10] == "T"


def _email(text: str) -> bool:
    name, _, host = text.rpartition("@")
    return bool(name and host)


_FORMATS: dict[str, Callable[[str], object]] = {
    "date": datetime.date.fromisoformat,
    "time": _time,
    "date-time": _date_time,
    "duration": _DURATION.fullmatch,
    "email": _email,
    "hostname": _HOST.fullmatch,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "uri": lambda text: bool(urllib.parse.urlsplit(text).scheme),
}


def _checker() -> jsonschema.FormatChecker:
    checker = jsonschema.FormatChecker(formats=())
    for name, check in _FORMATS.items():

        def judge(value: object, check: Callable[[str], object] = check) -> bool:
            return not isinstance(value, str) or bool(check(value))

        checker.checks(name, raises=ValueError)(judge)
    return checker


def faults(schema: dict[str, Any], text: bytes) -> list[str]:
    """What is wrong with the text; nothing if it is JSON that satisfies the schema."""
    try:
        value = json.loads(text, parse_float=Decimal)
    except ValueError as error:
        return [str(error)]
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    exact.pop("$schema", None)
    validator = jsonschema.Draft202012Validator(exact, format_checker=_checker())
    return [error.message for error in validator.iter_errors(value)]
