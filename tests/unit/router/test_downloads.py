"""Downloads against a stub hub: real HTTP and files; faults of network, disk and hub."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from router.downloads import fetch, transfer, web
from router.downloads.choice import NoChoice, gguf_name, small_files, weight_names
from router.downloads.hubs import HuggingFace, hubs_of
from router.downloads.progress import Progress
from router.errors import EXIT_CONFIG, EXIT_UNAVAILABLE, StartError
from router.sources import Access, ModelSource, resolve
from tests.model_files import entry, write_gguf, write_safetensors
from tests.stub_hub import COMMIT, StubHub, serving, sha256
from tools.tiny_model import write_tiny_model

TOKEN = "hf_secret_of_mine"
NEEDED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    for name in (
        "modeling_tiny.py",
        "README.md",
        "pytorch_model.bin",
        "model.onnx",
        "flax.msgpack",
    ):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    stub = StubHub()
    stub.add_folder("org/tiny", tiny)
    with serving(stub):
        yield stub


def access(hub: StubHub, cache: Path, **environ: str) -> Access:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_CACHE": str(cache / "ms"),
    }
    return Access(hubs_of({**settings, **environ}))


def get(hub: StubHub, cache: Path, source: str = "org/tiny", **environ: str) -> ModelSource:
    return resolve(source, access=access(hub, cache, **environ))


def refused(
    hub: StubHub, cache: Path, source: str = "org/tiny", code: int = EXIT_CONFIG, **environ: str
) -> str:
    with pytest.raises(StartError) as caught:
        get(hub, cache, source, **environ)
    assert caught.value.code == code
    assert TOKEN not in caught.value.message
    return caught.value.message


def blobs(cache: Path) -> Path:
    return cache / "hub" / "models--org--tiny" / "blobs"


def weights(hub: StubHub, repository: str = "org/tiny") -> bytes:
    return hub.repositories[repository]["model.safetensors"]


def partial(hub: StubHub, cache: Path) -> Path:
    return transfer.partial_path(blobs(cache) / sha256(weights(hub)))


# -- what is brought, and where


def test_only_what_is_needed_and_only_once(hub: StubHub, tmp_path: Path, tiny: Path) -> None:
    found = get(hub, tmp_path, HF_TOKEN=TOKEN)
    assert found.path == blobs(tmp_path).parent / "snapshots" / COMMIT
    assert {file.name for file in found.path.iterdir()} == NEEDED
    for name in NEEDED:
        assert (found.path / name).read_bytes() == (tiny / name).read_bytes()
    assert len(list(blobs(tmp_path).iterdir())) == len(NEEDED)
    hub.requests.clear()
    assert get(hub, tmp_path).path == found.path
    assert get(hub, tmp_path, HF_HUB_OFFLINE="1").path == found.path
    assert hub.requests == []


def test_the_token_goes_to_the_hub_alone(hub: StubHub, tmp_path: Path) -> None:
    hub.token = TOKEN
    get(hub, tmp_path, HF_TOKEN=TOKEN)
    tokens = {request.path.startswith("/cdn/"): request.token for request in hub.requests}
    assert tokens == {False: f"Bearer {TOKEN}", True: ""}
    assert TOKEN not in repr(access(hub, tmp_path, HF_TOKEN=TOKEN))


def test_a_renamed_repository(hub: StubHub, tmp_path: Path) -> None:
    hub.token = TOKEN
    hub.renamed["old/name"] = "org/tiny"
    found = get(hub, tmp_path, "old/name", HF_TOKEN=TOKEN)
    assert found.names == ("old/name",)
    assert "models--old--name" in str(found.path)


def test_the_token_of_the_hubs_own_tool(hub: StubHub, tmp_path: Path) -> None:
    hub.token = TOKEN
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    get(hub, tmp_path)
    hidden = hubs_of({"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})
    assert hidden.hugging_face == HuggingFace("https://huggingface.co", tmp_path / "hub")


def test_shards_of_an_index(hub: StubHub, tmp_path: Path) -> None:
    files = dict(hub.repositories["org/tiny"])
    whole = files.pop("model.safetensors")
    files["model-00001-of-00001.safetensors"] = whole
    files["consolidated.safetensors"] = b"a second copy"
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.repositories["org/tiny"] = files
    names = {file.name for file in get(hub, tmp_path).path.iterdir()}
    expected = NEEDED - {"model.safetensors"} | {"model.safetensors.index.json"}
    assert names == expected | {"model-00001-of-00001.safetensors"}
    index["weight_map"]["b"] = "model-00002-of-00002.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert "model-00002-of-00002.safetensors, which is not" in refused(hub, tmp_path / "other")


def test_without_weights(hub: StubHub, tmp_path: Path) -> None:
    light = access(hub, tmp_path)._replace(with_weights=False)
    found = resolve("org/tiny", access=light)
    assert {file.name for file in found.path.iterdir()} == NEEDED - {"model.safetensors"}
    assert found.checkpoint.file_bytes == 0
    assert not hub.weight_requests
    assert get(hub, tmp_path).checkpoint.file_bytes > 0


def test_gguf_files(hub: StubHub, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf").read_bytes()
    names = ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "mmproj-tiny.gguf", "README.md")
    hub.repositories["org/tiny"] = dict.fromkeys(names, file)
    assert "add ':' and one of tiny-Q4_K_M.gguf, tiny-Q8_0.gguf" in refused(hub, tmp_path)
    assert "no .gguf file for 'Q5'" in refused(hub, tmp_path, "org/tiny:Q5")
    found = get(hub, tmp_path, "org/tiny:Q4_K_M")
    assert (found.kind, found.path.name) == ("gguf", "tiny-Q4_K_M.gguf")
    assert [f.name for f in found.path.parent.iterdir()] == ["tiny-Q4_K_M.gguf"]
    assert get(hub, tmp_path, "org/tiny:tiny-Q8_0.gguf").path.name == "tiny-Q8_0.gguf"


def test_pytorch_weights_only_without_safetensors() -> None:
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert weight_names([*bins, "training_args.bin"], None) == bins
    assert weight_names(["pytorch_model.bin", "model.safetensors"], None) == ["model.safetensors"]
    assert weight_names(["pytorch_model.bin", "a.safetensors"], None) == ["a.safetensors"]
    with pytest.raises(NoChoice, match=r"only \.h5, \.md"):
        weight_names(["tf_model.h5", "README.md"], None)
    index = "pytorch_model.bin.index.json"
    assert index in small_files([index, *bins])
    assert index not in small_files([index, *bins, "model.safetensors"])


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("Q4_K_M", "a/m.Q4_K_M.gguf"),
        ("iq4_xs", "m-IQ4_XS.gguf"),
        ("m-IQ4_XS.gguf", "m-IQ4_XS.gguf"),
        ("m.Q4_K_M.gguf", "a/m.Q4_K_M.gguf"),
    ],
)
def test_the_gguf_file_that_is_meant(part: str, name: str) -> None:
    names = ["a/m.Q4_K_M.gguf", "m-IQ4_XS.gguf", "m-BF16-00001-of-00002.gguf", "m.md"]
    assert gguf_name(names, part) == name
    with pytest.raises(NoChoice, match="one of several pieces"):
        gguf_name(names, "bf16")
    with pytest.raises(NoChoice, match=r"no \.gguf file for '4_XS'"):
        gguf_name(names, "4_XS")


def test_what_an_encoder_needs() -> None:
    wanted = ["modules.json", "1_Pooling/config.json", "vocab.txt", "sentence_bert_config.json"]
    assert small_files([*wanted, "onnx/config.json", "1_Pooling/x.py", "train_script.py"]) == wanted


# -- other tools of the hub


def run_tool(hub: StubHub, cache: Path, program: str) -> str:
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cache_is_shared_with_the_hubs_own_tool(hub: StubHub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    ours = get(hub, tmp_path / "a")
    program = (
        "import huggingface_hub as h; s = h.scan_cache_dir(); assert not s.warnings, s.warnings;"
        "print(*(f'{r.repo_id} {r.nb_files}' for r in s.repos));"
        "print(h.hf_hub_download('org/tiny', 'model.safetensors', local_files_only=True))"
    )
    said = run_tool(hub, tmp_path / "a", program)
    assert said.splitlines() == ["org/tiny 5", str(ours.path / "model.safetensors")]
    program = "import huggingface_hub as h; print(h.snapshot_download('org/tiny'))"
    theirs = run_tool(hub, tmp_path / "b", program)
    hub.requests.clear()
    assert str(get(hub, tmp_path / "b").path) == theirs
    assert hub.requests == []


# -- interruptions


def test_a_broken_connection_is_taken_up(hub: StubHub, tmp_path: Path) -> None:
    hub.cut["model.safetensors"] = [100_000, 50_000]
    hub.cut["config.json"] = [10]
    get(hub, tmp_path)
    ranges = [r.range for r in hub.requests if r.path.startswith("/cdn/")]
    assert ranges == ["", "bytes=100000-", "bytes=150000-"]
    assert [r.range for r in hub.asked_for("config.json")] == ["", "bytes=10-"]


def test_what_an_earlier_run_left_is_taken_up(hub: StubHub, tmp_path: Path) -> None:
    partial(hub, tmp_path).parent.mkdir(parents=True)
    partial(hub, tmp_path).write_bytes(weights(hub)[:200_000])
    get(hub, tmp_path)
    assert {r.range for r in hub.weight_requests} == {"bytes=200000-"}
    assert not partial(hub, tmp_path).exists()


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * 10_000_000])
def test_a_spoilt_beginning_is_brought_again(hub: StubHub, tmp_path: Path, left: bytes) -> None:
    partial(hub, tmp_path).parent.mkdir(parents=True)
    partial(hub, tmp_path).write_bytes(left)
    assert (get(hub, tmp_path).path / "model.safetensors").read_bytes() == weights(hub)


def test_a_complete_partial_file_needs_no_request(hub: StubHub, tmp_path: Path) -> None:
    partial(hub, tmp_path).parent.mkdir(parents=True)
    partial(hub, tmp_path).write_bytes(weights(hub))
    get(hub, tmp_path)
    assert not hub.weight_requests


def test_a_server_without_ranges(hub: StubHub, tmp_path: Path) -> None:
    hub.knows_ranges = False
    hub.cut["model.safetensors"] = [100_000]
    assert (get(hub, tmp_path).path / "model.safetensors").read_bytes() == weights(hub)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_faults_of_the_server(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(web.time, "sleep", lambda _: None)
    hub.fail = [status, status]
    get(hub, tmp_path)
    hub.fail = [status] * 3
    assert f"answered {status}" in refused(hub, tmp_path / "b", code=EXIT_UNAVAILABLE)


def test_a_file_that_never_comes(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "MAX_FAILURES", 1)
    hub.cut["model.safetensors"] = [1000, 0, 0, 0]
    message = refused(hub, tmp_path, code=EXIT_UNAVAILABLE)
    assert "closed the connection early" in message
    assert partial(hub, tmp_path).stat().st_size == 1000
    hub.cut.clear()
    get(hub, tmp_path)
    assert hub.weight_requests[-1].range == "bytes=1000-"


def test_two_routers_at_once(hub: StubHub, tmp_path: Path) -> None:
    hub.hold["model.safetensors"] = 1000
    found: list[Path] = []
    routers = [
        threading.Thread(target=lambda: found.append(get(hub, tmp_path).path)) for _ in range(2)
    ]
    for router in routers:
        router.start()
    while not hub.weight_requests:
        time.sleep(0.01)
    hub.release.set()
    for router in routers:
        router.join(60)
    assert len(found) == 2
    assert len(hub.asked_for("config.json")) == 1
    assert len([r for r in hub.requests if r.path.startswith("/cdn/")]) == 1


# -- what is refused


@pytest.mark.parametrize("source", ["org/tiny", "modelscope:org/tiny"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b[:-1] + b"x", "the hash"),
        (lambda b: b + b"x", "bytes, the hub's listing says"),
        (lambda b: b[:-1], "bytes, the hub's listing says"),
    ],
    ids=["other content", "longer", "shorter"],
)
def test_a_file_that_is_not_what_the_hub_lists(
    hub: StubHub, tmp_path: Path, source: str, change: object, says: str
) -> None:
    assert callable(change)
    hub.served["model.safetensors"] = change(weights(hub))
    message = refused(hub, tmp_path, source, EXIT_UNAVAILABLE)
    assert "model.safetensors" in message
    assert says in message
    left = [f for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size >= 400_000]
    assert left == [], "a refused file is not kept"
    hub.served.clear()
    get(hub, tmp_path, source)


def test_a_file_that_ends_before_its_beginning(hub: StubHub, tmp_path: Path) -> None:
    partial(hub, tmp_path).parent.mkdir(parents=True)
    partial(hub, tmp_path).write_bytes(weights(hub)[:200_000])
    hub.served["model.safetensors"] = weights(hub)[:100]
    assert "listing says" in refused(hub, tmp_path, code=EXIT_UNAVAILABLE)


def test_models_that_are_not_there_or_not_for_us(hub: StubHub, tmp_path: Path) -> None:
    message = refused(hub, tmp_path, "org/nope")
    assert "model 'org/nope' is not at 127.0.0.1, or is private: check the spelling" in message
    assert not (tmp_path / "hub" / "models--org--nope").exists()
    hub.gated.add("org/tiny")
    assert "is gated: accept its terms at 127.0.0.1/org/tiny, then set HF_TOKEN" in refused(
        hub, tmp_path
    )
    hub.token = TOKEN
    assert "is private" in refused(hub, tmp_path)
    assert "does not accept the token" in refused(hub, tmp_path, HF_TOKEN="hf_old")
    hub.fail = [403]
    assert "give HF_TOKEN that right" in refused(hub, tmp_path, HF_TOKEN=TOKEN)
    hub.fail = [418]
    assert "answered 418" in refused(hub, tmp_path, HF_TOKEN=TOKEN)
    assert "MODELSCOPE_API_TOKEN" in refused(hub, tmp_path, "modelscope:org/nope")


@pytest.mark.parametrize("token", ["hf_a\nb", "hf_日本"])
def test_a_token_that_cannot_be_sent(hub: StubHub, tmp_path: Path, token: str) -> None:
    message = refused(hub, tmp_path, HF_TOKEN=token)
    assert "HF_TOKEN holds characters that no token has" in message
    assert token not in message


def test_no_network(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.time, "sleep", lambda _: None)
    message = refused(hub, tmp_path, code=EXIT_UNAVAILABLE, HF_ENDPOINT="http://127.0.0.1:1")
    assert "cannot be fetched from 127.0.0.1" in message
    assert "HF_ENDPOINT" in message
    message = refused(hub, tmp_path, TRANSFORMERS_OFFLINE="yes")
    assert "TRANSFORMERS_OFFLINE forbids" in message


@pytest.mark.parametrize(
    "sibling",
    [
        {"rfilename": "../../x", "size": 1, "blobId": "0" * 40},
        {"rfilename": "/x", "size": 1, "blobId": "0" * 40},
        {"rfilename": "x", "size": 1, "blobId": "../../y"},
        {"rfilename": "x"},
        {"rfilename": "x", "size": "1", "blobId": "0" * 40},
        "x",
    ],
)
def test_listings_that_cannot_be_trusted(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sibling: object
) -> None:
    for answer in ({"sha": COMMIT, "siblings": [sibling]}, {"sha": "../..", "siblings": []}, []):
        monkeypatch.setattr("router.downloads.hubs.read_json", lambda address, a=answer: a)
        assert "does not list its files" in refused(hub, tmp_path, code=EXIT_UNAVAILABLE)
    path = sibling.get("rfilename") if isinstance(sibling, dict) else "../x"
    files = [{"Path": path, "Type": "blob", "Size": 1, "Sha256": "0"}]
    monkeypatch.setattr("router.downloads.hubs.read_json", lambda a: {"Data": {"Files": files}})
    message = refused(hub, tmp_path, "modelscope:org/tiny", EXIT_UNAVAILABLE)
    assert "does not list its files" in message


def test_repositories_without_a_model(hub: StubHub, tmp_path: Path) -> None:
    hub.repositories["org/tiny"] = {"README.md": b"x", "config.json": b"{}", "w.h5": b"x"}
    assert "only .h5, .json, .md" in refused(hub, tmp_path)


def test_r32_a_full_disk(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=70_000_000))
        hub.repositories["org/big"] = {**hub.repositories["org/tiny"], "model.safetensors": b""}
        write_safetensors(
            tmp_path / "big", {"a": entry("F16", [4_000_000], 0, 8_000_000)}, bytes(8_000_000)
        )
        hub.repositories["org/big"]["model.safetensors"] = (tmp_path / "big").read_bytes()
        message = refused(hub, tmp_path, "org/big", EXIT_UNAVAILABLE)
        assert "needs 0.0 GB in" in message
        assert "set HF_HOME" in message
        assert not hub.weight_requests

    def no_space(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_space)
        assert "No space left" in refused(hub, tmp_path, code=EXIT_UNAVAILABLE)
    get(hub, tmp_path)


def test_a_cache_that_cannot_be_written(hub: StubHub, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    message = refused(hub, tmp_path, code=EXIT_UNAVAILABLE, HF_HUB_CACHE=str(file))
    assert "cannot be written" in message


# -- ModelScope


def test_modelscope(hub: StubHub, tmp_path: Path, tiny: Path) -> None:
    hub.repositories["org/tiny"]["1_Pooling/config.json"] = b"{}"
    hub.cut["model.safetensors"] = [100_000]
    found = get(hub, tmp_path, "modelscope:org/tiny", MODELSCOPE_API_TOKEN=TOKEN)
    assert found.names == ("org/tiny",)
    assert found.path == tmp_path / "ms" / "models" / "org--tiny" / "snapshots" / "master"
    names = {str(f.relative_to(found.path)) for f in found.path.rglob("*") if f.is_file()}
    assert names == NEEDED | {"1_Pooling/config.json"}
    assert (found.path / "model.safetensors").read_bytes() == weights(hub)
    assert [r.range for r in hub.requests if "model.safetensors" in r.path] == ["", "bytes=100000-"]
    hub.requests.clear()
    get(hub, tmp_path, "modelscope:org/tiny")
    assert hub.requests == []


def test_modelscope_files_of_an_older_revision_are_replaced(hub: StubHub, tmp_path: Path) -> None:
    folder = get(hub, tmp_path, "modelscope:org/tiny").path
    (folder / "tokenizer.json").unlink()
    old = (folder / "generation_config.json").read_bytes()
    (folder / "generation_config.json").write_bytes(old.replace(b"2", b"7"))
    hub.requests.clear()
    get(hub, tmp_path, "modelscope:org/tiny")
    assert (folder / "generation_config.json").read_bytes() == old
    assert len(hub.requests) == 3, "the listing and two files"


# -- progress


def test_progress_on_a_terminal() -> None:
    now_s = [0.0]
    terminal = io.StringIO()
    progress = Progress("m", 4_000_000_000, 10**9, terminal=terminal, clock=lambda: now_s[0])
    progress.show(10**9)
    now_s[0] = 10.0
    progress.show(2 * 10**9)
    lines = terminal.getvalue().split("\r\x1b[K")
    assert lines == [
        "",
        "m  1.0 of 4.0 GB (25 %)",
        "m  2.0 of 4.0 GB (50 %), 100.0 MB/s, 0:20 left",
    ]


def test_progress_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [0.0]
    progress = Progress("m", 4_000_000, 0, terminal=None, clock=lambda: now_s[0])
    logger = logging.getLogger("router")
    logger.propagate = True
    with caplog.at_level("INFO", "router"):
        for now_s[0] in range(25):
            progress.show(1_000_000)
    assert [record.message for record in caplog.records] == ["downloading"] * 2


def test_the_first_failure_ends_the_others(hub: StubHub, tmp_path: Path) -> None:
    hub.hold["model.safetensors"] = 1000
    hub.served["config.json"] = b"{}"
    message = refused(hub, tmp_path, code=EXIT_UNAVAILABLE)
    assert "config.json" in message


def test_ctrl_c_while_another_router_downloads(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(seconds: float) -> None:
        raise KeyboardInterrupt

    reach = access(hub, tmp_path)
    wish = fetch.Wish(reach.hubs.hugging_face, "org/tiny")
    monkeypatch.setattr(fetch.time, "sleep", stopped)
    with fetch._only_one(wish), pytest.raises(StartError) as caught:
        resolve("org/tiny", access=reach)
    assert caught.value.code == 130
