"""The vocabulary that engines are told: every id in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.protocol import unpack_tokens
from router.text.model import load_text
from router.text.served import ModelTable, ServedModel
from router.text.wire_vocabulary import vocabulary_of, wire_vocabulary
from tests.grammars import byte_vocabulary
from tools.tiny_model import EOS_ID, IM_END_ID, VOCAB_SIZE, write_tiny_model


def test_of_bytes(tmp_path: Path) -> None:
    tokenizer = load_text(write_tiny_model(tmp_path)).tokenizer
    told = wire_vocabulary(tokenizer, VOCAB_SIZE, 7)
    assert told.epoch == 7
    assert (told.lengths, told.pieces) == (byte_vocabulary().lengths, byte_vocabulary().pieces)
    assert told.special == tuple(sorted(tokenizer.special_ids))
    assert set(told.eos) == {EOS_ID, IM_END_ID}


def test_ids_without_text_and_ids_without_a_place(tmp_path: Path) -> None:
    tokenizer = load_text(write_tiny_model(tmp_path)).tokenizer
    padded = wire_vocabulary(tokenizer, VOCAB_SIZE + 48, 1)
    lengths = unpack_tokens(padded.lengths)
    assert len(lengths) == VOCAB_SIZE + 48
    assert lengths[VOCAB_SIZE:] == [0] * 48
    cut = wire_vocabulary(tokenizer, 4, 1)
    assert unpack_tokens(cut.lengths) == lengths[:4]
    assert len(cut.pieces) == sum(lengths[:4])
    assert cut.eos == (EOS_ID,)
    assert all(token < 4 for token in cut.special)


def test_of_a_model_by_its_key(tmp_path: Path) -> None:
    text = load_text(write_tiny_model(tmp_path))
    model = ServedModel(("m", "alias"), text.tokenizer, text.template, 100, 0)
    ask = vocabulary_of(ModelTable([model]))
    assert ask("m", VOCAB_SIZE, 3) == wire_vocabulary(text.tokenizer, VOCAB_SIZE, 3)
    with pytest.raises(KeyError):
        ask("alias", VOCAB_SIZE, 3)


def test_a_model_that_was_exchanged_keeps_its_key_until_it_is_forgotten(tmp_path: Path) -> None:
    text = load_text(write_tiny_model(tmp_path))
    old = ServedModel(("m", "alias"), text.tokenizer, text.template, 100, 0)
    new = ServedModel(("m",), text.tokenizer, text.template, 200, 0, version=2)
    table = ModelTable([old])
    table.show([new])
    assert (table.names, table.find("m")) == (("m",), new)
    assert (table.of_key(old.key), table.of_key(new.key)) == (old, new)
    table.forget(old.key)
    with pytest.raises(KeyError):
        table.of_key(old.key)
