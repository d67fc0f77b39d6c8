"""What one engine process is told at start: frozen, resolved by the router, read once.

The router writes it as one line of JSON to the engine's standard input and keeps that pipe open:
end-of-file on it later means that the router is gone.
"""

from __future__ import annotations

from typing import Literal

import msgspec

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantName = Literal["none", "int8", "fp8", "nf4", "bnb-int8"]
LoadFormat = Literal["auto", "dummy"]
RopeRule = Literal["auto", "base", "linear"]


class ModelError(Exception):
    """The model or its settings cannot be used: the text is one sentence for the operator."""


class NotEnoughMemory(Exception):
    """Weights or KV cache do not fit: the text gives the numbers."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine's orders. Zero means "decide from the model and the device" where allowed.

    Raises (on decode) msgspec.ValidationError, naming the field.
    """

    endpoint: str  # ipc:// address of the router's ROUTER socket
    replica: int  # which replica of the router this is
    epoch: int  # counts the starts of this replica; stale messages are told apart by it
    model: str  # a folder or a .gguf file; for --load-format dummy a folder with config.json
    device: str = "cpu"  # "cpu" or "cuda:0" (the only device it can see)
    threads: int = 1  # CPU threads for compute
    dtype: DTypeName = "auto"
    quant: QuantName = "none"
    load_format: LoadFormat = "auto"
    max_len: int = 0  # tokens per sequence, 0 = the model's own limit
    block_size: int = 32  # tokens per KV block
    num_blocks: int = 0  # KV blocks, 0 = from kv_bytes
    kv_bytes: int = 0  # memory for the KV cache, 0 = decide
    max_batch: int = 64  # sequences running at once
    step_tokens: int = 512  # token budget of one step, decode rows included
    mixed_tokens: int = 0  # the same for a step in which sequences decode, 0 = step_tokens
    prefix_cache: bool = True
    overlap: int = 0  # steps the host may run ahead: 0 or 1
    text_ids: int = 0  # ids from here on have no text and are never sampled; 0 = all have one
    rope_rule: RopeRule = "auto"  # what ChatGLM's rope_ratio means; auto = decide from the model

    @property
    def identity(self) -> bytes:
        """The socket identity under which this engine speaks."""
        return f"engine-{self.replica}-{self.epoch}".encode()


def encode_config(config: EngineConfig) -> bytes:
    """One line of JSON, newline included."""
    return msgspec.json.encode(config) + b"\n"


def decode_config(line: bytes) -> EngineConfig:
    """Inverse of `encode_config`. Raises msgspec.ValidationError or msgspec.DecodeError."""
    return msgspec.json.decode(line, type=EngineConfig)
