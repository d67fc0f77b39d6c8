"""Tokenizers of any size for made-up models, in the files that released models have.

Owns the sentences that the small ones are made of. Must not know weights. Each is small but whole:
every text can be encoded. Larger ones are filled with made-up words of two to four letters, so that
a model of random weights writes text.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import string
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tools import tiny_model

Files = dict[str, bytes]
Ids = dict[str, int | list[int]]

GLM_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM4_SPECIALS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "Hello! How are you today? I am fine, thank you.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "def add(a, b):\n    return a + b",
    "[Round 1]\n\n问：你好\n\n答：你好，我是人工智能助手。",
    "今天天气怎么样？今天天气很好。",
    "0123456789 (2023) + - * / = % & @ # $ ; : < > _ ~ ' \" ` ^ { } | \\ X Z K V J Y",
)
_PIECES, _RANKS = 384, 320  # of the small ones
# As later releases of ChatGLM3 carry it. It shows the form, and cannot make the control ids.
_GLM3_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|> \n "
    "{{ message['content'] }}{% else %}<|{{ message['role'] }}|> \n {{ message['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class MadeTokenizer(NamedTuple):
    """`size` counts the ids that mean something; `ids` are config.json's keys for them."""

    files: Files
    size: int
    ids: Ids


Maker = Callable[[int, int], MadeTokenizer]  # (least number of pieces, longest context)


def byte_level(size: int, max_len: int) -> MadeTokenizer:
    """tokenizer.json of `tools.tiny_model`: one token per byte, ChatML as chat template."""
    made = tiny_model.tokenizer_json()
    vocabulary: dict[str, int] = made["model"]["vocab"]
    if size > len(vocabulary):  # words are cut apart first: a long text as one would take ages
        made["pre_tokenizer"] = {**made["pre_tokenizer"], "use_regex": True}
    for left, right in itertools.islice(_words("Ġ"), max(0, size - len(vocabulary))):
        vocabulary[left + right] = len(vocabulary)
        made["model"]["merges"].append(f"{left} {right}")
    settings = tiny_model.tokenizer_config_json(tiny_model.TinySpec(max_len=max_len))
    files = {
        "tokenizer.json": as_json(made),
        "tokenizer_config.json": as_json(settings),
        "generation_config.json": as_json(tiny_model.generation_config_json()),
    }
    ids: Ids = {
        "bos_token_id": tiny_model.BOS_ID,
        "eos_token_id": tiny_model.EOS_ID,
        "pad_token_id": tiny_model.PAD_ID,
    }
    return MadeTokenizer(files, len(vocabulary), ids)


def llama2(size: int, max_len: int) -> MadeTokenizer:
    """A sentencepiece tokenizer.model, as vicuna and Llama 2 have it; no chat template."""
    model, count = _sentencepiece(size)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": max_len,
        "tokenizer_class": "LlamaTokenizer",
        **{name: tiny_model.added_token(text) for name, text in names.items()},
    }
    ids: Ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    files = {
        "tokenizer.model": model,
        "tokenizer_config.json": as_json(settings),
        "special_tokens_map.json": as_json(names),
        "generation_config.json": as_json(ids),
    }
    return MadeTokenizer(files, count, ids)


def chatglm2(size: int, _max_len: int) -> MadeTokenizer:
    """A sentencepiece tokenizer.model; the control tokens are not in it but behind it."""
    return _chatglm(size, "THUDM/chatglm2-6b", GLM_SPECIALS, {})


def chatglm3(size: int, _max_len: int) -> MadeTokenizer:
    """The same file; four more control tokens, and a name by which it is told apart."""
    specials = (*GLM_SPECIALS, *ROLES)
    return _chatglm(size, "THUDM/chatglm3-6b", specials, {"chat_template": _GLM3_TEMPLATE})


def glm4(size: int, max_len: int) -> MadeTokenizer:
    """tokenizer.model with tiktoken ranks; the control tokens are not in it but behind it."""
    pieces = [bytes((byte,)) for byte in range(256)]
    words = itertools.islice(_words(" "), max(size, _RANKS) - len(pieces))
    pieces += [(left + right).encode() for left, right in words]
    lines = [b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)]
    at = {name: len(pieces) + i for i, name in enumerate(GLM4_SPECIALS)}
    settings = {
        "added_tokens_decoder": {str(i): tiny_model.added_token(name) for name, i in at.items()},
        "additional_special_tokens": list(GLM4_SPECIALS),
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": max_len,
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "ChatGLM4Tokenizer",
    }
    ids: Ids = {
        "eos_token_id": [at["<|endoftext|>"], at["<|user|>"], at["<|observation|>"]],
        "pad_token_id": at["<|endoftext|>"],
    }
    files = {
        "tokenizer.model": b"".join(lines),
        "tokenizer_config.json": as_json(settings),
        "generation_config.json": as_json(ids),
    }
    return MadeTokenizer(files, len(pieces) + len(at), ids)


def wordpiece(size: int, max_len: int) -> MadeTokenizer:
    """BERT's tokenizer.json and vocab.txt: lower case, [CLS] in front and [SEP] behind."""
    letters = string.ascii_lowercase + string.digits
    known = [*BERT_SPECIALS, *string.punctuation, *letters, *("##" + letter for letter in letters)]
    text = " ".join(_SENTENCES).lower()
    known += sorted({word for word in text.split() if word.isascii() and word.isalpha()})
    known += sorted({letter for letter in text if not letter.isascii()})
    pieces, more = dict.fromkeys(known), _words("##")
    while len(pieces) < size:
        pieces["".join(next(more))] = None
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    names = {f"{name.strip('[]').lower()}_token": name for name in BERT_SPECIALS}
    settings = {
        "do_lower_case": True,
        **names,
        "tokenizer_class": "BertTokenizer",
        "model_max_length": max_len,
    }
    files = {
        "tokenizer.json": as_json(_wordpiece_json(vocabulary)),
        "vocab.txt": "".join(f"{piece}\n" for piece in vocabulary).encode(),
        "tokenizer_config.json": as_json(settings),
        "special_tokens_map.json": as_json(names),
    }
    return MadeTokenizer(files, len(vocabulary), {"pad_token_id": 0})


def as_json(content: object) -> bytes:
    """The bytes of a small JSON file."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _wordpiece_json(vocabulary: dict[str, int]) -> dict[str, Any]:
    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    framed = [special("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, special("[SEP]")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i} | tiny_model.added_token(name) for i, name in enumerate(BERT_SPECIALS)
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": framed,
            "pair": [*framed, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]}
                for name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


def _chatglm(
    size: int, name: str, specials: tuple[str, ...], more: dict[str, Any]
) -> MadeTokenizer:
    model, count = _sentencepiece(size)
    settings = {
        "name_or_path": name,
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        **more,
    }
    files = {"tokenizer.model": model, "tokenizer_config.json": as_json(settings)}
    return MadeTokenizer(files, count + len(specials), {"eos_token_id": 2, "pad_token_id": 0})


def _sentencepiece(size: int) -> tuple[bytes, int]:
    """A byte pair model as ChatGLM's and Llama's are, and its number of pieces (at least 384)."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=made,
        model_type="bpe",
        vocab_size=_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    model = made.getvalue()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    known = set(processor.id_to_piece(list(range(processor.get_piece_size()))))
    count, parts = len(known), [model]
    for left, right in _words("▁"):
        if count >= size:
            break
        if left + right not in known:
            parts.append(_piece(left + right, float(-count)))
            count += 1
    return b"".join(parts), count


def _piece(text: str, score: float) -> bytes:
    """One more entry of a sentencepiece model: lists of a protocol buffer go on where it ends.

    Field 1 of ModelProto is a message with the piece (1, text) and its score (2, float).
    """
    inner = b"\x0a%c%s\x15%s" % (len(text.encode()), text.encode(), struct.pack("<f", score))
    return b"\x0a%c%s" % (len(inner), inner)


def _words(space: str) -> Iterator[tuple[str, str]]:
    """Made-up words as pairs of earlier pieces: with `space` in front, or inside of words."""
    letters = string.ascii_lowercase
    yield from ((space, letter) for letter in letters)
    pairs = [(a, b) for a in letters for b in letters]
    yield from pairs
    yield from ((space + a, b + c) for a in letters for b, c in pairs)
    yield from ((a + b, c + d) for a, b in pairs for c, d in pairs)
