"""Sentencepiece vocabularies: tokenizer.model in folders, and the same in GGUF files."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

from router.errors import EXIT_CONFIG, StartError
from router.text.model import load_text, load_tokenizer
from router.text.spm import open_model, write_model
from router.text.tokenizer import Tokenizer
from tests.text_models import GLM_CONFIG, golden_rows, real_folder, real_vocabulary

TEXTS = ["Hello world", "  two  spaces", "你好 😊", "line\n\n\tx", "</s><tool>x", "a▁b", ""]


@pytest.fixture(scope="module")
def trained() -> bytes:
    """A small model of our own, so that no other is needed: BPE with bytes, like Llama's."""
    lines = [f"Hello world number {i}, how are you? the quick brown fox" for i in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<start_of_turn>"],
        minloglevel=2,
    )
    return model.getvalue()


def folder(path: Path, model: bytes, **files: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    for stem, content in files.items():
        (path / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_small_model(tmp_path: Path, trained: bytes) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, trained, config={"model_type": "llama"}))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (340, 1, (2,))
    assert tokenizer.prefix_ids == (1,)
    assert tokenizer.special_ids == {0, 1, 2}
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == oracle.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids) == text.replace("▁", " ")


def test_added_tokens(tmp_path: Path, trained: bytes) -> None:
    decoder = {
        "3": {"content": "<start_of_turn>", "special": True},  # a piece of the model too: Gemma
        "340": {"content": "<|im_end|>", "special": True, "rstrip": True},
        "343": {"content": "<tool>", "special": False},
    }
    settings = {
        "added_tokens_decoder": decoder,
        "legacy": False,
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
        "add_eos_token": True,
    }
    path = folder(tmp_path, trained, tokenizer_config=settings, config={"eos_token_id": [2, 9999]})
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 344
    assert (tokenizer.eos_ids, tokenizer.prefix_ids) == ((340, 2), ())
    assert tokenizer.encode_for_embedding("") == [340]
    ids = tokenizer.encode("a<|im_end|> \n b<tool>", add_special=True, parse_special=True)
    plain = tokenizer.encode("a", add_special=False, parse_special=False)
    assert ids[: len(plain) + 1] == [*plain, 340]
    assert tokenizer.decode(ids, skip_special=False) == "a<|im_end|>b<tool>"
    typed = "<start_of_turn>x<|im_end|><tool>"
    ids = tokenizer.encode(typed, add_special=False, parse_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert ids[-1] == 343
    assert tokenizer.decode(ids) == typed


@pytest.mark.parametrize("legacy", [True, False, None])
def test_text_behind_a_control_token(tmp_path: Path, trained: bytes, legacy: bool | None) -> None:
    settings = {} if legacy is None else {"legacy": legacy}
    tokenizer = load_tokenizer(folder(tmp_path, trained, tokenizer_config=settings))
    alone = tokenizer.encode("Hello", add_special=False, parse_special=False)
    ids = tokenizer.encode("</s>Hello", add_special=False, parse_special=True)
    assert (ids[1:] == alone) == (legacy is not False)
    assert tokenizer.decode(ids[1:], continues=True).strip() == "Hello"


def test_the_older_files_of_added_tokens(tmp_path: Path, trained: bytes) -> None:
    path = folder(
        tmp_path,
        trained,
        added_tokens={"<pad>": 340, "<extra>": 341, "<more>": 342},
        special_tokens_map={
            "pad_token": "<pad>",
            "additional_special_tokens": [{"content": "<more>"}],
        },
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.special_ids == {0, 1, 2, 340, 342}
    assert tokenizer.token_bytes(341) == b"<extra>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 10**8}}, "the id 100000000 of an added token is far beyond"),
        ({"added_tokens": {"<x>": -1}}, "'-1' is no id"),
        ({"added_tokens": {"<x>": "many"}}, "'many' is no id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": {}}}}, "has no text as 'content'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "'x' is no id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9" * 30: {}}}}, "is no id"),
    ],
)
def test_unusable_added_tokens(
    tmp_path: Path, trained: bytes, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartError, match=message) as caught:
        load_tokenizer(folder(tmp_path, trained, **files))
    assert caught.value.code == EXIT_CONFIG
    assert str(tmp_path) in caught.value.message


def test_broken_models_end_in_one_sentence(tmp_path: Path, trained: bytes) -> None:
    source = random.Random(5)
    path = folder(tmp_path, trained)
    refused = 0
    for _ in range(150):
        data = bytearray(trained)
        if source.random() < 0.5:
            del data[source.randrange(len(data)) :]
        for _ in range(source.randrange(1, 20)):
            if data:
                data[source.randrange(len(data))] = source.randrange(256)
        (path / "tokenizer.model").write_bytes(data)
        try:
            tokenizer = load_tokenizer(path)
        except StartError as error:
            refused += "tokenizer.model cannot be used" in error.message
        else:  # what is left is a model, if another one
            ids = tokenizer.encode("Hello world 你好", add_special=True, parse_special=True)
            assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert refused > 50


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 100, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_model(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(
        StartError, match=r"tokenizer\.model cannot be used: it is no sentencepiece"
    ):
        load_tokenizer(folder(tmp_path, data))


def test_a_chatglm_vocabulary_of_another_model(tmp_path: Path) -> None:
    config = {**GLM_CONFIG, "padded_vocab_size": 64000}
    with pytest.raises(StartError, match=r"64,789 pieces and 5 control tokens.*is 64,000"):
        load_text(real_folder(tmp_path / "m", "chatglm2-6b", config=config))


# -- the same model inside a GGUF file


def write_gguf(path: Path, trained: bytes, **changes: Any) -> Path:
    """As llama.cpp's converter writes a sentencepiece vocabulary."""
    source = sentencepiece.SentencePieceProcessor(model_proto=trained)
    ids = range(source.get_piece_size())
    tokens = [source.id_to_piece(i) for i in ids]
    kinds = [
        2 if source.is_unknown(i)
        else 3 if source.is_control(i)
        else 6 if source.is_byte(i)
        else 4 if tokens[i] == "<start_of_turn>"
        else 1
        for i in ids
    ]  # fmt: skip
    given = {
        "model": "llama",
        "tokens": tokens,
        "kinds": kinds,
        "scores": [source.get_score(i) for i in ids],
        **changes,
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(given["model"])
    writer.add_token_list(given["tokens"])
    writer.add_token_types(given["kinds"])
    if given["scores"]:
        writer.add_token_scores(given["scores"])
    if "space" in given:
        writer.add_add_space_prefix(given["space"])
    if "bos" in given:
        writer.add_add_bos_token(given["bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_equals_sentencepiece_on_the_golden_texts(tmp_path: Path) -> None:
    model = real_vocabulary("llama-2").read_bytes()
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", model))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (32000, 1, (2,))
    for row in golden_rows("llama2/text_to_ids"):
        ids = tokenizer.encode(row["text"], add_special=True, parse_special=False)
        assert ids == row["ids"]
        expected = row.get("ids_specials_parsed_legacy", row["ids"])
        ids = tokenizer.encode(row["text"], add_special=False, parse_special=True)
        assert [1, *ids] == expected
    for row in golden_rows("llama2/ids_to_text"):
        assert tokenizer.decode(row["ids"]) == row["text_skip_special_tokens"]


def test_gguf_of_a_small_model(tmp_path: Path, trained: bytes) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained)
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", trained))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=True, parse_special=False)
        assert ids == [1, *oracle.encode(text)]
    assert _encode(tokenizer, "<start_of_turn>x").count(3) == 1  # a piece that is text


def test_gguf_without_the_space_in_front(tmp_path: Path, trained: bytes) -> None:
    # Gemma
    file = write_gguf(tmp_path / "m.gguf", trained, space=False, bos=False)
    tokenizer = load_tokenizer(file)
    assert not tokenizer.strips_space
    assert tokenizer.prefix_ids == ()
    ids = _encode(tokenizer, "Hello")
    assert tokenizer.decode(ids) == "Hello"
    assert ids != _encode(load_tokenizer(write_gguf(tmp_path / "n.gguf", trained)), "Hello")


def test_gguf_with_empty_and_unused_pieces(tmp_path: Path, trained: bytes) -> None:
    size = 340
    source = sentencepiece.SentencePieceProcessor(model_proto=trained)
    tokens = [source.id_to_piece(i) for i in range(size)]
    more = {"tokens": [*tokens, "", "", "<|im_end|>"], "scores": [0.0] * (size + 3)}
    kinds = [2, 3, 3, 4, *[6] * 256, *[1] * (size - 260), 5, 1, 4]
    file = write_gguf(tmp_path / "m.gguf", trained, kinds=kinds, **more)
    tokenizer = load_tokenizer(file)
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.eos_ids == (2, 342)  # by its name, although it says that it is text
    assert tokenizer.special_ids.isdisjoint(_encode(tokenizer, "<|im_end|>"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "'t5', known are 'gpt2'"),
        ({"scores": []}, "one score for each token"),
        ({"scores": [0.0, float("nan")] * 170}, "a score that is no number"),
        ({"kinds": [9] * 340}, "token types that are not known"),
        ({"kinds": [1] * 339}, "one token type for each token"),
        ({"tokens": ["a"] * 340}, "no sentencepiece model"),
    ],
)
def test_unusable_gguf_vocabularies(
    tmp_path: Path, trained: bytes, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartError, match=message) as caught:
        load_tokenizer(write_gguf(tmp_path / "m.gguf", trained, **changes))
    assert "m.gguf" in caught.value.message


def test_a_written_model_is_read_by_the_library() -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
    kinds = [2, 3, 3, 1, 1, 1, 1, 1]
    scores = [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0]
    model = open_model(write_model(pieces, scores, kinds, adds_prefix=True))
    assert model.encode("ab", starts=True) == [7]
    assert model.encode("ab", starts=False) == [6]
    assert model.encode("z", starts=False) == [0]
    assert (model.bos_id, model.eos_id, model.unk_id) == (1, 2, 0)
    assert model.pieces[7] == b" ab"
    assert model.special == {0: "<unk>", 1: "<s>", 2: "</s>"}


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False, parse_special=False)
