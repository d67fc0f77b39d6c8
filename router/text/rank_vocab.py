"""The vocabulary of a folder whose tokenizer.model holds tiktoken's ranks: GLM-4.

Owns nothing. Must not know chat formats. The file has one piece a line, its bytes in base64 and its
rank, which is its id; control tokens and the expression that splits words are not in it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from router.errors import EXIT_CONFIG, StartError
from router.text.cut_codec import CutCodec, Written
from router.text.glm import GLM_ENDS, GLM_PREFIX, GLM_SPECIALS
from router.text.pre_tokenizers import LLAMA3
from router.text.settings import end_ids, optional_config
from router.text.vocabulary import Vocabulary

_FIRST_LINE: Final = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,9}\r?\n")


def is_rank_file(data: bytes) -> bool:
    """Does it begin like one?"""
    return _FIRST_LINE.match(data) is not None


def load_rank_vocabulary(folder: Path, file: Path, data: bytes) -> Vocabulary:
    """GLM-4's, from the content of `file`. Raises `StartError` naming file and line."""
    import tiktoken

    try:
        pieces = parse_ranks(data)
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        encoding = tiktoken.Encoding(
            "ranks", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={}
        )
    except ValueError as error:
        raise StartError(f"{file} cannot be used: {error}", EXIT_CONFIG) from error
    special = {len(pieces) + i: name for i, name in enumerate(GLM_SPECIALS["glm-4"])}
    ids = {name: token for token, name in special.items()}
    configs = [optional_config(folder / name) for name in ("generation_config.json", "config.json")]
    _check_added(folder, ids)
    return Vocabulary(
        codec=CutCodec(
            lambda text, _starts: encoding.encode_ordinary(text),
            [Written(name, token) for name, token in ids.items()],
        ),
        pieces=(*pieces, *[b""] * len(special)),
        special=special,
        eos_ids=end_ids(
            [ids[name] for name in GLM_ENDS["glm-4"]], configs, len(pieces) + len(special)
        ),
        prefix_ids=tuple(ids[name] for name in GLM_PREFIX["glm-4"]),
    )


def parse_ranks(data: bytes) -> list[bytes]:
    """The pieces in order of their ranks. Raises ValueError naming the line."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        text, _, rank = line.partition(b" ")
        try:
            piece = base64.b64decode(text, validate=True)
        except binascii.Error:
            piece = b""
        if not piece or not rank.isdigit() or len(rank) > 9:
            raise ValueError(f"line {number} is not a piece in base64 and a rank")
        if int(rank) in found:
            raise ValueError(f"line {number} gives rank {int(rank)} a second time")
        found[int(rank)] = piece
    pieces = [found[rank] for rank in sorted(found)]
    if not pieces or max(found) != len(pieces) - 1:
        raise ValueError(f"its {len(pieces):,} ranks are not 0 to {len(pieces) - 1:,}")
    if len(set(pieces)) != len(pieces):
        raise ValueError("a piece appears twice")
    missing = {bytes([byte]) for byte in range(256)}.difference(pieces)
    if missing:
        raise ValueError(f"{len(missing)} of the 256 single bytes are no pieces of it")
    return pieces


def _check_added(folder: Path, ids: Mapping[str, int]) -> None:
    """tokenizer_config.json lists the control tokens as well: they must be the same ones."""
    file = folder / "tokenizer_config.json"
    listed: Any = optional_config(file).get("added_tokens_decoder")
    for token, entry in listed.items() if isinstance(listed, Mapping) else ():
        name = entry.get("content") if isinstance(entry, Mapping) else None
        if str(ids.get(str(name))) != str(token):
            raise StartError(
                f"{file}: added_tokens_decoder has {name!r} as {token}, GLM-4 has "
                f"{ids.get(str(name), 'no such token')}; other models of this kind are not known",
                EXIT_CONFIG,
            )
