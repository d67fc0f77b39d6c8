"""Kept choices of kernels: there again, never in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.quant.product_file import ProductFile, default_path

LABEL = "Some Card, torch 2, triton 3"
WAYS = {"add 8x8 float16 1": "cublas"}


def test_what_was_saved_is_there_again_for_the_same_card_only(tmp_path: Path) -> None:
    path, lines = tmp_path / "made" / "products.json", list[str]()
    ProductFile(path, LABEL, lines.append).save(WAYS)
    assert ProductFile(path, LABEL, lines.append).load() == WAYS
    assert ProductFile(path, "Another Card", lines.append).load() == {}
    assert lines == []


def test_saving_keeps_what_others_saved(tmp_path: Path) -> None:
    path = tmp_path / "products.json"
    one, other = ProductFile(path, LABEL, print), ProductFile(path, "Another Card", print)
    one.save(WAYS)
    other.save({"gated 8x8 float16 1": "gemv 1 2 3"})
    one.save({"add 8x8 float16 8": "cublaslt"})
    assert one.load() == WAYS | {"add 8x8 float16 8": "cublaslt"}
    assert other.load() == {"gated 8x8 float16 1": "gemv 1 2 3"}
    assert [file.name for file in tmp_path.iterdir()] == ["products.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": {"b": 3}}', b"\xff\xfe{}"])
def test_a_damaged_file_is_ignored_with_a_line_and_replaced(tmp_path: Path, content: bytes) -> None:
    path, lines = tmp_path / "products.json", list[str]()
    path.write_bytes(content)
    file = ProductFile(path, LABEL, lines.append)
    assert file.load() == {}
    assert len(lines) == 1
    assert "damaged" in lines[0]
    assert str(tmp_path) not in lines[0]
    file.save(WAYS)
    assert json.loads(path.read_bytes()) == {LABEL: WAYS}


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path: Path) -> None:
    blocked, lines = tmp_path / "file", list[str]()
    blocked.write_text("no folder")
    file = ProductFile(blocked / "products.json", LABEL, lines.append)
    file.save(WAYS)
    assert len(lines) == 1
    assert "not kept" in lines[0]
    assert str(tmp_path) not in lines[0]
    assert file.load() == {}


def test_the_place_is_the_users_folder_for_caches() -> None:
    known = default_path({"XDG_CACHE_HOME": "/caches", "HOME": "/home/a"})
    assert known == Path("/caches/llm-router/products.json")
    for odd in ("", "relative"):
        path = default_path({"XDG_CACHE_HOME": odd, "HOME": "/home/a"})
        assert path == Path("/home/a/.cache/llm-router/products.json")
    assert default_path({}) is None
    nowhere = ProductFile(None, LABEL, print)
    nowhere.save(WAYS)
    assert nowhere.load() == {}
