"""Routers that the client tests talk to: one scripted, one that has no room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache

import httpx
import pytest

from tests.clients.runs import Results, play
from tests.clients.script import KEY, MODEL, SCRIPT
from tests.serving import serve
from tools.tiny_model import write_tiny_model


@dataclass(frozen=True)
class Endpoint:
    """What a client is told: `url` has no path, `full_url` answers 503 to everything."""

    url: str
    full_url: str
    key: str
    model: str


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Scripted engines. The full one's only place is taken by an answer that never ends."""
    root = tmp_path_factory.mktemp("clients")
    folder = write_tiny_model(root / MODEL)
    keys = root / "keys"
    keys.write_text(f"{KEY}\n")
    words = ("--models", f"{MODEL}={folder}", "--api-key-file", str(keys))
    with ExitStack() as stack:
        server = stack.enter_context(serve(*words, script=SCRIPT))
        narrow = (*words, "--max-concurrency", "1", "--max-queue", "0", "--drain-timeout", "1")
        full = stack.enter_context(serve(*narrow, script=SCRIPT))
        body = {"model": MODEL, "prompt": "endless", "stream": True, "max_tokens": 3500}
        request = httpx.Request(
            "POST",
            f"{full.url}/v1/completions",
            json=body,
            headers={"authorization": f"Bearer {KEY}"},
        )
        client = stack.enter_context(httpx.Client(trust_env=False))
        answer = client.send(request, stream=True)
        stack.callback(answer.close)
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()  # closing it would close the answer
        next(lines)
        yield Endpoint(server.url, full.url, KEY, MODEL)


@pytest.fixture(scope="session")
def played(
    endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Results]:
    """The results of a client by its name; each is played once."""
    home = tmp_path_factory.mktemp("home")

    @cache
    def of(client: str) -> Results:
        return play(client, home, asdict(endpoint))

    return of
