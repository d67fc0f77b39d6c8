"""A router over a scripted engine that most tests here share, others for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.router_process import RouterProcess, Start, starting

# A template that is slow on purpose for a conversation that begins with "deep".
TEMPLATE = (
    "{% if messages[0].content[:4] == 'deep' %}"
    "{% for a in messages %}{% for b in messages %}{% for c in messages %}"
    "{% endfor %}{% endfor %}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
)
SCRIPT: dict[str, Any] = {
    "rules": [
        {"match": {"contains": "silent"}, "reply": "x", "first_token_s": 3600},
        {"match": {"contains": "slow"}, "reply": "x", "repeat": True, "tokens_per_s": 50},
        {"match": {"contains": "broken"}, "reply": "abc", "finish": "error", "detail": "a fault"},
    ]
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    folder = tmp_path_factory.mktemp("reports")
    (folder / "template.jinja").write_text(TEMPLATE)
    make = starting(folder)
    router = next(make)("--chat-template", str(folder / "template.jinja"), script=SCRIPT)
    assert router.url
    yield router
    next(make, None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts routers as processes; what a test leaves is ended."""
    yield from starting(tmp_path)
