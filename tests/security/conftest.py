"""One router with keys, started under the most careless umask, that the tests here share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest

from tests.router_process import RouterProcess, starting

PAGE = "https://chat.example"
KEYS = {"ROUTER_API_KEY": "sk-secret-one\nsk-secret-two"}
KEYED = {"authorization": "Bearer sk-secret-one"}


@pytest.fixture(scope="session")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    make = starting(tmp_path_factory.mktemp("secure"))
    umask = os.umask(0)
    try:
        router = next(make)("--cors-origins", PAGE, script={}, env=KEYS)
        assert router.url
    finally:
        os.umask(umask)
    yield router
    next(make, None)


@pytest.fixture
def client(router: RouterProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=router.url, headers=KEYED, trust_env=False, timeout=60) as client:
        yield client
