"""Chat formats that come with the router, for models that ship no template or a wrong one.

Owns their texts. Must not know files, or which model gets which (that is `router.text.model`). Most
are short jinja templates; ChatGLM3 and GLM-4 encode every part of a prompt on its own
(`router.text.role_format`).

Checked against the programs of the models' authors: tests/golden/tokenizer-*. Where those take a
conversation for another one (two turns of one role in a row, an answer first, empty turns), it is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from router.errors import EXIT_CONFIG, StartError
from router.text.glm import ROLE_NAMES
from router.text.role_format import RoleFormat
from router.text.template import ChatTemplate
from router.text.tokenizer import Tokenizer
from router.text.tool_text import Message


class ChatFormat(Protocol):
    """How a model wants a conversation written."""

    @property
    def opens_line(self) -> bool:
        """Answers begin with a line break that ends the line of the role: not part of the text."""
        ...

    @property
    def tool_parser(self) -> str:
        """The form in which the model was taught to write calls: a name in `TOOL_FORMS`."""
        ...

    @property
    def reasoning_parser(self) -> str:
        """How the model marks its thinking: a name in `THINKING_TAGS`, "" if it does not think."""
        ...

    def render_tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        add_generation_prompt: bool,
        continue_final: bool,
        kwargs: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> list[int]:
        """As `ChatTemplate.render_tokens`."""
        ...


# Sets `system` and `turns`: user and assistant by turns, the user first and, where an answer is to
# come, last.
_TURNS: Final = """
{%- set has_system = messages[0].role == 'system' -%}
{%- set system = messages[0].content if has_system else '' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- for m in turns -%}
    {%- set place = 'messages[' ~ (loop.index0 + has_system|int) ~ ']' -%}
    {%- set wanted = 'assistant' if loop.index0 % 2 else 'user' -%}
    {%- if m.role != wanted -%}
        {{- raise_exception(place ~ ' is of role ' ~ m.role ~ ', not ' ~ wanted) -}}
    {%- elif not m.content and not (empty_is_text or m.role == 'assistant' and loop.last) -%}
        {{- raise_exception(place ~ ' has no text') -}}
    {%- endif -%}
{%- endfor -%}
{%- if not turns or add_generation_prompt and turns|length % 2 == 0 -%}
    {{- raise_exception('the last message must be of role user') -}}
{%- endif -%}
"""

_CHATGLM2: Final = (
    """
{%- set empty_is_text = true -%}
"""
    + _TURNS
    + """
{%- for m in turns -%}
    {%- if m.role == 'user' -%}
        {{- '\\n\\n' if not loop.first }}[Round {{ loop.index0 // 2 + 1 }}]

问：{{ system if loop.revindex0 < 2 }}{{ m.content }}

答：
    {%- else -%}
        {{- m.content -}}
    {%- endif -%}
{%- endfor -%}
"""
)

_VICUNA: Final = (
    _TURNS
    + """
{%- if not has_system -%}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. The "
        ~ "assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- endif -%}
{{- system }}
{%- for m in turns -%}
    {%- if m.role == 'user' -%}
        {{- ' ' if loop.first }}USER: {{ m.content }} ASSISTANT:
    {%- else -%}
        {{- ' ' ~ m.content ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)

_LLAMA2: Final = (
    _TURNS
    + """
{%- for m in turns -%}
    {%- if m.role == 'user' -%}
        {{- ('' if loop.first else bos_token) ~ '[INST] ' -}}
        {{- '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if loop.first and system -}}
        {{- m.content ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ m.content ~ ' ' ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)

_MISTRAL: Final = (
    _TURNS
    + """
{{- bos_token -}}
{%- for m in turns -%}
    {%- if m.role == 'user' -%}
        {{- '[INST] ' ~ (system ~ '\\n\\n' if loop.first and system) ~ m.content ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ m.content ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)

_CHATML: Final = """
{%- for m in messages -%}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""

_LLAMA3: Final = """
{{- bos_token -}}
{%- for m in messages -%}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content ~ '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt -}}
"""

_GEMMA: Final = (
    _TURNS
    + """
{{- bos_token -}}
{%- for m in turns -%}
    {{- '<start_of_turn>' ~ ('user' if m.role == 'user' else 'model') ~ '\\n' -}}
    {{- system ~ '\\n\\n' if loop.first and system -}}
    {{- m.content ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\\n' if add_generation_prompt -}}
"""
)

_PHI3: Final = """
{%- for m in messages -%}
    {{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt -}}
"""

_ZEPHYR: Final = """
{%- for m in messages -%}
    {{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ eos_token ~ '\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt -}}
"""


@dataclass(frozen=True, slots=True)
class _Known:
    """A format's template, the control tokens that it needs, and those of them that end a turn."""

    source: str
    needs: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


_TEMPLATES: Final[dict[str, _Known]] = {
    "chatglm2": _Known(_CHATGLM2),
    "vicuna_v1.1": _Known(_VICUNA),
    "llama-2": _Known(_LLAMA2),
    "mistral": _Known(_MISTRAL),
    "chatml": _Known(_CHATML, ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",)),
    "llama-3": _Known(
        _LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("<|eot_id|>",)
    ),
    "gemma": _Known(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>",)),
    "phi-3": _Known(_PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",)),
    "zephyr": _Known(_ZEPHYR),
}
_ROLE_FORMATS: Final = {
    "chatglm3": RoleFormat("chatglm3"),
    "glm-4": RoleFormat("glm-4"),
}

FORMATS: Final = (*_TEMPLATES, *_ROLE_FORMATS)


def make_format(name: str, ids: Mapping[str, int]) -> tuple[ChatFormat, tuple[int, ...]]:
    """A format by name, and the ids that end a turn in it; `ids` are the model's control tokens.

    Raises `StartError`: no such format, or control tokens that the vocabulary has not.
    """
    if name not in FORMATS:
        raise StartError(
            f"--chat-format '{name}' is not known; known are {', '.join(FORMATS)}", EXIT_CONFIG
        )
    known = _TEMPLATES.get(name)
    needs = ROLE_NAMES if known is None else known.needs
    missing = [token for token in needs if token not in ids]
    if missing:
        raise StartError(
            f"--chat-format {name} needs the control token {missing[0]}, which the model's "
            "vocabulary has not: take the format that the model was trained with",
            EXIT_CONFIG,
        )
    if known is None:
        return _ROLE_FORMATS[name], ()
    return ChatTemplate(known.source), tuple(ids[token] for token in known.ends)
