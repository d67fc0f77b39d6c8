"""Vocabularies of tiktoken's ranks."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

import pytest

from router.errors import EXIT_CONFIG, StartError
from router.text.model import load_text, load_tokenizer
from router.text.rank_vocab import is_rank_file, parse_ranks
from tests.text_models import GLM_CONFIG, real_folder, real_vocabulary

BYTES = [bytes([byte]) for byte in range(256)]


def rank_file(pieces: Iterable[bytes]) -> bytes:
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    return b"".join(lines)


def test_a_small_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(rank_file([*BYTES, b"he", b"llo", b"ll", b" \xe4"]))
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}', encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 260 + 14
    assert tokenizer.prefix_ids == (262, 264)
    assert tokenizer.eos_ids == (260, 267, 269)
    ids = tokenizer.encode("hello<|user|>", add_special=False, parse_special=True)
    assert ids == [256, 257, 267]
    text = "hello<|user|> \n你好 😊"
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0xE4, 0xBD, ord("a")]) == "�a"  # Python's own way, as THUDM's


def test_the_content_decides_never_the_name() -> None:
    assert is_rank_file(rank_file(BYTES))
    assert not is_rank_file(b"")
    assert not is_rank_file(b"\n\x0e\n\x05<unk>\x15")
    assert is_rank_file(real_vocabulary("glm-4-9b-chat").read_bytes())
    assert not is_rank_file(real_vocabulary("llama-2").read_bytes())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 ranks"),
        (b"IQ== 0\nx\n", "line 2 is not a piece in base64 and a rank"),
        (b"IQ== 0\n!!!! 1\n", "line 2"),
        (b"IQ== zero\n", "line 1"),
        (b"IQ== 99999999999\n", "line 1"),
        (b"IQ== 0\nIg== 0\n", "line 2 gives rank 0 a second time"),
        (b"IQ== 5\n", "ranks are not 0 to 0"),
        (b"IQ== 0\nIQ== 1\n", "appears twice"),
        (b"IQ== 0\n", "255 of the 256 single bytes"),
        (b"\xff\xfe\n", "line 1"),
    ],
)
def test_broken_files(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_ranks(data)


def test_broken_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(rank_file(BYTES)[:-4])
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}', encoding="utf-8")
    with pytest.raises(StartError, match=r"tokenizer\.model cannot be used: line 256") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == EXIT_CONFIG


def test_other_models_and_other_control_tokens_are_refused(tmp_path: Path) -> None:
    other = real_folder(tmp_path / "a", "glm-4-9b-chat", config={"model_type": "llama"})
    with pytest.raises(StartError, match=r"known of GLM-4 only: take a copy .* tokenizer\.json"):
        load_text(other)
    assert load_text(other, chat_format="glm-4").tokenizer.vocab_size == 151343
    added = {"added_tokens_decoder": {"151336": {"content": "<|system|>"}}}
    path = real_folder(tmp_path / "b", "glm-4-9b-chat", config=GLM_CONFIG, tokenizer_config=added)
    with pytest.raises(StartError, match=r"'<\|system\|>' as 151336, GLM-4 has 151335"):
        load_text(path)


def test_a_long_text_does_not_take_long() -> None:
    """A quadratic encoder would take hours for these."""
    folder = real_vocabulary("glm-4-9b-chat").parent
    tokenizer = load_text(folder, chat_format="glm-4").tokenizer
    for text in ("a" * 200_000, " " * 200_000, "你" * 100_000, "^" * 200_000):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids) == text
