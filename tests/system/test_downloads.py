"""A router that fetches its model itself: whole processes against a stub hub."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.router_process import ROOT, RouterProcess, Start
from tests.stub_hub import StubHub, serving
from tools.tiny_model import TinySpec, write_tiny_model

pytestmark = pytest.mark.slow

TOKEN = "hf_secret_of_mine"
HELD_BYTES = 1_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StubHub]:
    stub = StubHub(token=TOKEN)
    folder = write_tiny_model(tmp_path / "source", TinySpec(layers=4, intermediate=2048))
    (folder / "modeling_tiny.py").write_text("raise SystemExit('remote code ran')")
    stub.add_folder("org/tiny", folder)
    with serving(stub):
        yield stub


def environment(hub: StubHub, folder: Path, **more: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": TOKEN,
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_CACHE": str(folder / "ms"),
        "MODELSCOPE_API_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1,localhost",
        **more,
    }


def partial_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.incomplete"))


def until_held(hub: StubHub, folder: Path) -> None:
    """Until the file on its way is as long as the hub lets it be."""
    end_s = time.monotonic() + 60
    while partial_bytes(folder) < hub.hold["model.safetensors"]:
        assert time.monotonic() < end_s, f"{partial_bytes(folder):,} bytes came"
        time.sleep(0.02)


def ask(router: RouterProcess, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = httpx.post(f"{router.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    answer.raise_for_status()
    return str(answer.json()["model"])


@pytest.mark.parametrize("source", ["org/tiny", "modelscope:org/tiny"])
def test_from_nothing_to_an_answer(start: Start, hub: StubHub, tmp_path: Path, source: str) -> None:
    env = environment(hub, tmp_path)
    words = ("--models", f"gpt-3.5-turbo|text-davinci-003={source}")
    router = start(*words, env=env)
    for name in ("gpt-3.5-turbo", "text-davinci-003"):
        assert ask(router, name) == name
    listed = httpx.get(f"{router.url}/v1/models", trust_env=False).json()["data"]
    assert [model["id"] for model in listed] == ["gpt-3.5-turbo", "text-davinci-003"]
    assert [e["model"] for e in router.events("download_done")] == ["org/tiny"] * 2
    assert TOKEN not in router.log
    assert not any(".py" in request.path for request in hub.requests)
    router.signal(signal.SIGTERM)
    assert router.wait() == 0
    hub.requests.clear()
    again = start(*words, env={**env, "HF_HUB_OFFLINE": "1"})
    assert again.url
    assert hub.requests == []


def test_r32_kill_9_in_the_middle(start: Start, hub: StubHub, tmp_path: Path) -> None:
    hub.hold["model.safetensors"] = HELD_BYTES
    env = environment(hub, tmp_path)
    router = start("--models", "org/tiny", env=env)
    until_held(hub, tmp_path)
    router.signal(signal.SIGKILL)
    router.wait()
    left_bytes = partial_bytes(tmp_path)
    hub.hold.clear()
    assert ask(start("--models", "org/tiny", env=env), "org/tiny") == "org/tiny"
    assert hub.weight_requests[-1].range == f"bytes={left_bytes}-"
    assert left_bytes >= HELD_BYTES
    assert partial_bytes(tmp_path) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle(
    start: Start, hub: StubHub, tmp_path: Path, number: int, code: int
) -> None:
    hub.hold["model.safetensors"] = HELD_BYTES
    router = start("--models", "org/tiny", env=environment(hub, tmp_path))
    until_held(hub, tmp_path)
    router.signal(number)
    assert router.wait() == code
    assert "the same command goes on from there" in router.log
    assert "Traceback" not in router.log
    assert partial_bytes(tmp_path) >= HELD_BYTES


def test_r32_two_routers_and_one_empty_cache(start: Start, hub: StubHub, tmp_path: Path) -> None:
    hub.hold["model.safetensors"] = HELD_BYTES
    env = environment(hub, tmp_path)
    first = start("--models", "org/tiny", env=env)
    until_held(hub, tmp_path)
    second = start("--models", "org/tiny", env=env)
    second.wait_for("waiting_for_download")
    hub.release.set()
    assert ask(first, "org/tiny") == ask(second, "org/tiny") == "org/tiny"
    assert len([r for r in hub.requests if r.path.startswith("/cdn/")]) == 1
    assert second.events("download_started") == []


def test_r32_a_damaged_file_ends_the_command(start: Start, hub: StubHub, tmp_path: Path) -> None:
    content = hub.repositories["org/tiny"]["model.safetensors"]
    hub.served["model.safetensors"] = content[:-8] + bytes(8)
    router = start("--models", "org/tiny", env=environment(hub, tmp_path))
    assert router.wait() == 69
    assert "model.safetensors from 127.0.0.1 is refused" in router.log
    assert "engine_loading" not in router.log


def test_without_network_and_cache(start: Start, hub: StubHub, tmp_path: Path) -> None:
    router = start("--models", "org/tiny", env=environment(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert router.wait() == 78
    assert "HF_HUB_OFFLINE forbids to ask 127.0.0.1" in router.log
    assert hub.requests == []


def test_one_line_on_a_terminal(hub: StubHub, tmp_path: Path) -> None:
    hub.hold["model.safetensors"] = HELD_BYTES
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "router.cli", "--models", "org/tiny", "--gpus", "cpu"],
        cwd=ROOT,
        env={**os.environ, **environment(hub, tmp_path)},
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while b"1.0 of " not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"\r\x1b[Korg/tiny  1.0 of " in shown
