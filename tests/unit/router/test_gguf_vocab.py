from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from router.errors import EXIT_CONFIG, StartError
from router.text.fast_codec import FastCodec
from router.text.gguf_vocab import load_gguf_vocabulary
from router.text.model import load_text
from router.text.pre_tokenizers import PRE_TOKENIZERS
from router.text.tokenizer import ModelTokenizer
from router.text.vocabulary import byte_alphabet

CONTROL, NORMAL, USER_DEFINED = 3, 1, 4
ALPHABET = [byte_alphabet()[byte] for byte in range(256)]
TOKENS = [*ALPHABET, "he", "ll", "hell", "hello", "<bos>", "<|im_end|>", "<tool>", "<|eot_id|>"]
TYPES = [NORMAL] * 260 + [CONTROL, CONTROL, USER_DEFINED, CONTROL]
MERGES = ["h e", "l l", "he ll", "hell o"]


def write(path: Path, *, pre: str | None = "smollm", **changes: Any) -> Path:
    """A GGUF file with a vocabulary and no tensors."""
    given: dict[str, Any] = {"model": "gpt2", "tokens": TOKENS, "types": TYPES, "merges": MERGES}
    given |= changes
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(given["model"])
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for key, add in {
        "tokens": writer.add_token_list,
        "types": writer.add_token_types,
        "merges": writer.add_token_merges,
    }.items():
        if given[key]:
            add(given[key])
    writer.add_bos_token_id(260)
    writer.add_eos_token_id(261)
    if "add_bos" in given:
        writer.add_add_bos_token(given["add_bos"])
    if "template" in given:
        writer.add_chat_template(given["template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path, **changes: Any) -> ModelTokenizer:
    return ModelTokenizer(load_gguf_vocabulary(write(path / "m.gguf", **changes)))


def test_a_whole_vocabulary(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == 264
    assert tokenizer.bos_id == 260
    assert tokenizer.eos_ids == (261, 263)  # the second one by its name
    assert tokenizer.special_ids == {260, 261, 263}
    ids = tokenizer.encode("hello<|im_end|><tool>é", add_special=True, parse_special=True)
    assert ids == [259, 261, 262, 0xC3, 0xA9]
    assert tokenizer.decode(ids) == "hello<tool>é"


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [
        ("smollm", None, ()),
        ("llama-bpe", None, (260,)),
        ("llama-bpe", False, ()),
        ("qwen2", None, ()),
        ("qwen2", True, (260,)),
    ],
)
def test_the_start_token(
    tmp_path: Path, pre: str, add_bos: bool | None, expected: tuple[int, ...]
) -> None:
    changes = {} if add_bos is None else {"add_bos": add_bos}
    assert load(tmp_path, pre=pre, **changes).prefix_ids == expected


# what the expressions of llama.cpp make of this text
TEXT = "I'LL  pay 1234\n\n  now!!"
SPLITS = {
    "gpt-2": ["I", "'", "LL", " ", " pay", " 1234", "\n\n ", " now", "!!"],
    "smollm": ["I", "'", "LL", " ", " pay", " ", "1", "2", "3", "4", "\n\n ", " now", "!!"],
    "llama-bpe": ["I", "'LL", " ", " pay", " ", "123", "4", "\n\n", " ", " now", "!!"],
    "qwen2": ["I", "'LL", " ", " pay", " ", "1", "2", "3", "4", "\n\n", " ", " now", "!!"],
    "default": ["I", "'", "LL", " ", " pay", " ", "123", "4", "\n\n ", " now", "!!"],
    "tekken": ["I", "'LL", " ", " pay", " ", "1", "2", "3", "4", "\n\n", " ", " now", "!!"],
    "gpt-4o": ["I'LL", " ", " pay", " ", "123", "4", "\n\n", " ", " now", "!!"],
    "deepseek-v3": ["I", "'LL", " ", " pay", " ", "123", "4", "\n\n", " ", " now", "!!"],
    "deepseek-coder": ["I", "'", "LL", " ", " pay", " ", *"1234\n\n", " ", " now", "!!"],
    "falcon": ["I", "'", "LL", " ", " pay", " ", "123", "4", "\n\n ", " now", "!!"],
    "seed-coder": ["I", "'LL", " ", " pay", " ", *"1234", "\n\n", " ", " now", "!!"],
    "bailingmoe": ["I", "'LL", " ", " pay", " ", *"1234", "\n\n", " ", " now", "!!"],
    "bloom": ["I'LL", " ", " pay", " 1234", "\n\n ", " now", "!!"],
    "viking": ["I'LL", " ", " pay", " ", *"1234", "\n\n ", " now", "!!"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_pre_tokenizers(tmp_path: Path, pre: str) -> None:
    vocabulary = load_gguf_vocabulary(write(tmp_path / "m.gguf", pre=pre))
    assert isinstance(vocabulary.codec, FastCodec)
    pre_tokenizer = vocabulary.codec.parsing.pre_tokenizer
    assert pre_tokenizer is not None
    spans = [span for _, span in pre_tokenizer.pre_tokenize_str(TEXT)]
    assert [TEXT[first:last] for first, last in spans] == SPLITS[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_every_character(tmp_path: Path, pre: str) -> None:
    tokenizer = load(tmp_path, pre=pre)
    for text in (TEXT, "你好，ABC。 déjà-vu\tx", "a" * 300, " " * 50, "it's 3.14% `x`<|y|>"):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids) == text


def test_no_word_for_the_pre_tokenizer_means_default(tmp_path: Path) -> None:
    assert load(tmp_path, pre=None).vocab_size == 264


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert', known are 'gpt2'"),
        ({"pre": "strange"}, "'strange' is not known; known are gpt-2"),
        ({"tokens": []}, "no tokens"),
        ({"merges": []}, "no merges"),
        ({"types": TYPES[1:]}, "one token type for each token"),
        ({"tokens": [*TOKENS[:-1], "he"]}, "appear twice"),
        ({"merges": ["x yz"]}, "merge 'x yz'"),
        ({"merges": ["xy"]}, "merge 'xy'"),
    ],
)
def test_unusable_vocabularies(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError, match=message) as caught:
        load(tmp_path, **changes)
    assert caught.value.code == EXIT_CONFIG
    assert "m.gguf" in caught.value.message


def test_template_and_vocabulary_of_one_file(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", template="{{ bos_token }}{{ messages[0].content }}")
    text = load_text(file)
    assert text.template is not None
    messages = [{"role": "user", "content": "hello<bos>"}]
    ids = text.template.render_tokens(messages, None, True, False, {}, text.tokenizer)
    assert ids[:2] == [260, 259]
    assert ids.count(260) == 1
    assert load_text(write(tmp_path / "n.gguf")).template is None
