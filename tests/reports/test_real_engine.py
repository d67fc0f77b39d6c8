"""What only a real engine can show: grammars beside streams, whose cache is whose, and no pickle.

Its interpreter, and the router's, end at the first attempt to read a pickle.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.router_process import ROOT, RouterProcess, sse_events, starting, tiny_model

pytestmark = pytest.mark.slow

KEYS = "one\ntwo"
NO_PICKLE = '''
"""Whoever reads a pickle is gone."""
import os, pickle, sys

def gone(*_args, **_options):
    sys.stderr.write("a pickle was read\\n")
    os._exit(99)

pickle.load = pickle.loads = gone
'''


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    folder = tmp_path_factory.mktemp("real")
    (folder / "sitecustomize.py").write_text(NO_PICKLE)
    env = {"PYTHONPATH": f"{folder}:{ROOT}", "ROUTER_API_KEY": KEYS}
    make = starting(folder)
    models = ("--models", f"tiny={tiny_model(folder)}", "--max-len", "2048", "--kv-memory", "64M")
    router = next(make)(*models, "--threads", "1", env=env)
    assert router.url
    yield router
    next(make, None)


def ask(router: RouterProcess, key: str = "one", **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 20, **fields}
    headers = {"x-api-key": key}
    url = f"{router.url}/v1/completions"
    return httpx.post(url, json=body, headers=headers, timeout=120, trust_env=False)


def run_stream(router: RouterProcess, until_done: list[bool]) -> tuple[int, float]:
    """(answers, longest pause) of streams, one after the other, until told to stop."""
    longest_s, answers = 0.0, 0
    body = {"model": "tiny", "prompt": "go", "max_tokens": 200, "stream": True, "ignore_eos": True}
    headers = {"x-api-key": "two"}
    url = f"{router.url}/v1/completions"
    while not until_done:
        last_s = time.monotonic()
        with httpx.stream(
            "POST", url, json=body, headers=headers, timeout=120, trust_env=False
        ) as r:
            *events, last = (timed(event, r) for event in sse_events(r))
        for event, at_s in [*events, last]:
            longest_s, last_s = max(longest_s, at_s - last_s), at_s
            assert "error" not in event
        assert last[0] == "[DONE]"
        answers += 1
    return answers, longest_s


def timed(event: Any, _response: httpx.Response) -> tuple[Any, float]:
    return event, time.monotonic()


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"oneOf": [schema, {"type": "object", "properties": {"a": schema}}]}
        if len(json.dumps(schema)) > 200_000:
            break
    return schema


def nasty() -> Iterator[dict[str, Any]]:
    """Patterns and schemas that ended servers, or kept them for minutes."""
    yield {"guided_regex": "((((a"}
    yield {"guided_regex": "[z-a]"}
    yield {"guided_regex": "(a+)+$" * 50}
    yield {"guided_regex": "(a|a)*" * 200 + "b"}
    yield {"guided_regex": "a{1,100000}"}
    yield {"guided_regex": "((a{0,100}){0,100}){0,100}"}
    yield {"guided_regex": "(.*a){50}[ab]{200}"}
    yield {"guided_regex": r"\p{L}{500}"}
    yield {"guided_json": {"type": "nothing"}}
    yield {"guided_json": {"$ref": "#/nowhere"}}
    yield {"guided_json": {"$ref": "#"}}
    yield {"guided_json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}
    node = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    yield {"guided_json": node}
    tree = {"type": "array", "items": {"$ref": "#"}}
    yield {"guided_json": tree}
    yield {"guided_json": nested(25)}
    yield {"guided_json": {"type": "object", "properties": {f"p{i}": {} for i in range(40_000)}}}
    yield {"guided_json": {"enum": [f"{i:0100}" for i in range(10_000)]}}
    yield {"guided_json": {"type": "array", "minItems": 10**9, "items": {}}}
    yield {"guided_json": {"type": "string", "minLength": 10**9}}
    yield {"guided_json": {"type": "integer", "minimum": -(2**63), "maximum": 2**63}}
    yield {"guided_json": {"type": "number", "multipleOf": 1e-9}}
    yield {"guided_json": {"type": "string", "pattern": "(x{1,50}){1,50}$"}}
    yield {"guided_grammar": "start: a\na: a a | a"}
    yield {"guided_grammar": "start: " + "(" * 2000 + '"a"' + ")" * 2000}
    yield {"guided_grammar": "start: " + " | ".join(f'"{i}"' for i in range(3000))}
    yield {"guided_grammar": 'root ::= "a'}
    yield {"guided_choice": ["x" * 1000] * 900}
    yield {"guided_choice": []}


def test_a17_s16_nasty_grammars_beside_four_streams(real: RouterProcess) -> None:
    done: list[bool] = []
    slowest_s, refused = 0.0, 0
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(run_stream, real, done) for _ in range(4)]
        try:
            for fields in nasty():
                begin_s = time.monotonic()
                answer = ask(real, **fields)
                slowest_s = max(slowest_s, time.monotonic() - begin_s)
                assert answer.status_code in (200, 400, 413), (str(fields)[:200], answer.text)
                refused += answer.status_code != 200
                if answer.status_code != 200:
                    assert answer.json()["error"]["message"]
        finally:
            done.append(True)
        ends = [stream.result(120) for stream in streams]
    longest_s = max(pause_s for _, pause_s in ends)
    told = f"A17: slowest answer {slowest_s:.2f} s, longest pause of a stream {longest_s:.2f} s"
    sys.stdout.write(f"{told}, {refused} refused\n")
    assert max(slowest_s, longest_s) < 60
    assert refused >= 12
    assert real.events("engine_died") == []
    assert ask(real, guided_regex="[ab]{3}").json()["choices"][0]["text"].strip("ab") == ""


def test_s17_a_prompt_is_cached_for_its_key_alone(real: RouterProcess) -> None:
    prompt = "The cache of one key must tell nothing to another. " * 8

    def cached(key: str, **fields: Any) -> int:
        usage = ask(real, key, prompt=prompt, max_tokens=2, **fields).json()["usage"]
        return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))

    assert cached("one") == 0
    assert cached("one") > 100
    assert cached("two") == 0
    assert cached("two") > 100
    assert cached("two", cache_salt="mine") == 0
    assert cached("one", cache_salt="mine") == 0
    assert cached("one", cache_salt="mine") > 100


def test_s1_no_pickle_is_read(real: RouterProcess) -> None:
    """From the start to an answer; and the guard is in force where it is meant to be."""
    assert ask(real).status_code == 200
    assert "a pickle was read" not in real.log
    environ = Path(f"/proc/{real.engine_pid(0)}/environ").read_text()
    path = next(entry for entry in environ.split("\0") if entry.startswith("PYTHONPATH="))
    code = "import pickle; pickle.loads(pickle.dumps(1))"
    env = {**os.environ, "PYTHONPATH": path.partition("=")[2]}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert done.returncode == 99
