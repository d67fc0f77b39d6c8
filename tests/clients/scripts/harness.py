"""Runs the cases of one client script: settings come in as JSON, results go out as JSON.

Owns nothing. Runs in the client's environment, where only that client and its dependencies are.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]


def run(*cases: Callable[[Settings], Any]) -> None:
    """Each case by itself: what one raises is its own result, and the others go on."""
    settings = json.load(sys.stdin)
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case.__name__] = case(settings)
        except Exception:  # noqa: BLE001 - it is the result
            results[case.__name__] = {"crashed": traceback.format_exc()}
    sys.stdout.write(f"\n{json.dumps(results)}\n")


def raised(call: Callable[[], Any]) -> dict[str, Any]:
    """What `call` raises: its classes, innermost first, and what it knows of the answer."""
    try:
        value = call()
    except Exception as error:  # noqa: BLE001 - it is the result
        return described(error)
    return {"classes": [], "returned": repr(value)}


def described(error: BaseException) -> dict[str, Any]:
    """An exception as JSON."""
    fields = {name: getattr(error, name, None) for name in ("code", "param", "type")}
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", None) or {}
    return {
        **{name: value if isinstance(value, str) else None for name, value in fields.items()},
        "classes": [entry.__name__ for entry in type(error).__mro__],
        "status": getattr(error, "status_code", None),
        "retry_after": headers.get("retry-after"),
        "message": str(error),
    }
