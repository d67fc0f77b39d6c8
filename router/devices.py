"""Which devices this machine has, found without torch and without a CUDA context.

Owns the reading of the driver's own tool. Must not know models or engines.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from router.errors import EXIT_UNAVAILABLE, EXIT_USAGE, StartError

QUERY_LIMIT_S = 10.0
NO_DEVICES = ("-1", "none", "void", "NoDevFiles")  # how masks say that there is none


class Card(NamedTuple):
    """One GPU. `number` counts in PCI bus order, as nvidia-smi does."""

    number: str
    uuid: str
    name: str
    free_bytes: int


def find_cards(dev: Path = Path("/dev"), tool: str = "nvidia-smi") -> list[Card]:
    """All GPUs of this machine; costs nothing where there are none.

    Raises StartError 69 where there are some and their driver does not tell: a model must not run
    on the CPU because of that.
    """
    if not (any(dev.glob("nvidia[0-9]*")) or (dev / "dxg").exists()):
        return []
    query = "--query-gpu=index,uuid,name,memory.free"
    try:
        answer = subprocess.run(
            [shutil.which(tool) or tool, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=QUERY_LIMIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        if isinstance(error, subprocess.TimeoutExpired):
            how = f"did not answer within {QUERY_LIMIT_S:g} s"
        elif isinstance(error, subprocess.CalledProcessError):
            how = f"failed with exit code {error.returncode}"
        else:
            how = "cannot be run"
        raise StartError(
            f"this machine has a GPU, but {Path(tool).name} {how}: repair the driver, "
            "or give --gpus cpu",
            EXIT_UNAVAILABLE,
        ) from error
    return parse_cards(answer.stdout)


def parse_cards(text: str) -> list[Card]:
    """Lines of `index, uuid, name, free MiB`; others are skipped."""
    cards: list[Card] = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[0].isdigit():
            free_mib = int(parts[3]) if parts[3].isdigit() else 0
            cards.append(Card(parts[0], parts[1], parts[2], free_mib * 1024 * 1024))
    return cards


def choose_devices(
    asked: tuple[str, ...], cards: list[Card], visible: str | None
) -> tuple[str, ...]:
    """The devices to use: "cpu", or what CUDA_VISIBLE_DEVICES takes.

    Nothing asked: all cards (of `visible`, an inherited CUDA_VISIBLE_DEVICES), else one CPU.
    Raises StartError: 69 for a card that is not there, 64 for one that is named twice.
    """
    if not asked:
        masked = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
        if visible is None or not masked or masked[0] in NO_DEVICES:
            return tuple(card.number for card in cards if visible is None) or ("cpu",)
        _check(masked, cards, "CUDA_VISIBLE_DEVICES")
        return tuple(masked)
    _check(asked, cards, "--gpus")
    return asked


def _check(names: Sequence[str], cards: list[Card], who: str) -> None:
    named: set[str] = set()
    for name in names:
        card = _find(name, cards)
        if name != "cpu" and card is None:
            have = ", ".join(card.number for card in cards) or "none"
            raise StartError(
                f"{who}: there is no GPU '{name}' on this machine (found: {have}); "
                "name one of those, or give --gpus cpu",
                EXIT_UNAVAILABLE,
            )
        if card is not None and card.uuid in named:
            raise StartError(
                f"{who} names one card twice, as '{name}' and by its other name", EXIT_USAGE
            )
        named |= {card.uuid} if card else set()


def cards_by_name(devices: Iterable[str], cards: list[Card]) -> dict[str, Card]:
    """The card that each device means. An engine is told its UUID: indices move when one fails."""
    found = {device: _find(device, cards) for device in devices}
    return {device: card for device, card in found.items() if card is not None}


def free_bytes_of(device: str, cards: list[Card]) -> int:
    """Free memory of a card; 0 if not known."""
    card = _find(device, cards)
    return card.free_bytes if card else 0


def _find(device: str, cards: list[Card]) -> Card | None:
    """By index, or by UUID (a prefix of it is enough, as CUDA takes it). MIG parts are trusted."""
    for card in cards:
        if device == card.number or (len(device) > 4 and card.uuid.startswith(device)):
            return card
    if device.startswith("MIG-") and cards:
        return Card(device, device, "MIG", 0)
    return None


class EngineSizes(NamedTuple):
    """What one engine runs at once: sequences, tokens of a step, and of one with decode rows."""

    max_batch: int
    step_tokens: int
    mixed_tokens: int


def engine_sizes(device: str, max_batch: int = 0, step_tokens: int = 0) -> EngineSizes:
    """The device's own sizes where the arguments are 0.

    Measured on an H100, all linear layers of a 6B model: 128 tokens take 4.9 ms, 256 take 5.5, 512
    take 8.2, 640 take 10.0, 1,024 take 16.6 and 2,048 take 33. A token is cheapest at 640, so that
    is the largest usual step beside decode rows (`engine.policy.StepSizes`).
    """
    if device == "cpu":
        return EngineSizes(max_batch or 64, step_tokens or 512, 0)
    step_tokens = step_tokens or 2048
    return EngineSizes(max_batch or 256, step_tokens, min(640, step_tokens))
