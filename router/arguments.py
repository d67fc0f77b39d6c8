"""The command line: words, router.toml and environment -> `RouterConfig`.

Owns the flags' help, FastChat's spellings, and the sentences for wrong words. Starts nothing and
looks at no device. Raises StartError 64 (command line) or 78 (configuration file).
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

from router.config import Options, RouterConfig, key_digests, resolve
from router.errors import EXIT_CONFIG, EXIT_USAGE, StartError

COMMANDS: Final = {
    "serve": "serve models (what happens when no command is named)",
    "check": "check command line and configuration, print the memory plan, start nothing",
}

HELP: Final = {
    "models": "[NAME=]SOURCE[@GPU],…  folder, .gguf file, short name, Hugging Face's "
    "ORG/NAME[:Q4_K_M] or modelscope:ORG/NAME, downloaded once; several NAMEs "
    "are joined with |  (default: the demo model)",
    "gpus": "devices to use: indices, UUIDs or cpu, separated by commas (default: all, else cpu)",
    "host": "address to listen on",
    "port": "port to listen on; 0 takes a free one",
    "max-concurrency": "requests that one replica works on at once (default: --max-batch)",
    "max-queue": "requests of one model that may wait; beyond that 503 with Retry-After",
    "max-queue-tokens": "tokens that these may have together",
    "request-timeout": "seconds a request may take in all; 0 = no limit",
    "queue-timeout": "seconds it may wait for its turn, then 503; 0 = no limit",
    "first-token-timeout": "seconds until its first token; 0 = no limit",
    "drain-timeout": "seconds that running requests may take to end after SIGTERM or Ctrl-C",
    "hang-timeout": "seconds without progress after which an engine is killed and restarted",
    "idle-unload": "seconds without a request after which a model gives up its engines; the next "
    "request starts them again; 0 = never",
    "max-len": "tokens of prompt and answer together; 0 = what the model can",
    "dtype": "auto, float32, bfloat16 or float16",
    "quant": "none, int8, fp8, nf4 or bnb-int8",
    "rope-rule": "ChatGLM rope_ratio scales the base or the positions: auto, base, linear",
    "chat-format": "how conversations are written, in place of the model's template: chatglm2, "
    "chatglm3, glm-4, vicuna_v1.1, llama-2, mistral, chatml, llama-3, gemma, phi-3, zephyr",
    "chat-template": "the same as a file with a jinja template",
    "tool-parser": "how the model writes tool calls: hermes, qwen3-coder, glm-4.5, granite, "
    "llama-3, mistral, mistral-args, chatglm3, glm-4 (default: as its chat template says)",
    "reasoning-parser": "how it marks its thinking: think, seed-think, mistral-think, or none "
    "(default: as its chat template says)",
    "load-format": "auto, or dummy for random weights of the model's shape",
    "kv-memory": "memory of each engine's KV cache, such as 800M or 4G; 0 = decide",
    "kv-blocks": "the same in blocks of 32 tokens; 0 = decide",
    "step-tokens": "token budget of one engine step (default: 512, 2048 on a GPU)",
    "max-batch": "sequences that one engine runs at once (default: 64, 256 on a GPU)",
    "no-prefix-cache": "do not reuse the work of common prefixes",
    "threads": "CPU threads of each engine; 0 = share the cores",
    "model-dir": "folder where models named without a path lie",
    "engine-command": "another program that speaks the engine's side of the wire",
    "log-format": "text or json",
    "log-level": "debug, info, warning or error",
    "log-file": "file to add the log to; SIGUSR2 opens it anew (default: standard error)",
    "metrics-names": "own, or vllm to add the names that vLLM's dashboards ask for",
    "on-fatal": "exit or wait, when an engine fails for good",
    "insecure-no-auth": "allow other addresses than loopback without any key",
    "api-key-file": "file with API keys, one a line (or the variable ROUTER_API_KEY)",
    "admin-key-file": "file with keys for /admin alone (or the variable ROUTER_ADMIN_KEY)",
    "cors-origins": "web pages that may call this server, such as https://chat.example, or * "
    "(default: none)",
    "allowed-hosts": "names by which it may be called, * = any (default: localhost if it listens "
    "on loopback and needs no key; addresses always may)",
}

# FastChat's flag -> (takes a value, our words; {} is the value). No words: not needed any more.
FASTCHAT: Final[dict[str, tuple[bool, str]]] = {
    "--limit-worker-concurrency": (True, "--max-concurrency {}"),
    "--model-names": (True, ""),
    "--load-8bit": (False, "--quant int8"),
    "--model-path": (True, "--models {}"),
    "--device": (True, "--gpus {}"),
    "--worker-address": (True, ""),
    "--controller-address": (True, ""),
    "--controller": (True, ""),
    "--dispatch-method": (True, ""),
    "--no-register": (False, ""),
    "--num-gpus": (True, ""),
    "--conv-template": (True, "--chat-format {}"),
    "--stream-interval": (True, ""),
    "--revision": (True, ""),
    "--seed": (True, ""),
    "--debug": (True, "--log-level debug"),
}


class Invocation(NamedTuple):
    """What was asked. `notes` are (old spelling, what holds instead)."""

    command: str
    config: RouterConfig
    notes: list[tuple[str, str]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises StartError in place of printing the usage and leaving with 2."""
        raise StartError(f"{message}; see router --help", EXIT_USAGE)


def make_parser() -> argparse.ArgumentParser:
    """Flags made of `Options`; every value stays text, its type is checked in one place later."""
    commands = "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
    parser = _Parser(
        prog="router",
        usage="router [COMMAND] [--models …] [--gpus …] [options]",
        description="Serves language models behind the OpenAI API.",
        epilog=f"commands:\n{commands}\n\nexit codes: 0 clean · 64 command line · 69 port, "
        "device or download · 70 engine failure · 75 memory · 78 configuration · "
        "128+n cut short by signal n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="router.toml: the same names, as keys")
    for field in msgspec.structs.fields(Options):
        flag, text = f"--{field.encode_name}", HELP[field.encode_name]
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            default = "" if field.default in ("", 0, None) else f" (default: {field.default})"
            metavar = field.encode_name.rpartition("-")[2].upper()
            parser.add_argument(flag, metavar=metavar, help=f"{text}{default}")
    return parser


def parse(words: Sequence[str], environ: Mapping[str, str]) -> Invocation:
    """Raises StartError; `--help` leaves through SystemExit."""
    command, words = _split_command(list(words))
    words, notes = translate(words)
    parser = make_parser()
    given, unknown = parser.parse_known_args(words)
    if unknown:
        raise StartError(_unknown(unknown[0], parser), EXIT_USAGE)
    values: dict[str, Any] = {k.replace("_", "-"): v for k, v in vars(given).items()}
    file = values.pop("config", None)
    from_file = read_file(Path(file)) if file else {}
    options = _convert({**from_file, **values}, "--", EXIT_USAGE)
    fallback_s = _fastchat_variables(environ, notes, needed=options.request_timeout is None)
    keys = _keys("api-key-file", options.api_key_file, environ.get("ROUTER_API_KEY", ""))
    admin_keys = _keys(
        "admin-key-file", options.admin_key_file, environ.get("ROUTER_ADMIN_KEY", "")
    )
    try:
        config = resolve(
            options, api_keys=keys, admin_keys=admin_keys, fallback_timeout_s=fallback_s
        )
    except ValueError as error:
        raise StartError(str(error), EXIT_USAGE) from error
    return Invocation(command, msgspec.structs.replace(config, file=file or ""), notes)


def _split_command(words: list[str]) -> tuple[str, list[str]]:
    if not words or words[0].startswith("-"):
        return "serve", words
    if words[0] in COMMANDS:
        return words[0], words[1:]
    near = difflib.get_close_matches(words[0], COMMANDS, 1)
    hint = f"did you mean '{near[0]}'?" if near else "models are named with --models"
    raise StartError(f"unknown command '{words[0]}': {hint}", EXIT_USAGE)


def translate(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """FastChat's spellings -> ours, and what to say about each."""
    ours: list[str] = []
    notes: list[tuple[str, str]] = []
    names = ""
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag in ("--api-keys", "--api-key"):
            raise StartError(
                f"{flag} would show the keys to everyone on this machine: put them into a file, "
                "one a line, and give --api-key-file FILE (or set ROUTER_API_KEY)",
                EXIT_USAGE,
            )
        rule = FASTCHAT.get(flag)
        if rule is None:
            ours.append(flag + equals + value)
            continue
        takes_value, pattern = rule
        if takes_value and not equals:
            value = rest.pop(0) if rest else ""
        if flag == "--model-names":
            names = value.replace(",", "|")
            notes.append((flag, f"--models {names}=SOURCE"))
            continue
        if flag == "--device":
            value, pattern = ("cpu", pattern) if value == "cpu" else (value, "")
        new = [word.format(value) for word in pattern.split()]
        ours += new
        notes.append((flag, " ".join(new) or "nothing: it is not needed here"))
    return _name_models(ours, names) if names else ours, notes


def _fastchat_variables(
    environ: Mapping[str, str], notes: list[tuple[str, str]], *, needed: bool
) -> float:
    """FastChat's time limit in seconds, 0 if it is not set or not `needed`; adds to `notes`."""
    if environ.get("FASTCHAT_WORKER_API_EMBEDDING_BATCH_SIZE"):
        notes.append(("FASTCHAT_WORKER_API_EMBEDDING_BATCH_SIZE", "--max-batch"))
    text = environ.get("FASTCHAT_WORKER_API_TIMEOUT", "")
    if not text or not needed:
        return 0.0
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise StartError(
            f"FASTCHAT_WORKER_API_TIMEOUT is '{text}', no number of seconds: unset it and give "
            "--request-timeout",
            EXIT_USAGE,
        )
    notes.append(("FASTCHAT_WORKER_API_TIMEOUT", f"--request-timeout {text}"))
    return float(text)


def _name_models(words: list[str], names: str) -> list[str]:
    if "--models" not in words[:-1]:
        raise StartError("--model-names needs --models: write --models NAME=SOURCE", EXIT_USAGE)
    at = words.index("--models") + 1
    return [*words[:at], f"{names}={words[at]}", *words[at + 1 :]]


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"'{word}' belongs to no flag; see router --help"
    flag = word.partition("=")[0]
    flags = re.findall(r"--[a-z-]+", parser.format_help())
    near = difflib.get_close_matches(flag, sorted(set(flags)), 1, cutoff=0.5)
    return f"unknown flag {flag}: " + (f"did you mean {near[0]}?" if near else "see router --help")


def read_file(path: Path) -> dict[str, Any]:
    """The keys of router.toml, checked. Raises StartError 78."""
    try:
        values: dict[str, Any] = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise StartError(f"cannot read --config {path}: {error.strerror}", EXIT_CONFIG) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StartError(f"{path} is no valid TOML: {error}", EXIT_CONFIG) from error
    known = [field.encode_name for field in msgspec.structs.fields(Options)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            raise StartError(f"{path}: unknown key '{key}': {hint}", EXIT_CONFIG)
    _convert(values, f"{path}: ", EXIT_CONFIG)
    return values


def _convert(values: dict[str, Any], prefix: str, code: int) -> Options:
    try:
        return msgspec.convert(values, Options, strict=False)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at ")
        name = place.strip("`").removeprefix("$.").partition("[")[0]
        why = f"cannot be {values.get(name)!r} ({text.lower()})"
        raise StartError(f"{prefix}{name} {why}: {HELP.get(name, name)}", code) from error


def _keys(flag: str, file: str, text: str) -> tuple[bytes, ...]:
    """The digests of the keys in `text`, a variable's, and in the file. Raises StartError."""
    if file:
        try:
            text += "\n" + Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"cannot read --{flag}: {error}", EXIT_CONFIG) from error
        if not key_digests(text):
            raise StartError(f"{file} holds no key", EXIT_CONFIG)
    return key_digests(text)
