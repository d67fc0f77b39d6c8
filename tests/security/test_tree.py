"""What may not be in the program at all, and what it may depend on: read from its files."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted([*(ROOT / "router").rglob("*.py"), *(ROOT / "engine").rglob("*.py")])

# Modules that run what a file or a message says.
RUNNERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
RUNNERS |= {"multiprocessing", "yaml", "runpy", "code", "codeop"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load"}
SHELLS = {"os.system", "os.popen", "os.fork", "os.forkpty", "pty.fork", "subprocess.getoutput"}


def complaints(tree: ast.AST) -> Iterator[str]:
    """Each place of a module that could run what it reads."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in RUNNERS)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in RUNNERS:
                yield f"from {module}"
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield f"{name}()"
            case ast.Call(func=ast.Attribute() as function, keywords=keywords):
                name = ast.unparse(function)
                given = {word.arg: ast.unparse(word.value) for word in keywords}
                if name in LOADERS and given.get("weights_only") != "True":
                    yield f"{name}() without weights_only"
                if name in SHELLS or given.get("shell") not in (None, "False"):
                    yield f"{name}() with a shell or a fork"
                if given.get("trust_remote_code") not in (None, "False"):
                    yield f"{name}(trust_remote_code)"
            case ast.Constant(value=str(text)) if "trust_remote_code" in text:
                yield "trust_remote_code as an option"
            case _:
                pass


def test_s1_s9_nothing_runs_what_it_reads() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {what}"
        for file in SOURCES
        for what in complaints(ast.parse(file.read_bytes()))
    }
    # It names the exception of torch's reader, and nothing else of the module.
    allowed = "engine/device/pytorch_weights.py"
    assert found == {f"{allowed}: pickle"}
    used = re.findall(r"\bpickle\.(\w+)", (ROOT / allowed).read_text(encoding="utf-8"))
    assert set(used) == {"UnpicklingError"}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from multiprocessing import Process",
        "eval(x)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "getattr(m, 'load')(**{'trust_remote_code': True})",
        "os.fork()",
    ],
)
def test_s1_s9_the_check_sees_what_it_looks_for(text: str) -> None:
    assert list(complaints(ast.parse(text)))


def test_s21_each_dependency_is_listed_with_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {name_of(line) for line in project["dependencies"]}
    optional = project["optional-dependencies"]
    needed |= {
        name_of(line) for part in ("bitsandbytes", "transformers") for line in optional[part]
    }
    assert documented() == needed


def documented() -> set[str]:
    """The packages of README's table of dependencies; each row must give a reason."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = text.split("## Dependencies")[1].split("\n\n")[1].splitlines()[2:]
    names: set[str] = set()
    for row in rows:
        packages, why = row.strip("| ").split(" | ")
        assert why
        names |= {name_of(name) for name in packages.removeprefix("optional: ").split(",")}
    return names


def name_of(requirement: str) -> str:
    """The package's name in its normal form."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_s21_what_is_installed_and_tested_is_one_version_of_each() -> None:
    lines = (ROOT / "tools" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {name_of(pin) for pin in pins}
    parts = [project["dependencies"], *project["optional-dependencies"].values()]
    missing = {name_of(line) for part in parts for line in part} - pinned
    assert missing <= {"torch", "triton"}  # by the machine: see tools/setup


def test_s21_an_installation_runs_no_code_of_ours() -> None:
    assert not (ROOT / "setup.py").exists()
    assert not list(ROOT.glob("*.pth"))
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert build["build-backend"] == "setuptools.build_meta"
    assert "backend-path" not in build
