"""Routes whose answer never changes: the description and the page that shows it.

Owns those bytes and the page's content security policy. Must not know routes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Final

from starlette.types import Receive, Scope, Send

PAGES: Final = Path(__file__).parent.parent / "pages"
_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class Fixed:
    """An ASGI application with one answer."""

    def __init__(
        self, body: bytes, content_type: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        self._body = body
        self._headers = [
            (b"content-type", content_type),
            (b"content-length", b"%d" % len(body)),
            *headers,
        ]

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


def page(name: str) -> Fixed:
    """A page of `router/pages`: its script and style run, and may ask this server only."""
    html = (PAGES / name).read_text(encoding="utf-8")
    policy = page_policy(html).encode()
    headers = ((b"content-security-policy", policy), (b"referrer-policy", b"no-referrer"))
    return Fixed(html.encode(), b"text/html; charset=utf-8", headers)


def page_policy(html: str) -> str:
    """The content security policy that lets in the page's inline script and style, no others."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    rules = [f"{kind}-src {' '.join(each)}" for kind, each in hashes.items() if each]
    return "; ".join(
        [
            "default-src 'none'",
            *rules,
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
