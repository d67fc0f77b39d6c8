"""The sizes of released models, for speed measurements without their weights. A table.

Sources: reference configs of the families, as published; what was not known for sure is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tools.make_families import Sizes


@dataclass(frozen=True)
class Shape:
    """`changes` come over the family's keys. `pieces` is what the tokenizer knows, where the model
    has rows beyond it; 0: as many as the model has."""

    family: str
    sizes: Sizes
    dtype: str = "bfloat16"
    changes: Mapping[str, Any] = field(default_factory=dict)
    pieces: int = 0


def _chatglm(family: str, max_len: int, **changes: Any) -> Shape:
    sizes = Sizes(28, 4096, 32, 2, 128, 13696, max_len, 65024)
    return Shape(family, sizes, "float16", changes, 64789)


def _llama2(name: str, layers: int, hidden: int, heads: int, ffn: int) -> Shape:
    sizes = Sizes(layers, hidden, heads, heads, 0, ffn, 4096, 32000)
    return Shape("vicuna", sizes, "float16", {"_name_or_path": name})


_TIED = {"tie_word_embeddings": True}
_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# layers, hidden, heads, kv_heads, head_dim (0: hidden / heads), intermediate, max_len, vocab
SHAPES: dict[str, Shape] = {
    "chatglm2-6b": _chatglm("chatglm2", 32768),
    "chatglm2-6b-32k": _chatglm("chatglm2", 32768, rope_ratio=16),
    "chatglm3-6b": _chatglm("chatglm3", 8192),
    "chatglm3-6b-32k": _chatglm("chatglm3", 32768, rope_ratio=50),
    "glm-4-9b": Shape("glm4-9b", Sizes(40, 4096, 32, 2, 128, 13696, 131072, 151552), pieces=151329),
    "glm-4-9b-0414": Shape("glm4", Sizes(40, 4096, 32, 2, 128, 13696, 32768, 151552)),
    "vicuna-7b": _llama2("lmsys/vicuna-7b-v1.5", 32, 4096, 32, 11008),
    "vicuna-13b": _llama2("lmsys/vicuna-13b-v1.5", 40, 5120, 40, 13824),
    "llama-2-7b": _llama2("meta-llama/Llama-2-7b-chat-hf", 32, 4096, 32, 11008),
    "llama-2-13b": _llama2("meta-llama/Llama-2-13b-chat-hf", 40, 5120, 40, 13824),
    "llama-3-8b": Shape("llama3", Sizes(32, 4096, 32, 8, 0, 14336, 8192, 128256)),
    "llama-3.1-8b": Shape(
        "llama3",
        Sizes(32, 4096, 32, 8, 0, 14336, 131072, 128256),
        changes={"rope_scaling": _LLAMA31},
    ),
    "llama-3.2-1b": Shape(
        "llama3",
        Sizes(16, 2048, 32, 8, 64, 8192, 131072, 128256),
        changes={"rope_scaling": {**_LLAMA31, "factor": 32.0}, **_TIED},
    ),
    "mistral-7b": Shape("mistral", Sizes(32, 4096, 32, 8, 0, 14336, 32768, 32768)),
    "mixtral-8x7b": Shape("mixtral", Sizes(32, 4096, 32, 8, 0, 14336, 32768, 32000)),
    "qwen2.5-0.5b": Shape("qwen2", Sizes(24, 896, 14, 2, 0, 4864, 32768, 151936), changes=_TIED),
    "qwen2.5-7b": Shape("qwen2", Sizes(28, 3584, 28, 4, 0, 18944, 32768, 152064)),
    "qwen3-0.6b": Shape("qwen3", Sizes(28, 1024, 16, 8, 128, 3072, 40960, 151936), changes=_TIED),
    "qwen3-8b": Shape("qwen3", Sizes(36, 4096, 32, 8, 128, 12288, 40960, 151936)),
    "qwen3-30b-a3b": Shape("qwen3_moe", Sizes(48, 2048, 32, 4, 128, 6144, 40960, 151936)),
    "phi-3-mini": Shape(
        "phi3",
        Sizes(32, 3072, 32, 32, 0, 8192, 4096, 32064),
        changes={"original_max_position_embeddings": 4096},
    ),
    "gemma-7b": Shape("gemma", Sizes(28, 3072, 16, 16, 256, 24576, 8192, 256000)),
    "gemma-2-2b": Shape("gemma2", Sizes(26, 2304, 8, 4, 256, 9216, 8192, 256000)),
    "gemma-2-9b": Shape("gemma2", Sizes(42, 3584, 16, 8, 256, 14336, 8192, 256000)),
    "gemma-3-1b": Shape("gemma3", Sizes(26, 1152, 4, 1, 256, 6912, 32768, 262144)),
    "smollm2-135m": Shape(
        "llama",
        Sizes(30, 576, 9, 3, 0, 1536, 8192, 49152),
        changes={"rope_theta": 100000.0, **_TIED},
    ),
    "smollm3-3b": Shape("smollm3", Sizes(36, 2048, 16, 4, 0, 11008, 65536, 128256)),
    "seed-oss-36b": Shape("seed_oss", Sizes(64, 5120, 80, 8, 128, 27648, 524288, 155136)),
    "granite-3-2b": Shape("granite", Sizes(40, 2048, 32, 8, 0, 8192, 4096, 49155)),
    "olmo-2-7b": Shape("olmo2", Sizes(32, 4096, 32, 32, 0, 11008, 4096, 100352)),
    "minilm-l6": Shape("bert", Sizes(6, 384, 12, 12, 0, 1536, 512, 30522), "float32"),
    "bge-small-en": Shape("bert", Sizes(12, 384, 12, 12, 0, 1536, 512, 30522), "float32"),
}
