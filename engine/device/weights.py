"""Model files -> config and tensors by name. The formats are the files beside this one.

Owns nothing. Nothing here runs code from a model folder; what cannot be served is refused before a
weight is read, with the file, the key and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.config import ModelError
from engine.device.dummy_weights import DummySource
from engine.device.gguf_weights import GgufSource
from engine.device.pytorch_weights import PytorchSource
from engine.device.safetensors_weights import SafetensorsSource
from engine.models.registry import TensorSource
from engine.weight_files import WeightFilesError, find_weight_files

_CPU = torch.device("cpu")
_REMEDY = "take the original checkpoint and pass --quant int8 or nf4"


def open_model(
    path: Path, load_format: str, device: torch.device = _CPU
) -> tuple[Mapping[str, Any], TensorSource]:
    """A folder or .gguf file -> (config as in config.json, weights).

    `device` is where random weights ("dummy") are made. Raises `ModelError`.
    """
    if path.suffix == ".gguf":
        source = GgufSource(path)
        return source.config, DummySource(device) if load_format == "dummy" else source
    config = _read_config(path)
    if load_format == "dummy":
        return config, DummySource(device)
    _refuse_packed(path, config)
    return config, _open_folder(path)


def _open_folder(folder: Path) -> TensorSource:
    try:
        found = find_weight_files(folder)
    except WeightFilesError as error:
        raise ModelError(str(error)) from error
    if not found.files:
        _refuse_adapter(folder)
        raise ModelError(f"{folder} has no weights (*.safetensors or pytorch_model*.bin)")
    if found.format == "safetensors":
        return SafetensorsSource(found.files)
    return PytorchSource(found.files)


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        _refuse_adapter(folder)
    return _read_json(path)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ModelError(f"{path} cannot be read as a JSON object: {error}") from error


def _refuse_adapter(folder: Path) -> None:
    path = folder / "adapter_config.json"
    if path.is_file():
        base = _read_json(path).get("base_model_name_or_path")
        raise ModelError(
            f"{path}: the folder is an adapter (LoRA) and no model of its own: merge it into its "
            f"base model {base!r} and serve the merged folder"
        )


def _refuse_packed(folder: Path, config: Mapping[str, Any]) -> None:
    """Weights that were quantized before: their layouts are not ours."""
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, Mapping) else {}):
        found = section.get("quantization_config")
        if found:
            method = found.get("quant_method") if isinstance(found, Mapping) else found
            raise ModelError(
                f"{folder / 'config.json'}: quantization_config.quant_method {method!r} (weights "
                f"that were quantized before) is not supported: {_REMEDY}"
            )
    bits = config.get("quantization_bit")
    if bits:
        raise ModelError(
            f"{folder / 'config.json'}: quantization_bit {bits!r} (packed weights) is not "
            f"supported, 0 is: {_REMEDY}"
        )
