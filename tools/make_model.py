"""Write a model folder of made-up weights: small and whole, or of a released model's shape.

usage: python tools/make_model.py DIR --family FAMILY [--seed N] [--dtype TYPE] [sizes]
       python tools/make_model.py DIR --shape NAME
       python tools/make_model.py --list

--family: a folder as checkpoints of that family come (config.json with their keys, weights under
their names, a small tokenizer that takes any text, a chat template if they have one). The same
arguments always give the same bytes.
--shape: config.json with the sizes of a released model and a tokenizer with as many entries, no
weights: to be served with --load-format dummy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.make_families import FAMILIES, Sizes, config_json
from tools.make_shapes import SHAPES
from tools.make_tokenizers import Files, as_json
from tools.make_weights import DTYPES, save_weights, weights

_ROWS = 64  # the rows of an embedding are a multiple of this, so some may stand for nothing
_POOLING: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
        {
            "idx": 2,
            "name": "2",
            "path": "2_Normalize",
            "type": "sentence_transformers.models.Normalize",
        },
    ],
    "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
    "1_Pooling/config.json": {
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    },
}


def make_model(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    **sizes: int,
) -> Path:
    """Writes a small model into `folder` (made if needed) and returns it.

    `sizes` are fields of `Sizes`. Needs numpy, some tokenizers sentencepiece.
    """
    kind = FAMILIES[family]
    chosen = replace(kind.sizes, **sizes)
    made = kind.tokenizer(chosen.vocab, chosen.max_len)
    rows = -(-made.size // _ROWS) * _ROWS if _is_padded(family) else made.size
    chosen = replace(chosen, vocab=max(rows, chosen.vocab))
    config = config_json(kind, chosen, kind.tiny, {"torch_dtype": dtype, **made.ids})
    _write(folder, {**made.files, **_more_files(family, config)})
    save_weights(folder / "model.safetensors", weights(kind, config), f"{family} {seed}", dtype)
    return folder


def make_shape(folder: Path, name: str) -> Path:
    """Writes config.json and tokenizer of a released model's shape, and returns the folder."""
    shape = SHAPES[name]
    kind, sizes = FAMILIES[shape.family], shape.sizes
    made = kind.tokenizer(shape.pieces or sizes.vocab, sizes.max_len)
    config = config_json(kind, sizes, shape.changes, {"torch_dtype": shape.dtype, **made.ids})
    return _write(folder, {**made.files, **_more_files(shape.family, config)})


def _is_padded(family: str) -> bool:
    """ChatGLM's embeddings have more rows than its vocabulary has entries."""
    return FAMILIES[family].architecture == "ChatGLMModel"


def _more_files(family: str, config: Mapping[str, Any]) -> Files:
    contents: dict[str, Any] = {"config.json": config}
    if family == "bert":
        contents |= _POOLING
        size = {"word_embedding_dimension": config["hidden_size"]}
        contents["1_Pooling/config.json"] = {**size, **_POOLING["1_Pooling/config.json"]}
    return {name: as_json(value) for name, value in contents.items()}


def _write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def main(words: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="make_model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR")
    parser.add_argument("--family", choices=FAMILIES, metavar="FAMILY", help="of a small model")
    parser.add_argument("--shape", choices=SHAPES, metavar="NAME", help="of a released model")
    parser.add_argument("--list", action="store_true", help="print both lists of names")
    parser.add_argument("--seed", type=int, default=0, help="another model (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="%(default)s")
    for size in fields(Sizes):
        option = "--" + size.name.replace("_", "-")
        parser.add_argument(option, type=int, metavar="N", help=f"{size.default} or the family's")
    options = parser.parse_args(words)
    if options.list:
        print("families:", *FAMILIES)
        print("shapes:", *SHAPES)
        return 0
    if options.folder is None or (options.family is None) == (options.shape is None):
        parser.error("give DIR and one of --family and --shape, or --list")
    if options.shape:
        print(make_shape(options.folder, options.shape))
        return 0
    given = {size.name: getattr(options, size.name) for size in fields(Sizes)}
    sizes = {name: value for name, value in given.items() if value is not None}
    made = make_model(
        options.folder, options.family, seed=options.seed, dtype=options.dtype, **sizes
    )
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
