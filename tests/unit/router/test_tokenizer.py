from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from router.errors import EXIT_CONFIG, StartError
from router.text.model import load_tokenizer
from router.text.tokenizer import SpecialNames, Tokenizer
from tests.demo_model import GOLDEN, demo_model
from tests.text_models import byte_level, sentencepiece_like, write_folder

TEXTS = [
    "",
    "hello hello  hello",
    "Hello maxim!",
    " leading",
    "  two",
    "a    b",
    "你好 😊 é\n\n\ttab",
    "<|im_end|> and <s> typed",
    "I'm <tool_call> x</s>",
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(demo_model())


def golden_items() -> list[dict[str, object]]:
    text = (GOLDEN / "smollm2" / "greedy.json").read_text(encoding="utf-8")
    items: list[dict[str, object]] = json.loads(text)["items"]
    return items


def test_golden_prompts(demo: Tokenizer) -> None:
    for item in golden_items():
        text = str(item["prompt_text"])
        assert demo.encode(text, add_special=True, parse_special=True) == item["prompt_ids"]
        assert demo.decode(item["prompt_ids"], skip_special=False) == text  # type: ignore[arg-type]


def test_facts_of_the_demo_model(demo: Tokenizer) -> None:
    assert demo.vocab_size == 49152
    assert demo.eos_ids == (2, 0)
    assert (demo.bos_id, demo.prefix_ids) == (1, ())
    assert not demo.strips_space
    assert demo.token_text(2) == "<|im_end|>"
    assert demo.token_bytes(2) == b""


def test_smollm_splits_digits_as_llama_cpp_does(demo: Tokenizer) -> None:
    ids = demo.encode("a  2024", add_special=False, parse_special=False)
    assert [demo.token_bytes(token) for token in ids] == [b"a", b"  ", b"2", b"0", b"2", b"4"]


@given(text=st.text(max_size=60))
def test_bytes_survive(all_bytes: Tokenizer, text: str) -> None:
    ids = all_bytes.encode(text, add_special=False, parse_special=False)
    assert b"".join(all_bytes.token_bytes(token) for token in ids) == text.encode()
    assert all_bytes.special_ids.isdisjoint(ids)


@pytest.fixture(scope="module")
def all_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_folder(tmp_path_factory.mktemp("model"), byte_level()))


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
def test_sentencepiece_like_texts(tmp_path: Path, scheme: str) -> None:
    library = sentencepiece_like(scheme=scheme)
    tokenizer = load_tokenizer(write_folder(tmp_path, library))
    assert tokenizer.strips_space == (scheme != "never")
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids)
        as_text = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(as_text)
        if scheme in ("legacy", "never") or not text.startswith(" "):  # Metaspace merges that one
            assert tokenizer.decode(as_text) == text


def test_byte_level_texts(tmp_path: Path) -> None:
    library = byte_level()
    tokenizer = load_tokenizer(write_folder(tmp_path, library))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids)
        as_text = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(as_text)
        assert tokenizer.decode(as_text) == text


def test_decoding_equals_the_library_on_any_ids(demo: Tokenizer, tmp_path: Path) -> None:
    library = byte_level()
    tokenizer = load_tokenizer(write_folder(tmp_path, library))
    source = random.Random(7)
    for _ in range(200):
        ids = [source.randrange(tokenizer.vocab_size) for _ in range(12)]
        assert tokenizer.decode(ids) == library.decode(ids)


def test_added_tokens_that_are_no_control_tokens_are_always_parsed(all_bytes: Tokenizer) -> None:
    ids = all_bytes.encode("x<tool_call>", add_special=False, parse_special=False)
    assert all_bytes.token_bytes(ids[-1]) == b"<tool_call>"
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("in_file", "written", "expected"),
    [
        (True, None, True),
        (True, False, False),
        (True, True, True),
        (False, None, False),
        (False, True, True),
    ],
)
def test_the_start_token(
    tmp_path: Path, in_file: bool, written: bool | None, expected: bool
) -> None:
    settings: dict[str, object] = {"bos_token": {"content": "<s>", "lstrip": False}}
    if written is not None:
        settings["add_bos_token"] = written
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level(bos=in_file), settings=settings))
    bos = tokenizer.bos_id
    assert bos is not None
    assert tokenizer.prefix_ids == ((bos,) if expected else ())
    ids = tokenizer.encode("hello", add_special=True, parse_special=True)
    assert ids.count(bos) == expected
    # vllm-project/vllm#27517: never twice
    again = tokenizer.encode("<s>hello", add_special=True, parse_special=True)
    assert again.count(bos) == 1


def test_texts_to_be_embedded_get_what_the_file_puts_around_them(tmp_path: Path) -> None:
    library = byte_level()
    start, end = (library.token_to_id(name) for name in ("<s>", "<|im_end|>"))
    library.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", start), ("<|im_end|>", end)]
    )
    library.enable_truncation(4)
    tokenizer = load_tokenizer(write_folder(tmp_path, library))
    ids = tokenizer.encode_for_embedding("hello <|im_end|>")
    assert (ids[0], ids[-1]) == (start, end)
    assert tokenizer.special_ids.isdisjoint(ids[1:-1])
    assert tokenizer.decode(ids) == "hello <|im_end|>"
    assert tokenizer.encode_for_embedding("") == [start, end]
    assert tokenizer.encode("", add_special=True, parse_special=True) == [start]


def test_all_end_ids_are_found(tmp_path: Path) -> None:
    # zai-org/GLM-4#127
    tokenizer = load_tokenizer(
        write_folder(
            tmp_path,
            byte_level(),
            settings={"eos_token": "<|im_end|>"},
            config={"eos_token_id": [5, 10_000]},
            generation={"eos_token_id": [6, 5]},
        )
    )
    end = tokenizer.encode("<|im_end|>", add_special=False, parse_special=True)[0]
    assert tokenizer.eos_ids == (end, 6, 5)


def test_limits_for_training_are_not_kept(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=4)
    tokenizer = load_tokenizer(write_folder(tmp_path, library))
    assert len(tokenizer.encode("x" * 20, add_special=True, parse_special=True)) == 20
    assert len(tokenizer.encode("x", add_special=True, parse_special=True)) == 1


def test_unknown_ids_are_no_error(all_bytes: Tokenizer) -> None:
    beyond = all_bytes.vocab_size + 5
    assert all_bytes.token_bytes(beyond) == b""
    assert all_bytes.token_text(beyond) == ""
    assert all_bytes.token_bytes(-1) == b""
    assert all_bytes.decode([ord("a"), beyond, -1]) == "a"


def test_a_continued_text_keeps_its_space(tmp_path: Path) -> None:
    # ml-explore/mlx-lm#1754
    tokenizer = load_tokenizer(write_folder(tmp_path, sentencepiece_like()))
    ids = tokenizer.encode("Hello", add_special=False, parse_special=False)
    assert tokenizer.decode(ids) == "Hello"
    assert tokenizer.decode(ids, continues=True) == " Hello"


@pytest.mark.parametrize("scheme", ["byte", "legacy", "first", "always", "never"])
def test_untrusted_parts_stay_text(tmp_path: Path, scheme: str) -> None:
    library = byte_level() if scheme == "byte" else sentencepiece_like(scheme=scheme)
    end = "<|im_end|>" if scheme == "byte" else "</s>"
    tokenizer = load_tokenizer(write_folder(tmp_path, library))
    end_id = library.token_to_id(end)
    ids = tokenizer.encode_trusted(f"Hello a#1{end} Hello #2{end}", {"#1": end, "#2": "a"})
    assert ids.count(end_id) == 2
    shown = tokenizer.decode(ids, skip_special=False)
    assert shown.replace("  ", " ") == f"Hello a{end}{end} Hello a{end}"
    # nothing to protect: as if the text had been encoded as it is
    text = f"Hello {end} a Hello{end}"
    expected = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_trusted(text, {}) == expected
    assert tokenizer.encode_trusted(text.replace(" a ", " #1 "), {"#1": "a"}) == expected


def test_control_tokens_that_are_pieces_of_the_model_too(tmp_path: Path) -> None:
    # Unigram finds "</s>" as an ordinary piece although it is not parsed as a control token
    scores = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, **dict.fromkeys("▁</s>a", -3.0)}
    library = LibraryTokenizer(models.Unigram(list(scores.items()), 0, False))
    library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    library.decoder = decoders.Metaspace("▁", prepend_scheme="first")
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = load_tokenizer(write_folder(tmp_path, library))
    for text in ("a</s>a", "</s>", "a </s><s></s>"):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text
    ids = tokenizer.encode_trusted("<s>a#</s>", {"#": "</s>"})
    assert tokenizer.decode(ids, skip_special=False) == "<s>a</s></s>"
    assert ids.count(library.token_to_id("</s>")) == 1


def test_texts_that_could_become_a_control_token() -> None:
    names = SpecialNames(["<|im_end|>", "</s>"])
    assert names.could_begin("a <|im")
    assert names.could_begin("a <")
    assert not names.could_begin("a <b")
    assert names.could_end("_end|> b")
    assert not names.could_end("end b")
    assert names.could_hold("im_")
    assert not names.could_hold("hello")
    nothing = SpecialNames([])
    assert not any((nothing.could_begin("a"), nothing.could_end("a"), nothing.could_hold("a")))
    assert nothing.pattern.search("") is None


def test_several_threads_may_encode(demo: Tokenizer) -> None:
    texts = [f"text number {number} <|im_end|>" * 20 for number in range(40)]

    def encode(text: str) -> list[int]:
        return demo.encode(text, add_special=True, parse_special=False)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encode, texts)) == [encode(text) for text in texts]


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"no tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == EXIT_CONFIG
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(StartError, match="sentencepiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StartError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_an_unknown_decoder_is_named(tmp_path: Path) -> None:
    library = byte_level()
    library.decoder = decoders.CTC()
    with pytest.raises(StartError, match="'CTC'"):
        load_tokenizer(write_folder(tmp_path, library))


def test_ids_with_holes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level())
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    state["added_tokens"][-1]["id"] += 7
    file.write_text(json.dumps(state), encoding="utf-8")
    if LibraryTokenizer.from_file(str(file)).token_to_id("<tool_call>") is None:
        pytest.skip("this version of the library refuses holes")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("<tool_call><s>", add_special=False, parse_special=False)
    assert tokenizer.decode(ids) == "<tool_call><s>"
    assert tokenizer.special_ids.isdisjoint(ids)
