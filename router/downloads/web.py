"""HTTP for downloads: one GET at a time, with ranges, redirects and time limits.

Owns the rule that credentials reach only the host they were meant for. Must not know hubs or files.
The standard library's client is enough: it honours proxies and the system's certificates.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO, Any, Final
from urllib.error import HTTPError
from urllib.parse import urlsplit

TIMEOUT_S: Final = 20.0  # to connect, and between two pieces of a body
CHUNK_BYTES: Final = 1024 * 1024
MAX_JSON_BYTES: Final = 64 * 1024 * 1024
JSON_TRIES: Final = 3
PASSING: Final = (408, 429, 500, 502, 503, 504)  # statuses that another try may not meet
_SECRET_HEADERS: Final = ("Authorization", "Cookie")


class NoAnswer(Exception):
    """No connection, a broken one, or a status of `PASSING`: another try may succeed."""


class Refused(Exception):
    """The server answered with an error that will stay."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status} {reason}")
        self.status = status
        self.reason = reason  # a word of Hugging Face's for machines, "" if there is none


@dataclass(frozen=True, slots=True)
class Address:
    """A URL and the headers that only its own host may see."""

    url: str
    secrets: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or self.url


def open_url(address: Address, start: int = 0) -> HTTPResponse:
    """GET from byte `start` on. The caller closes the answer. Raises `NoAnswer` or `Refused`."""
    headers = {"User-Agent": "llm-router", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(address.url, headers=headers)
    for name, value in address.secrets.items():
        request.add_unredirected_header(name, value)
    opener = urllib.request.build_opener(_Redirects)
    try:
        answer: HTTPResponse = opener.open(request, timeout=TIMEOUT_S)
        return answer
    except HTTPError as error:
        error.close()
        if error.code in PASSING:
            raise NoAnswer(f"{address.host} answered {error.code}") from error
        raise Refused(error.code, error.headers.get("X-Error-Code") or "") from error
    except (OSError, HTTPException) as error:
        raise NoAnswer(f"{address.host}: {_why(error)}") from error
    except ValueError:  # its text may show a header, and with it the token
        raise NoAnswer("the hub's address cannot be used") from None


def read_chunks(answer: HTTPResponse) -> Iterator[bytes]:
    """The body as it comes; it may end early. Raises `NoAnswer`."""
    while True:
        try:
            chunk = answer.read1(CHUNK_BYTES)  # what is there: a slow line must not wait for more
        except (OSError, HTTPException) as error:
            raise NoAnswer(_why(error)) from error
        if not chunk:
            return
        yield chunk


def read_json(address: Address) -> Any:
    """The decoded body of a small answer, with some tries. Raises `NoAnswer` or `Refused`."""
    for attempt in range(1, JSON_TRIES + 1):
        try:
            with open_url(address) as answer:
                body = b"".join(_limited(answer))
            return json.loads(body)
        except ValueError as error:
            raise NoAnswer(f"{address.host} answered something that is no JSON") from error
        except NoAnswer:
            if attempt == JSON_TRIES:
                raise
            time.sleep(attempt)
    raise AssertionError("unreachable")


def total_bytes(answer: HTTPResponse) -> int | None:
    """Size of the whole file as the server sees it, None if it does not say."""
    whole = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
    text = whole if answer.status == 206 else answer.headers.get("Content-Length") or ""
    return int(text) if text.isdecimal() else None


def _limited(answer: HTTPResponse) -> Iterator[bytes]:
    num_bytes = 0
    for chunk in read_chunks(answer):
        num_bytes += len(chunk)
        if num_bytes > MAX_JSON_BYTES:
            raise NoAnswer(f"an answer of more than {MAX_JSON_BYTES:,} bytes")
        yield chunk


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(error).__name__


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Credentials follow a redirect only within the host that they were given to."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(new.full_url)[:2] == urlsplit(req.full_url)[:2]:
            for name in _SECRET_HEADERS:
                if name in req.unredirected_hdrs:
                    new.add_unredirected_header(name, req.unredirected_hdrs[name])
        return new
