"""Weight files for the router: `engine.weight_files`, its error as an exit of the command."""

from __future__ import annotations

from pathlib import Path

from engine.weight_files import WeightFilesError, find_weight_files
from router.errors import EXIT_CONFIG, StartError


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder, or else its PyTorch .bin files; () if it has none.

    Raises `StartError` if an index is unreadable, points outside the folder or to a missing file.
    """
    try:
        return find_weight_files(folder).files
    except WeightFilesError as error:
        raise StartError(str(error), EXIT_CONFIG) from error
