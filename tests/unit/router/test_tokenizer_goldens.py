"""Real vocabularies against the programs that they came with: tests/golden/tokenizer-*."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.detokenizer import Detokenizer
from router.text.model import ModelText, load_text
from tests.text_models import GLM_CONFIG, golden_rows, real_folder

FAMILIES = ["chatglm2", "chatglm3", "glm4", "llama2"]
Load = Callable[[str], ModelText]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Each family once, from a folder like the released ones."""
    loaded: dict[str, ModelText] = {}
    glm = {**GLM_CONFIG, "eos_token_id": 2, "padded_vocab_size": 65024}

    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp("model") / family
        if family == "glm4":
            ends = {"eos_token_id": [151329, 151336, 151338], "padded_vocab_size": 151552}
            return real_folder(path, "glm-4-9b-chat", config={**GLM_CONFIG, **ends})
        if family.startswith("chatglm"):
            named = {"_name_or_path": f"THUDM/{family}-6b"}
            return real_folder(path, "chatglm2-6b", config={**glm, **named})
        llama = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
        settings = {"legacy": family != "llama2", "bos_token": "<s>", "eos_token": "</s>"}
        return real_folder(path, "llama-2", config=llama, tokenizer_config=settings)

    def text(family: str) -> ModelText:
        if family not in loaded:
            loaded[family] = load_text(folder(family), names=["vicuna-7b-v1.5"])
        return loaded[family]

    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_text_to_ids(load: Load, family: str) -> None:
    tokenizer = load(family).tokenizer
    rows = golden_rows(f"{family}/text_to_ids")
    assert len(rows) == 145
    prefix = [1] if family == "llama2" else []
    for row in rows:
        ids = tokenizer.encode(row["text"], add_special=False, parse_special=False)
        assert prefix + ids == row["ids"], row["text"]
        assert tokenizer.special_ids.isdisjoint(set(ids) - {0})
        assert tokenizer.decode(ids) == row["decoded"]
        whole = tokenizer.encode(row["text"], add_special=True, parse_special=False)
        assert whole == [*tokenizer.prefix_ids, *ids]
        assert tokenizer.encode_for_embedding(row["text"]) == whole


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_chatglm_never_looks_for_control_tokens(load: Load, family: str) -> None:
    # "sop" and "eop" are parts of words
    tokenizer = load(family).tokenizer
    for row in golden_rows(f"{family}/text_to_ids"):
        ids = tokenizer.encode(row["text"], add_special=True, parse_special=True)
        assert ids == [64790, 64792, *row["ids"]]


@pytest.mark.parametrize(
    ("family", "legacy"), [("llama2", "nonlegacy"), ("llama2-legacy", "legacy")]
)
def test_control_tokens_in_llama_texts(load: Load, family: str, legacy: str) -> None:
    tokenizer = load(family).tokenizer
    parsed = 0
    for row in golden_rows("llama2/text_to_ids"):
        expected = row.get(f"ids_specials_parsed_{legacy}", row["ids"])
        parsed += expected != row["ids"]
        ids = tokenizer.encode(row["text"], add_special=False, parse_special=True)
        assert [1, *ids] == expected, row["text"]
    assert parsed == 6


def test_facts(load: Load) -> None:
    facts = {
        family: (t.vocab_size, t.bos_id, t.prefix_ids, t.eos_ids, t.strips_space)
        for family in FAMILIES
        for t in [load(family).tokenizer]
    }
    assert facts == {
        "chatglm2": (64794, 1, (64790, 64792), (2,), True),
        "chatglm3": (64798, 1, (64790, 64792), (2, 64795, 64797), True),
        "glm4": (151343, None, (151331, 151333), (151329, 151336, 151338), False),
        "llama2": (32000, 1, (1,), (2,), True),
    }


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3", "llama2"])
def test_ids_to_text(load: Load, family: str) -> None:
    tokenizer = load(family).tokenizer
    for row in golden_rows(f"{family}/ids_to_text"):
        ids = row["ids"]
        if family == "chatglm3":  # its program shows the appended ones only, and cannot hide them
            ids = [token for token in ids if token > 2]
            assert tokenizer.decode(ids, skip_special=False) == row["text"], row
        else:
            assert tokenizer.decode(ids) == row["text_skip_special_tokens"], row
        if family == "llama2":
            assert tokenizer.decode(ids, skip_special=False) == row["text"], row


@pytest.mark.parametrize("family", ["chatglm2", "llama2"])
def test_streaming(load: Load, family: str) -> None:
    tokenizer = load(family).tokenizer
    for row in golden_rows(f"{family}/streaming"):
        detokenizer = Detokenizer(
            tokenizer.pieces(),
            strip_space=tokenizer.strips_space,
            errors=tokenizer.decode_errors,
        )
        deltas = [detokenizer.push([token]) for token in row["ids"]]
        text = "".join(deltas) + detokenizer.flush()
        assert text == tokenizer.decode(row["ids"])
        if "�" not in text:
            assert deltas == row["deltas"]
        # the reference holds back whatever ends in U+FFFD, and never sends the last of it
        assert text.rstrip("�") == "".join(row["deltas"]).rstrip("�")


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_without_a_piece_are_no_text(load: Load, family: str) -> None:
    # zai-org/ChatGLM3#202
    tokenizer = load(family).tokenizer
    beyond = [tokenizer.vocab_size, 64988 if family.startswith("chatglm") else 151551]
    assert tokenizer.decode(beyond) == ""
    assert [tokenizer.token_text(token) for token in beyond] == ["", ""]
    assert Detokenizer(tokenizer.pieces()).push(beyond) == ""


PARTS = [
    "</s>",
    "<s>",
    "<unk>",
    "<|user|>",
    "[gMASK]",
    "sop",
    "<sop>",
    "[Round 1]\n\n问：",
    "▁",
    "\0",
]
typed = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=8)), max_size=6).map("".join)


@pytest.mark.parametrize("family", [*FAMILIES, "llama2-legacy"])
@given(text=typed)
def test_typed_text_never_holds_control_tokens(load: Load, family: str, text: str) -> None:
    tokenizer = load(family).tokenizer
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    # sentencepiece cannot tell its mark of a space from a space
    assert tokenizer.decode(ids) == (text if family == "glm4" else text.replace("▁", " "))


@pytest.mark.parametrize("family", FAMILIES)
@given(texts=st.lists(typed.filter(bool), min_size=1, max_size=2))
def test_messages_never_hold_control_tokens(load: Load, family: str, texts: list[str]) -> None:
    model = load(family)
    assert model.template is not None

    def control(texts: list[str]) -> list[int]:
        messages: list[dict[str, Any]] = []
        for text in texts:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        assert model.template is not None
        messages.append({"role": "user", "content": texts[0]})
        ids = model.template.render_tokens(messages, None, True, False, {}, model.tokenizer)
        return [token for token in ids if token in model.tokenizer.special_ids]

    assert control(texts) == control(["a"] * len(texts))
