"""Which way multiplies: defaults, candidates, the winner, names in files."""

from __future__ import annotations

from engine.quant.product_choice import (
    CUBLAS,
    CUBLASLT,
    SIZES,
    Product,
    Way,
    candidates,
    default_way,
    entry_name,
    known_way,
    size_of,
    winner,
)

QKV = Product("plain", 4608, 4096, biased=True, dtype="float16")
DOWN = Product("add", 4096, 13696, biased=False, dtype="float16")
UP = Product("gated", 27392, 4096, biased=False, dtype="bfloat16")


def test_tokens_take_the_choice_of_the_next_size() -> None:
    assert [size_of(rows) for rows in (1, 2, 8, 9, 65, 1024, 1025)] == [1, 8, 8, 16, 96, 1024, 0]


def test_defaults_are_our_kernels_for_few_tokens_and_cublas_beyond() -> None:
    kinds = {size: default_way(QKV, size, tensor_cores=True).kind for size in SIZES}
    assert kinds == {1: "gemv", 8: "skinny", 16: "skinny"} | dict.fromkeys(SIZES[3:], "cublas")
    assert default_way(QKV, 0, tensor_cores=True) == CUBLAS
    assert default_way(DOWN, 1, tensor_cores=True) != default_way(QKV, 1, tensor_cores=True)
    old = {default_way(UP, size, tensor_cores=False).kind for size in SIZES[1:]}
    assert old == {"cublas"}, "without tensor cores only single tokens are ours"


def test_candidates_are_each_there_once_and_the_default_comes_first() -> None:
    for product in (QKV, DOWN, UP):
        for size in SIZES:
            ways = candidates(product, size, tensor_cores=True)
            assert ways[0] == default_way(product, size, tensor_cores=True)
            assert len(set(ways)) == len(ways)
            assert {CUBLAS, CUBLASLT} <= set(ways)
    few = candidates(UP, 16, tensor_cores=False)
    assert few == (CUBLAS, CUBLASLT)
    assert {way.kind for way in candidates(UP, 512, tensor_cores=True)} == {"cublas", "cublaslt"}


def test_the_fastest_wins_unless_it_is_hardly_faster() -> None:
    gemv = Way("gemv", (4096, 8, 1))
    assert winner({CUBLAS: 10e-6, gemv: 8e-6, CUBLASLT: 9e-6}, CUBLAS) == gemv
    assert winner({CUBLAS: 10e-6, gemv: 9.95e-6}, CUBLAS) == CUBLAS
    assert winner({CUBLAS: 10e-6, gemv: 12e-6}, CUBLAS) == CUBLAS


def test_ways_that_cannot_run_lose() -> None:
    never = float("inf")
    assert winner({CUBLAS: never, CUBLASLT: 9e-6}, CUBLAS) == CUBLASLT
    assert winner({CUBLAS: never, CUBLASLT: never}, CUBLAS) == CUBLAS
    assert winner({}, CUBLAS) == CUBLAS


def test_names_in_files() -> None:
    assert entry_name(QKV, 8) == "plain+bias 4608x4096 float16 8"
    names = {entry_name(product, size) for product in (QKV, DOWN, UP) for size in SIZES}
    assert len(names) == 3 * len(SIZES)
    ways = candidates(UP, 16, tensor_cores=True)
    assert [known_way(way.text, ways) for way in ways] == list(ways)
    assert known_way("skinny 1 2 3", ways) is None
    assert known_way(None, ways) is None
