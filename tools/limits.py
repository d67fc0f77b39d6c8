"""Length ratchet: functions, classes, modules and parameters stay small, exceptions are listed.

Fails on a new excess, on growth of a listed one, and on a listed one that is no longer needed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FUNCTION_LINES, CLASS_LINES, MODULE_LINES, PARAMETERS = 60, 300, 500, 6
KERNEL_LINES = 75
PACKAGES = ("engine", "router", "bench", "tools")

# "kind path name": (allowed size, reason)
EXCEPTIONS: dict[str, tuple[int, str]] = {}


def measure(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yields (kind, name, size, limit) of everything in the file that has a limit."""
    source = path.read_text(encoding="utf-8")
    yield "module", "-", source.count("\n"), MODULE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield "class", node.name, _lines(node), CLASS_LINES
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
                # A kernel takes pointers, strides and constants one by one, and names them twice.
                yield "kernel", node.name, _lines(node), KERNEL_LINES
                continue
            yield "function", node.name, _lines(node), FUNCTION_LINES
            args = node.args
            names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
            count = len([n for n in names if n not in ("self", "cls")])
            yield "parameters", node.name, count, PARAMETERS


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> int:
    """Prints each finding; the exit status is the number of findings, capped at 1."""
    root = Path(__file__).resolve().parent.parent
    findings: list[str] = []
    used: set[str] = set()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for kind, name, size, limit in measure(path):
                key = f"{kind} {path.relative_to(root).as_posix()} {name}"
                allowed, _reason = EXCEPTIONS.get(key, (limit, ""))
                if size > limit and key in EXCEPTIONS:
                    used.add(key)
                if size > allowed:
                    findings.append(f"{key}: {size} > {allowed}")
    findings += [f"{key}: no longer needed, remove it" for key in EXCEPTIONS if key not in used]
    for finding in findings:
        print(f"limits: {finding}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
