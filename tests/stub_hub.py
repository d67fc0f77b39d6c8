"""A model hub on 127.0.0.1: the routes of Hugging Face's and ModelScope's that downloads need.

Large files are served as the real ones do it: a redirect to another host name (here "localhost"),
which must not see the token. Faults are set per file; every request is recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Request:
    method: str
    path: str
    range: str
    token: str  # what it carried as Authorization

    @property
    def is_for_weights(self) -> bool:
        return self.path.startswith("/cdn/") or urlsplit(self.path).path.endswith(_LARGE)


@dataclass
class StubHub:
    """Repositories by name, each a table of file contents."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str = ""  # needed for everything if set
    renamed: dict[str, str] = field(default_factory=dict)  # old name -> name
    gated: set[str] = field(default_factory=set)  # repositories whose files need the token
    knows_ranges: bool = True
    served: dict[str, bytes] = field(default_factory=dict)  # file name -> other content
    cut: dict[str, list[int]] = field(default_factory=dict)  # close after so many bytes, once each
    hold: dict[str, int] = field(default_factory=dict)  # stop there until `release`
    fail: list[int] = field(default_factory=list)  # statuses of the next requests
    release: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add_folder(self, repository: str, folder: Path) -> None:
        self.repositories[repository] = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }

    def asked_for(self, name: str) -> list[Request]:
        """Requests of the content of that file, redirects left out."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}")]

    @property
    def weight_requests(self) -> list[Request]:
        return [request for request in self.requests if request.is_for_weights]


@contextmanager
def serving(hub: StubHub) -> Iterator[StubHub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(_LARGE)


def digest(name: str, content: bytes) -> str:
    return sha256(content) if is_large(name) else git_sha1(content)


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `requests` is the record."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        token = self.headers.get("Authorization", "")
        asked_range = self.headers.get("Range", "")
        hub.requests.append(Request(self.command, self.path, asked_range, token))
        if hub.fail:
            return self._status(hub.fail.pop(0))
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", url.path):
            return self._content(match[1], unquote(match[2]), "")
        if hub.token and token != f"Bearer {hub.token}":
            return self._status(401, "RepoNotFound" if not token else "")
        for old, new in hub.renamed.items():
            if old in url.path:
                return self._redirect(self.path.replace(old, new), 307)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", url.path):
            return self._hf_listing(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", url.path):
            return self._hf_tree(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", url.path):
            return self._resolve(match[1], unquote(match[2]))
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", url.path):
            return self._ms_listing(match[1])
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", url.path):
            return self._content(match[1], parse_qs(url.query)["FilePath"][0], "")
        return self._status(404)

    # -- Hugging Face

    def _hf_listing(self, repository: str) -> None:
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._status(404, "RepoNotFound")
        siblings = [self._sibling(name, content) for name, content in files.items()]
        return self._json(
            {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        )

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
        entry["blobId"] = git_sha1(content)
        if is_large(name):
            entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def _hf_tree(self, repository: str) -> None:
        files = self.hub.repositories[repository]
        entries: list[dict[str, Any]] = []
        for name, content in files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
            if is_large(name):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, repository: str, name: str) -> None:
        content = self.hub.repositories.get(repository, {}).get(name)
        if content is None:
            return self._status(404, "EntryNotFound")
        if repository in self.hub.gated:
            return self._status(401, "GatedRepo")
        etag = f'"{digest(name, content)}"'
        if not is_large(name):
            return self._content(repository, name, etag)
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": etag}
        headers["X-Linked-Size"] = str(len(content))
        url = f"http://localhost:{self.hub.port}/cdn/{repository}/{name}"
        return self._redirect(url, 302, headers)

    # -- ModelScope

    def _ms_listing(self, repository: str) -> None:
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._json({"Code": 10010205001, "Success": False, "Message": "not found"}, 404)
        entries = [
            {"Path": name, "Name": name, "Type": "blob", "Size": len(c), "Sha256": sha256(c)}
            for name, c in files.items()
        ]
        folder = {"Path": "1_Pooling", "Name": "1_Pooling", "Type": "tree", "Size": 0, "Sha256": ""}
        return self._json({"Code": 200, "Success": True, "Data": {"Files": [folder, *entries]}})

    # -- answers

    def _content(self, repository: str, name: str, etag: str) -> None:
        hub = self.hub
        content = hub.repositories.get(repository, {}).get(name)
        if content is None:
            return self._status(404, "EntryNotFound")
        whole = hub.served.get(name, content)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match and hub.knows_ranges else 0
        if start >= len(whole) and start:
            return self._status(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole) - start))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", etag or f'"{digest(name, content)}"')
        self.end_headers()
        if self.command == "GET":
            self._body(name, whole, start)

    def _body(self, name: str, whole: bytes, start: int) -> None:
        hub, end = self.hub, len(whole)
        cuts = hub.cut.get(name, [])
        if cuts:
            end = min(end, start + cuts.pop(0))
            self.close_connection = True
        held = hub.hold.get(name, end)
        with contextlib.suppress(OSError):  # clients that are killed
            self.wfile.write(whole[start : min(held, end)])
            if held < end:
                hub.release.wait(60)
                self.wfile.write(whole[max(held, start) : end])

    def _redirect(self, url: str, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Location": url, "Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _status(self, status: int, reason: str = "") -> None:
        self.send_response(status)
        if reason:
            self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
