"""Choices of `product_choice` that outlive the process: a small JSON file in the user's cache.

Owns the file's place and form: by card and software, by product and size, the way's text. Written
whole and put in place at once, so that engines that start together read a whole file; what another
one added meanwhile is kept. The file only saves time: one that cannot be read or written costs a
line in the log.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

_MAX_BYTES = 4_000_000
Entries = dict[str, dict[str, str]]


def default_path(environ: Mapping[str, str]) -> Path | None:
    """`products.json` in the folder for caches; None if there is no home."""
    base = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = environ.get("HOME", "")
        if not home:
            return None
        base = os.path.join(home, ".cache")
    return Path(base) / "llm-router" / "products.json"


class ProductFile:
    """The choices for one card with one set of software, `label`."""

    def __init__(self, path: Path | None, label: str, report: Callable[[str], None]) -> None:
        """`path` None: nothing is kept. `report` takes a line for the operator."""
        self._path = path
        self._label = label
        self._report = report

    def load(self) -> dict[str, str]:
        """Ways by entry name; empty if there are none."""
        try:
            return self._read().get(self._label, {})
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._report(f"kept choices of kernels are not used: {_reason(error)}; measured again")
            return {}

    def save(self, ways: Mapping[str, str]) -> None:
        """Adds to what the file holds."""
        if self._path is None:
            return
        try:
            entries = self._read()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            entries = Entries()
        entries[self._label] = {**entries.get(self._label, {}), **ways}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, msgspec.json.format(msgspec.json.encode(entries), indent=1))
        except OSError as error:
            self._report(f"choices of kernels are not kept: {_reason(error)}; the next engine "
                         "measures again")  # fmt: skip

    def _read(self) -> Entries:
        """Raises OSError, MsgspecError or UnicodeDecodeError for a file that cannot be used."""
        if self._path is None:
            return {}
        try:
            with self._path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return {}
        if len(data) > _MAX_BYTES:
            raise msgspec.ValidationError("the file is too large")
        return msgspec.json.decode(data, type=Entries)


def _replace(path: Path, data: bytes) -> None:
    number, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or "the file cannot be used"
    return "the file is damaged"
