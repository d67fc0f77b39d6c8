"""Cases of the kind tools: calls, and histories that hold them."""

from __future__ import annotations

from typing import Any

from tests.cases.asking import Scripted, body, prompt_ids, templated, user
from tests.router_parts import chat, text_play
from tools.tiny_model import decode_tokens

OK = text_play("ok")
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add_up", "arguments": '{"a": 3, "b": 4}'},
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "seven"}
# a template of the kind that walks over a call's arguments
WALKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}]"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def history(**assistant: Any) -> list[Any]:
    """A user, an assistant that called a function, and its result."""
    return [user("3 + 4?"), {"role": "assistant", "tool_calls": [CALL], **assistant}, RESULT]


async def test_case_082_null_content_beside_calls(engine: Scripted) -> None:
    async with engine(OK) as router:
        assert (await chat(router.app, messages=history(content=None))).status == 200


async def test_case_083_no_content_beside_calls(engine: Scripted) -> None:
    async with engine(OK) as router:
        null = body(await chat(router.app, messages=history(content=None)))
        without = body(await chat(router.app, messages=history()))
        first, second = router.engines.submits
    assert first.tokens == second.tokens
    assert null["usage"] == without["usage"]


async def test_case_084_the_call_and_its_result_are_in_the_prompt(
    engine: Scripted, tmp_path: Any
) -> None:
    async with engine(OK, folder=templated(tmp_path / "walks", WALKING)) as router:
        prompt = decode_tokens(await prompt_ids(router.app, history(content=None)))
    assert "add_up" in prompt
    assert "seven" in prompt


async def test_case_085_arguments_are_a_mapping(engine: Scripted, tmp_path: Any) -> None:
    async with engine(OK, folder=templated(tmp_path / "walks", WALKING)) as router:
        assert (await chat(router.app, messages=history(content=None))).status == 200
        prompt = decode_tokens(await prompt_ids(router.app, history(content=None)))
    assert "[add_up a=3 b=4]" in prompt
