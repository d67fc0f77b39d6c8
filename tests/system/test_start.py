"""Starting: wrong command lines end at once with one sentence, right ones serve."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.router_process import ROOT, Start, run_router, tiny_model, wait_gone


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--modles x", 64, "did you mean --models"),
        ("--port eight", 64, "--port"),
        ("chekc", 64, "did you mean 'check'"),
        ("--models a,b,c --gpus cpu,cpu,cpu,cpu", 64, "3 models and 4 GPUs"),
        ("--gpus cpu --models smollm2-135m@3", 64, "not in --gpus"),
        ("--host 0.0.0.0 --gpus cpu", 64, "--api-key-file"),
        ("--api-keys sk-1", 64, "--api-key-file"),
        ("--gpus cpu --quant fp8", 78, "not built in yet"),
        ("--gpus 97", 69, "no GPU '97'"),
        ("--gpus cpu --models /no/such/folder", 78, "does not exist"),
        ("--gpus cpu --models no-such-model", 78, "no-such-model"),
        ("--config /no/such/router.toml", 78, "/no/such/router.toml"),
    ],
)
def test_r31_a4_wrong_command_lines(words: str, code: int, says: str) -> None:
    got, output, took_s = run_router(*words.split())
    assert got == code, output
    assert says in output
    assert output.startswith("router: ")
    assert output.count("\n") == 1
    assert took_s < 20  # no hang; a tenth of a second is usual


def test_a_model_that_cannot_fit(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    words = ("--gpus", "cpu", "--models", f"a={model},b={model}", "--kv-memory", "9000G")
    code, output, _ = run_router(*words)
    assert code == 75, output
    assert "GB" in output
    assert output.count("\n") == 1


def test_r31_a4_port_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ("--models", str(tiny_model(tmp_path)), "--gpus", "cpu", "--port", str(port))
        code, output, _ = run_router(*words)
    assert code == 69
    assert f"port {port} is in use" in output


@pytest.mark.parametrize(
    ("text", "says"),
    [("prot = 1", "did you mean 'port'"), ("port = 'x'", "port"), ("port = ", "TOML")],
)
def test_wrong_configuration_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "router.toml"
    path.write_text(text)
    code, output, _ = run_router("--config", str(path))
    assert code == 78
    assert says in output
    assert output.count("\n") == 1


def test_check_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "router.toml"
    path.write_text(
        f'models = "a|b={tiny_model(tmp_path)}"\ngpus = ["cpu", "cpu"]\nmax-len = 512\n'
    )
    code, output, _ = run_router("check", "--config", str(path))
    assert code == 0, output
    assert output.count("a | b on cpu") == 2
    assert "512 tokens per request" in output


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; from router import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'zmq', 'uvicorn', 'numpy', 'prometheus_client'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--models" in done.stdout


def test_the_router_process_never_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "import router.app, router.cli, router.lifecycle, router.supervisor, router.memory\n"
        "from router.text import model\n"
        f"model.load_text(__import__('pathlib').Path({str(tiny_model(tmp_path))!r}))\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_serves_with_a_proxy_in_the_environment(start: Start) -> None:
    proxy = "http://127.0.0.1:9"
    env = {"http_proxy": proxy, "https_proxy": proxy, "all_proxy": proxy, "no_proxy": ""}
    router = start(script={}, env=env)
    assert router.complete("hello", max_tokens=5).json()["choices"][0]["text"] == "hello"
    environ = Path(f"/proc/{router.engine_pid(0)}/environ").read_text()
    assert "proxy" not in environ


def test_engines_see_no_secret_and_are_the_first_victims(start: Start) -> None:
    router = start(script={}, env={"ROUTER_API_KEY": "sk-secret", "HF_TOKEN": "hf-secret"})
    assert router.url
    proc = Path(f"/proc/{router.engine_pid(0)}")
    environ = dict(
        entry.split("=", 1) for entry in (proc / "environ").read_text().split("\0") if entry
    )
    assert "secret" not in json.dumps(environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""
    assert int(environ["OMP_NUM_THREADS"]) >= 1
    own = int(Path(f"/proc/{router.popen.pid}/oom_score_adj").read_text())
    assert int((proc / "oom_score_adj").read_text()) == min(1000, own + 500)
    assert httpx.get(f"{router.url}/v1/models", trust_env=False).status_code == 401
    headers = {"authorization": "Bearer sk-secret"}
    answer = httpx.get(f"{router.url}/v1/models", headers=headers, trust_env=False)
    assert answer.status_code == 200
    assert "sk-secret" not in router.log


def test_http_answers_while_models_load(start: Start) -> None:
    router = start("--log-level", "debug", script={"load_s": 1.5})
    router.wait_for("engine_loading")
    port = listening_port(router.popen.pid)
    base = f"http://127.0.0.1:{port}"

    def get(path: str) -> int:
        return httpx.get(base + path, trust_env=False, timeout=5).status_code

    assert get("/health/live") == 200
    assert (get("/health/ready"), get("/health/started")) == (503, 503)
    body = {"model": "tiny", "prompt": "x"}
    refused = httpx.post(f"{base}/v1/completions", json=body, trust_env=False)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert router.url == base
    assert (get("/health/ready"), get("/health/started")) == (200, 200)
    assert len(router.events("ready")) == 1


def listening_port(pid: int) -> int:
    """The TCP port that the process listens on: there is exactly one."""
    inodes = {
        link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()
    }
    ports = [
        int(fields[1].split(":")[1], 16)
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if (fields := line.split())[3] == "0A" and f"socket:[{fields[9]}]" in inodes
    ]
    (port,) = ports
    return port


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ({"kind": "fatal", "reason": "no room for the weights", "code": 75}, 75, "no room"),
        ({"kind": "fatal", "reason": "unknown layer", "code": 78}, 78, "unknown layer"),
        ({"kind": "crash", "how": "exit", "code": 3}, 70, "exit code 3"),
        ({"kind": "crash", "how": "segv"}, 70, "SIGSEGV"),
    ],
)
def test_a2_a4_a_failed_load_ends_the_command(
    start: Start, fault: dict[str, Any], code: int, says: str
) -> None:
    router = start(script={"start_faults": [{"replica": 1, **fault}]}, gpus="cpu,cpu")
    assert router.wait(15) == code
    assert says in router.log.splitlines()[-1]
    assert len(router.events("engine_died")) == 1
    assert router.leftovers() == []


def test_an_engine_command_that_cannot_run(start: Start, tmp_path: Path) -> None:
    models = ("--models", f"tiny={tiny_model(tmp_path)}")
    router = start("--engine-command", "/no/such/program", *models)
    assert router.wait(15) == 78
    assert "/no/such/program" in router.log.splitlines()[-1]


def test_python_in_an_engine_command_is_the_routers(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text('{"rules": [{"match": "*", "reply": "ok"}]}')
    models = ("--models", f"tiny={tiny_model(tmp_path / 'tiny')}")
    command = f"python tools/fake_engine.py --script {script}"
    router = start("--engine-command", command, *models, env={"PATH": "/usr/bin:/bin"})
    assert router.complete("hello").json()["choices"][0]["text"] == "ok"


def test_r31_a3_leftovers_of_a_killed_router_are_removed(start: Start) -> None:
    first = start(script={})
    assert first.url
    first.popen.kill()
    first.wait()
    assert wait_gone(first.engine_pids, 60) == []
    assert len(list(first.runtime.iterdir())) == 1
    second = start(script={})
    assert second.complete(max_tokens=2).status_code == 200
    assert len(list(second.runtime.iterdir())) == 1
