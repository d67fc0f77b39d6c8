"""What holds for all tests: signals, Hypothesis profiles, and how workers share the files."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from hypothesis import settings

# Who runs the tests in the background may ignore these, and programs under test would inherit it.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# Workers share the cores: each computes with one thread, and engines of two don't spin while they
# wait for each other. Read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None)
settings.register_profile("night", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Long files first, so that no worker ends with one alone. The rest is short, in the usual order.
_ORDER = ("tests/system/", "tests/kernels/", "tests/cases/", "tests/clients/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by folder, keeping the order within."""

    def rank(item: pytest.Item) -> int:
        folders = [n for n, folder in enumerate(_ORDER) if item.nodeid.startswith(folder)]
        return folders[0] if folders else len(_ORDER)

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file runs on one worker, for its fixtures' sake; so do those that share a client's run."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            shared = path.startswith("tests/clients/") and "real" not in path
            return "tests/clients" if shared else path

    config.option.loadscopereorder = False  # by the number of tests, which is not their time
    return ByFile(config, log)
