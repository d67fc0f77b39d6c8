"""Which devices are meant: indices, UUIDs, masks, and what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.devices import choose_devices, find_cards, free_bytes_of, parse_cards
from router.errors import StartError

TEXT = """0, GPU-aaaa-1111, NVIDIA H100 80GB HBM3, 80994
1, GPU-bbbb-2222, NVIDIA H100 80GB HBM3, [N/A]
No devices were found
"""
CARDS = parse_cards(TEXT)


def test_parse() -> None:
    assert [(card.number, card.uuid) for card in CARDS] == [
        ("0", "GPU-aaaa-1111"),
        ("1", "GPU-bbbb-2222"),
    ]
    assert free_bytes_of("0", CARDS) == 80994 * 2**20
    assert free_bytes_of("1", CARDS) == 0
    assert free_bytes_of("7", CARDS) == 0


@pytest.mark.parametrize(
    ("asked", "visible", "expected"),
    [
        ((), None, ("0", "1")),
        ((), "1", ("1",)),
        ((), "GPU-bbbb", ("GPU-bbbb",)),
        ((), "", ("cpu",)),
        (("1",), "0", ("1",)),
        (("cpu", "0"), None, ("cpu", "0")),
        (("GPU-aaaa",), None, ("GPU-aaaa",)),
        (("MIG-1234",), None, ("MIG-1234",)),
    ],
)
def test_choice(asked: tuple[str, ...], visible: str | None, expected: tuple[str, ...]) -> None:
    assert choose_devices(asked, CARDS, visible) == expected


def test_no_card_means_one_cpu_unless_one_was_asked_for() -> None:
    assert choose_devices((), [], None) == ("cpu",)
    for missing in ("0", "GPU-x", "MIG-1"):
        with pytest.raises(StartError, match="no GPU") as caught:
            choose_devices((missing,), [], None)
        assert caught.value.code == 69


def test_nothing_is_run_where_there_is_no_device(tmp_path: Path) -> None:
    assert find_cards(tmp_path, tool="false") == []
    (tmp_path / "nvidia0").touch()
    tool = tmp_path / "smi"
    tool.write_text("#!/bin/sh\necho 0, GPU-1, Card, 1000\n")
    tool.chmod(0o755)
    assert [card.name for card in find_cards(tmp_path, tool=str(tool))] == ["Card"]
