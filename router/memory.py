"""Does it fit? A plan from shapes and sizes alone, before any engine starts.

Owns the arithmetic. Must not know processes or sockets; weights are never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.config import DTypeName, QuantName
from router.checkpoint.facts import Checkpoint
from router.errors import EXIT_CONFIG, EXIT_NO_MEMORY, StartError

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB

ENGINE_BYTES: Final = 512 * MIB  # interpreter, torch and buffers of one engine process
DEFAULT_CONTEXT: Final = 2048  # tokens per running sequence that the default KV cache has room for
MAX_DEFAULT_KV_BYTES: Final = 4 * GIB
DEFAULT_KV_SHARE: Final = 0.25  # of what weights leave of an engine's share of the device
GPU_KV_SHARE: Final = 0.85  # the rest is for activations and captured graphs
MIN_USEFUL_LEN: Final = 256  # shorter contexts are no advice

_BYTES_OF_DTYPE: Final[dict[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bits of one weight of a quantized layer; 8 bits have a scale per row besides, 4 bits included it.
_BITS_OF_QUANT: Final[dict[str, float]] = {"int8": 8, "fp8": 8, "nf4": 4.5, "bnb-int8": 8}
_SCALE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Demand:
    """One engine to be planned for. Zero means "decide", as in EngineConfig."""

    name: str
    checkpoint: Checkpoint
    device: str = "cpu"
    dtype: DTypeName = "auto"
    quant: QuantName = "none"
    max_len: int = 0
    max_batch: int = 64
    block_size: int = 32
    num_blocks: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What one engine will need. `num_blocks` is 0 where the engine itself must decide."""

    name: str
    device: str
    dtype: str
    max_len: int
    weights_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    num_blocks: int

    @property
    def total_bytes(self) -> int:
        """Weights, KV cache and the process itself."""
        return self.weights_bytes + self.kv_bytes + ENGINE_BYTES


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All engines, and the free memory of the devices that are known."""

    engines: tuple[EnginePlan, ...]
    free_bytes: Mapping[str, int]

    def needed_bytes(self, device: str) -> int:
        """Of all engines there together."""
        return sum(engine.total_bytes for engine in self.engines if engine.device == device)


def plan(demands: Sequence[Demand], free_bytes: Mapping[str, int]) -> MemoryPlan:
    """Decides the size of each KV cache and checks that all engines fit.

    `free_bytes` tells the memory of each device that is known ("cpu"); on others the engine decides
    for itself. Raises `StartError` 75 with the numbers and a way out, 78 for an impossible length.
    """
    sharing = Counter(demand.device for demand in demands)
    shares = {device: free // max(1, sharing[device]) for device, free in free_bytes.items()}
    engines = tuple(_plan_engine(demand, shares.get(demand.device)) for demand in demands)
    result = MemoryPlan(engines, dict(free_bytes))
    for device, free in free_bytes.items():
        if result.needed_bytes(device) > free:
            raise StartError(_refusal(result, device, demands), EXIT_NO_MEMORY)
    return result


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Main memory that this process may still take: the machine's and its control groups' limits.

    Reads /proc and /sys below `root`; 0 if the system does not tell.
    """
    limits = [_available_bytes(root / "proc/meminfo")]
    limits += [_group_room(folder) for folder in _group_folders(root)]
    return max(0, min((limit for limit in limits if limit is not None), default=0))


def resolved_dtype(dtype: DTypeName, device: str) -> str:
    """What "auto" means: float32 on a CPU, 16 bits on a GPU (which 16 bits, the engine knows)."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def _plan_engine(demand: Demand, share: int | None) -> EnginePlan:
    """`share` is the engine's part of its device's free memory, None where that is not known."""
    facts = demand.checkpoint.facts
    dtype = resolved_dtype(demand.dtype, demand.device)
    per_token = facts.kv_values_per_token * _BYTES_OF_DTYPE[dtype]
    block_bytes = per_token * demand.block_size
    max_len = demand.max_len or facts.context_length or DEFAULT_CONTEXT
    if facts.encoder:  # an option meant for the models beside it
        max_len = min(max_len, facts.context_length or max_len)
    if facts.context_length and max_len > facts.context_length:
        raise StartError(
            f"--max-len {max_len} is more than {demand.name} was made for: "
            f"{facts.context_length} tokens",
            EXIT_CONFIG,
        )
    weights = _weights_bytes(demand, dtype)
    blocks = 0 if facts.encoder else demand.num_blocks
    kv_bytes = 0 if facts.encoder else blocks * block_bytes or demand.kv_bytes
    if share is not None and block_bytes:
        room = share - weights - ENGINE_BYTES
        kv_bytes = kv_bytes or _default_kv_bytes(demand, max_len, per_token, room)
        blocks = kv_bytes // block_bytes
        max_len = _held_len(demand, max_len, blocks)
        kv_bytes = blocks * block_bytes
    return EnginePlan(
        demand.name, demand.device, dtype, max_len, weights, per_token, kv_bytes, blocks
    )


def _weights_bytes(demand: Demand, dtype: str) -> int:
    """As held by the engine: GGUF and 16-bit files are converted to `dtype`.

    The embedding is never quantized, the output layer always to 8 bits. A tied one is a copy then,
    and a CPU has it in a layout of its own in any case.
    """
    facts, size = demand.checkpoint.facts, _BYTES_OF_DTYPE[dtype]
    parameters = demand.checkpoint.num_parameters or facts.num_parameters
    embedding = min(parameters, facts.vocab_size * facts.hidden_size)
    head = 0 if facts.encoder else embedding
    if demand.quant == "none":
        copied = head if facts.tied and demand.device == "cpu" else 0
        return (parameters + copied) * size
    layers = max(0, parameters - embedding - (0 if facts.tied else head))
    scale_bytes = (layers + head) * _SCALE_BYTES // max(1, facts.hidden_size)
    layers_bytes = int(layers * _BITS_OF_QUANT[demand.quant] / 8)
    return embedding * size + layers_bytes + head + scale_bytes


def _default_kv_bytes(demand: Demand, max_len: int, per_token: int, room: int) -> int:
    """For `max_batch` sequences of ordinary length, within bounds; one long sequence if it can.

    A GPU is there for nothing else, so the cache gets most of what the weights leave.
    """
    if demand.device != "cpu":
        return max(0, int(room * GPU_KV_SHARE))
    block = demand.block_size
    ordinary = -(-min(max_len, DEFAULT_CONTEXT) // block) * block * per_token
    longest = -(-max_len // block) * block * per_token
    wished = min(ordinary * demand.max_batch, int(room * DEFAULT_KV_SHARE), MAX_DEFAULT_KV_BYTES)
    if demand.max_len or longest <= room // 2:
        return max(wished, longest)
    return max(wished, ordinary)


def _held_len(demand: Demand, max_len: int, blocks: int) -> int:
    """The longest sequence that the cache holds; shorter than the model's own only if unasked."""
    held = blocks * demand.block_size
    if demand.max_len and held < demand.max_len:
        raise StartError(
            f"the KV cache of {demand.name} holds {held} tokens, less than --max-len "
            f"{demand.max_len}: raise --kv-memory or lower --max-len",
            EXIT_NO_MEMORY,
        )
    return min(max_len, held)


def _refusal(result: MemoryPlan, device: str, demands: Sequence[Demand]) -> str:
    engines = [engine for engine in result.engines if engine.device == device]
    free = result.free_bytes[device]
    parts = "; ".join(
        f"{engine.name}: weights {_gb(engine.weights_bytes)}, KV cache {_gb(engine.kv_bytes)}"
        for engine in engines
    )
    total = f"{device} needs {_gb(result.needed_bytes(device))}, {_gb(free)} are free"
    processes = f"and {_gb(ENGINE_BYTES)} for each engine process"
    return f"{total} ({parts}, {processes}): {_way_out(engines, free, demands)}"


def _way_out(engines: Sequence[EnginePlan], free: int, demands: Sequence[Demand]) -> str:
    """The shortest advice that makes it fit."""
    if any(demand.kv_bytes or demand.num_blocks for demand in demands):
        return "ask for a smaller --kv-memory or --kv-blocks, or leave it out"
    spare = free - sum(engine.weights_bytes + ENGINE_BYTES for engine in engines)
    per_token = sum(engine.kv_bytes_per_token for engine in engines)
    block = max(demand.block_size for demand in demands)
    held = spare // per_token // block * block if per_token else 0
    if held >= MIN_USEFUL_LEN:
        return f"it would fit with --max-len {held}"
    if any(engine.dtype == "float32" for engine in engines):
        return "try --dtype bfloat16, fewer engines or a smaller model"
    return "try fewer engines or a smaller model"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _available_bytes(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    kilobytes = sizes.get("MemAvailable", [""])[0]
    return int(kilobytes) * 1024 if kilobytes.isdigit() else None


def _group_folders(root: Path) -> list[Path]:
    """Control groups of this process, innermost first; version 2, then version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    folders: list[Path] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, inner = rest.partition(":")
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            path = top / inner.lstrip("/")
            folders += [path, *(parent for parent in path.parents if parent.is_relative_to(top))]
    return folders


def _group_room(folder: Path) -> int | None:
    """Limit minus use of one control group; pages of files do not count as used."""
    for limit_name, use_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, use = _number(folder / limit_name), _number(folder / use_name)
        if limit is not None and use is not None:
            return limit - use + _inactive_file_bytes(folder / "memory.stat")
    return None


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file or it says "max"."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() else None


def _inactive_file_bytes(stat: Path) -> int:
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return 0
    fields = {name: text for name, _, text in (line.partition(" ") for line in lines)}
    text = fields.get("total_inactive_file", fields.get("inactive_file", "0"))
    return int(text) if text.isdigit() else 0
