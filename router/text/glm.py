"""ChatGLM2, ChatGLM3 and GLM-4: which of them a folder holds, and the control tokens of each.

Owns the rule and the names. Must not know how text is encoded. Their vocabulary files hold no
control tokens; the released programs append these names behind the last piece.

The three share architecture "ChatGLMModel" and model_type "chatglm" (which the first release of
ChatGLM2 lacks). GLM-4 has another kind of vocabulary file. ChatGLM2 and ChatGLM3 have the same
tokenizer.model, byte for byte, and the same keys in config.json. They are told apart by, in this
order, what was asked for; role tokens in tokenizer_config.json (later releases of ChatGLM3); the
name written in config.json or tokenizer_config.json ("THUDM/chatglm3-6b"); the names that the model
is served under and lies under. Without any clue it is ChatGLM2, which never had role tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

GlmKind = Literal["chatglm2", "chatglm3", "glm-4"]

ROLE_NAMES: Final = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM_SPECIALS: Final[dict[GlmKind, tuple[str, ...]]] = {
    "chatglm2": ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    "chatglm3": ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_NAMES),
    "glm-4": (
        "<|endoftext|>",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        *ROLE_NAMES,
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
    ),
}
# Every prompt begins with these.
GLM_PREFIX: Final[dict[GlmKind, tuple[str, ...]]] = {
    "chatglm2": ("[gMASK]", "sop"),
    "chatglm3": ("[gMASK]", "sop"),
    "glm-4": ("[gMASK]", "<sop>"),
}
# These end an answer, beside the end token of a sentencepiece model; configs list them in part.
GLM_ENDS: Final[dict[GlmKind, tuple[str, ...]]] = {
    "chatglm2": (),
    "chatglm3": ("<|user|>", "<|observation|>"),
    "glm-4": ("<|endoftext|>", "<|user|>", "<|observation|>"),
}

_IN_NAME: Final = re.compile(r"chat-?glm-?([23])", re.IGNORECASE)


def is_glm(config: Mapping[str, Any]) -> bool:
    """The model is of this family, by its config.json."""
    architectures, auto_map = config.get("architectures"), config.get("auto_map")
    named = [config.get("model_type") == "chatglm"]
    if isinstance(architectures, list):
        named += [str(name).startswith("ChatGLM") for name in architectures]
    if isinstance(auto_map, Mapping):
        named += [".ChatGLM" in str(name) for name in auto_map.values()]
    return any(named)


def glm_kind(
    config: Mapping[str, Any], settings: Mapping[str, Any], names: Iterable[str], asked: str
) -> Literal["chatglm2", "chatglm3"]:
    """ChatGLM2 or ChatGLM3; `settings` is tokenizer_config.json. See the module's docstring."""
    if asked in ("chatglm2", "chatglm3"):
        return "chatglm3" if asked == "chatglm3" else "chatglm2"
    if any(
        "<|user|>" in str(settings.get(key)) for key in ("added_tokens_decoder", "chat_template")
    ):
        return "chatglm3"
    for name in (config.get("_name_or_path"), settings.get("name_or_path"), *names):
        if isinstance(name, str) and (found := _IN_NAME.findall(name)):
            return "chatglm3" if found[-1] == "3" else "chatglm2"
    return "chatglm2"
