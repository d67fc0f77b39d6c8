"""Words to configuration: flags, file, environment, and FastChat's spellings."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.arguments import HELP, make_parser, parse, translate
from router.config import Options
from router.errors import StartError


def config(*words: str, **environ: str):  # type: ignore[no-untyped-def]
    return parse(words, environ).config


def test_defaults() -> None:
    got = parse([], {})
    assert (got.command, got.notes) == ("serve", [])
    assert (got.config.http.host, got.config.http.port) == ("127.0.0.1", 8000)
    assert got.config.limits.max_concurrency == 0
    assert got.config.engine.prefix_cache
    assert got.config.gpus == ()


def test_every_option_has_help_and_a_flag() -> None:
    names = {field.replace("_", "-") for field in Options.__struct_fields__}
    assert set(HELP) == names
    text = make_parser().format_help()
    assert all(f"--{name}" in text for name in names)


def test_flags() -> None:
    got = config(
        "serve", "--models", "a=x,y", "--gpus", "0,1", "--port=0", "--no-prefix-cache",
        "--kv-memory", "2G", "--request-timeout", "1.5", "--quant", "int8",
    )  # fmt: skip
    assert [model.source for model in got.models] == ["x", "y"]
    assert (got.gpus, got.http.port) == (("0", "1"), 0)
    assert not got.engine.prefix_cache
    assert got.engine.kv_bytes == 2 * 2**30
    assert got.limits.request_timeout_s == 1.5
    assert got.engine.quant == "int8"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "router.toml"
    path.write_text('models = ["a=x"]\nmax-concurrency = 3\nno-prefix-cache = true\ngpus = [0]\n')
    got = config("--config", str(path), "--max-concurrency", "4")
    assert got.limits.max_concurrency == 4
    assert not got.engine.prefix_cache
    assert (got.models[0].names, got.gpus) == (("a",), ("0",))


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("--limit-worker-concurrency 5", "--max-concurrency 5"),
        ("--limit-worker-concurrency=5", "--max-concurrency 5"),
        ("--load-8bit --port 1", "--quant int8 --port 1"),
        ("--model-path m --model-names a,b", "--models a|b=m"),
        ("--device cpu", "--gpus cpu"),
        ("--device cuda", ""),
        ("--worker-address http://x:1 --controller-address http://x:2 --no-register", ""),
    ],
)
def test_fastchat_spellings(words: str, ours: str) -> None:
    got, notes = translate(words.split())
    assert got == ours.split()
    assert notes
    assert all(new for _, new in notes)


def test_fastchat_time_limit_is_a_fall_back() -> None:
    got = parse([], {"FASTCHAT_WORKER_API_TIMEOUT": "100"})
    assert got.config.limits.request_timeout_s == 100
    assert got.notes == [("FASTCHAT_WORKER_API_TIMEOUT", "--request-timeout 100")]
    both = parse(["--request-timeout", "7"], {"FASTCHAT_WORKER_API_TIMEOUT": "100"})
    assert (both.config.limits.request_timeout_s, both.notes) == (7, [])


@pytest.mark.parametrize(
    ("words", "environ", "code", "says"),
    [
        (["--prot", "1"], {}, 64, "did you mean --port"),
        (["--zzzzzz"], {}, 64, "router --help"),
        (["stray"], {}, 64, "--models"),
        (["serve", "stray"], {}, 64, "'stray'"),
        (["--port"], {}, 64, "expected one argument"),
        (["--port", "-1"], {}, 64, "--port"),
        (["--quant", "int4"], {}, 64, "none, int8, fp8"),
        (["--hang-timeout", "0"], {}, 64, "--hang-timeout"),
        (["--kv-memory", "lots"], {}, 64, "800M"),
        (["--model-names", "a"], {}, 64, "NAME=SOURCE"),
        (["--api-key-file", "/no/such/file"], {}, 78, "--api-key-file"),
        ([], {"FASTCHAT_WORKER_API_TIMEOUT": "soon"}, 64, "--request-timeout"),
    ],
)
def test_mistakes(words: list[str], environ: dict[str, str], code: int, says: str) -> None:
    with pytest.raises(StartError) as caught:
        parse(words, environ)
    assert caught.value.code == code
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_keys_from_file_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team\nsk-a\nsk-b\n")
    words = ["--api-key-file", str(path), "--host", "0.0.0.0"]
    assert len(parse(words, {"ROUTER_API_KEY": "sk-c"}).config.http.api_keys) == 3
    path.write_text("# nothing\n")
    with pytest.raises(StartError, match="holds no key"):
        parse(words, {})
