"""The chat formats that come with the router, against the programs of the models' authors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from router.arguments import HELP
from router.errors import EXIT_CONFIG, BadRequest, StartError
from router.text.assembly import ChoiceText, TextRules
from router.text.formats import FORMATS, make_format
from router.text.glm import glm_kind, is_glm
from router.text.model import ModelText, load_text
from router.text.template import ChatTemplate
from tests.text_models import (
    CHATML,
    GLM_CONFIG,
    byte_level,
    golden_rows,
    real_folder,
    write_folder,
)

Message = dict[str, Any]
LLAMA = {"model_type": "llama"}


def render(
    text: ModelText,
    messages: list[Message],
    *,
    prompt: bool = True,
    continues: bool = False,
    tools: list[Message] | None = None,
) -> list[int]:
    assert text.template is not None
    return text.template.render_tokens(messages, tools, prompt, continues, {}, text.tokenizer)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def chatglm(folder: Path, kind: str) -> ModelText:
    config = {**GLM_CONFIG, "_name_or_path": f"THUDM/{kind}-6b", "eos_token_id": 2}
    return load_text(real_folder(folder, "chatglm2-6b", config=config))


def glm4(folder: Path) -> ModelText:
    return load_text(real_folder(folder, "glm-4-9b-chat", config=GLM_CONFIG))


def llama(folder: Path, chat_format: str, *, legacy: bool) -> ModelText:
    settings = {"legacy": legacy, "bos_token": "", "eos_token": ""}  # lm-sys/FastChat#408
    path = real_folder(folder, "llama-2", config=LLAMA, tokenizer_config=settings)
    return load_text(path, chat_format=chat_format)


def test_chatglm2(tmp_path: Path) -> None:
    text = chatglm(tmp_path / "m", "chatglm2")
    rows = golden_rows("chatglm2/chat_prompts")
    for row in rows:
        assert render(text, row["messages"]) == row["ids"], row["prompt"]
        assert text.tokenizer.decode(row["ids"]) == row["prompt"]
    assert len(rows) == 15


def test_chatglm3(tmp_path: Path) -> None:
    text = chatglm(tmp_path / "m", "chatglm3")
    rows = golden_rows("chatglm3/chat_prompts")
    for row in rows:
        messages, tools = as_openai(row["messages"])
        assert render(text, messages, tools=tools) == row["ids"], row["decoded"]
    assert len(rows) == 18


def test_glm4(tmp_path: Path) -> None:
    text = glm4(tmp_path / "m")
    rows = golden_rows("glm4/chat_prompts")
    for row in rows:
        messages, tools = as_openai(row["messages"])
        assert render(text, messages, tools=tools) == row["ids"], row["text"]
    assert len(rows) == 10


def as_openai(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The programs' own messages in OpenAI's terms, and the tools that they hold."""
    tools: list[Message] = []
    result: list[Message] = []
    for message in messages:
        tools += (
            tool if "function" in tool else {"type": "function", "function": tool}
            for tool in message.get("tools", [])
        )
        role, content = message["role"], message["content"]
        if message.get("metadata"):
            code = re.fullmatch(r"```python\ntool_call\((\w+)='(\w+)'\)\n```", content)
            arguments = content if code is None else json.dumps({code[1]: code[2]})
            function = {"name": message["metadata"], "arguments": arguments}
            call = {"id": "c", "type": "function", "function": function}
            result.append({"role": role, "content": None, "tool_calls": [call]})
        elif content or not message.get("tools"):
            role = "tool" if role == "observation" else role
            result.append({"role": role, "content": content, "tool_call_id": "c"})
    return result, tools


# What FastChat makes of these is another conversation than the one that was sent.
QUIRKS = ["empty assistant turn", "two user turns", "assistant first"]


def is_quirk(row: dict[str, Any]) -> bool:
    texts = [message["content"] for message in row["messages"]]
    return texts == [""] or any(quirk in text for quirk in QUIRKS for text in texts)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["vicuna_v1.1", "llama-2"])
def test_vicuna_and_llama2(tmp_path: Path, name: str, legacy: bool) -> None:
    text = llama(tmp_path / "m", name, legacy=legacy)
    assert text.tokenizer.eos_ids == (2,)
    compared = refused = typed = 0
    for row in golden_rows(f"llama2/{name.partition('_')[0].replace('-', '')}_chat_prompts"):
        expected = row["ids_legacy" if legacy else "ids_nonlegacy"]
        if is_quirk(row):
            with pytest.raises(BadRequest, match=r"messages\[\d\]"):
                render(text, row["messages"])
            refused += 1
            continue
        ids = render(text, row["messages"])
        if any("</s>" in message["content"] for message in row["messages"]):
            # there typed control tokens are obeyed; here they are what was typed
            assert ids.count(2) < expected.count(2)
            assert text.tokenizer.decode(ids, skip_special=False) == "<s> " + row["prompt"]
            typed += 1
        else:
            assert ids == expected, row["prompt"]
            compared += 1
    assert (compared, refused, typed) == (13, 4, 1)


def test_the_end_between_rounds_is_an_id(tmp_path: Path) -> None:
    text = llama(tmp_path / "m", "vicuna_v1.1", legacy=False)
    messages = [user("a</s>"), assistant("b</s>"), user("c")]
    ids = render(text, messages)
    assert ids.count(2) == 1
    shown = text.tokenizer.decode(ids, skip_special=False)
    assert shown.endswith("USER: a</s> ASSISTANT: b</s></s>USER: c ASSISTANT:")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("a"), user("b")], r"messages\[1\] is of role user, not assistant"),
        ([assistant("a"), user("b")], r"messages\[0\] is of role assistant, not user"),
        ([system("a"), user("b"), system("c")], r"messages\[2\] is of role system"),
        ([system("a")], "must be of role user"),
        ([user("a"), assistant("b")], "must be of role user"),
    ],
)
@pytest.mark.parametrize("name", ["chatglm2", "vicuna_v1.1", "llama-2", "mistral", "gemma"])
def test_conversations_that_are_refused(
    messages: list[Message], message: str, name: str, tmp_path: Path
) -> None:
    tokenizer = load_text(write_folder(tmp_path, byte_level())).tokenizer
    ids = {"<start_of_turn>": 1, "<end_of_turn>": 2}
    with pytest.raises(BadRequest, match=message) as caught:
        render(ModelText(tokenizer, make_format(name, ids)[0]), messages)
    assert caught.value.param == "messages"


def test_continuing_an_answer(tmp_path: Path) -> None:
    messages = [user("q"), assistant("The")]
    for kind, text in {
        "chatglm2": "[Round 1]\n\n问：q\n\n答：The",
        "chatglm3": "[gMASK]sop<|user|> \n q<|assistant|> \n The",
    }.items():
        model = chatglm(tmp_path / kind, kind)
        ids = render(model, messages, prompt=False, continues=True)
        shown = model.tokenizer.decode(ids, skip_special=kind == "chatglm2")
        assert shown == text
    vicuna = llama(tmp_path / "v", "vicuna_v1.1", legacy=False)
    ids = render(vicuna, messages, prompt=False, continues=True)
    assert vicuna.tokenizer.decode(ids).endswith("USER: q ASSISTANT: The")
    model = glm4(tmp_path / "g")
    ids = render(model, [user("q"), assistant("")], prompt=False, continues=True)
    shown = model.tokenizer.decode(ids, skip_special=False)
    assert shown == "[gMASK]<sop><|user|>\nq<|assistant|>\n"


def test_the_line_that_opens_an_answer_is_not_shown(tmp_path: Path) -> None:
    # THUDM's own servers strip replies too
    text = chatglm(tmp_path / "m", "chatglm3")
    assert text.template is not None
    assert text.template.opens_line
    tokenizer = text.tokenizer
    rules = TextRules(tokenizer.pieces(), strip_space=True, strip_lines=text.template.opens_line)
    ids = [30910, 13, 36474, 54591, 13]
    shown = [ChoiceText(rules).push(ids, None, None).text]
    choice = ChoiceText(rules)
    shown.append("".join(choice.push([token], None, None).text for token in ids))
    assert shown == ["你好\n", "你好\n"]
    assert not ChatTemplate("").opens_line


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def called(*names: str, **more: Any) -> Message:
    function = {"arguments": '{"a": "it\'s", "b": [1, null]}'}
    calls = [{"id": "c", "type": "function", "function": {"name": n, **function}} for n in names]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


def test_roles_with_tools(tmp_path: Path) -> None:
    three, four = chatglm(tmp_path / "3", "chatglm3"), glm4(tmp_path / "4")
    result = {"role": "tool", "content": "r"}
    messages = [user("q"), called("f", "g", content="Look:"), result, result]
    shown = three.tokenizer.decode(render(three, messages), skip_special=False)
    python = '```python\ntool_call(a="it\'s", b=[1, None])\n```'
    assert shown == (
        f"[gMASK]sop<|user|> \n q<|assistant|> \n Look:<|assistant|> f\n {python}"
        f"<|assistant|> g\n {python}<|observation|> \n r<|observation|> \n r<|assistant|>"
    )
    shown = four.tokenizer.decode(render(four, messages), skip_special=False)
    assert shown == (
        "[gMASK]<sop><|user|>\nq<|assistant|>\nLook:"
        '<|assistant|>f\n{"a": "it\'s", "b": [1, null]}'
        '<|assistant|>g\n{"a": "it\'s", "b": [1, null]}'
        "<|observation|>\nr<|observation|>\nr<|assistant|>"
    )
    for text in (three, four):
        with_system = render(text, [system("Be kind."), user("q")], tools=[TOOL])
        shown = text.tokenizer.decode(with_system, skip_special=False)
        assert shown.count("Be kind.") == 1
        assert '"name": "f"' in shown
        assert text.template is not None
        assert text.template.reasoning_parser == ""
        with pytest.raises(BadRequest) as caught:
            render(text, [user("q"), {**assistant(""), "tool_calls": [{}]}])
        assert caught.value.param == "messages[1].tool_calls[0].function"
    assert three.template is not None
    assert three.template.tool_parser == "chatglm3"


@pytest.mark.parametrize("name", FORMATS[:9])
def test_tools_in_formats_that_know_none(name: str, tmp_path: Path) -> None:
    tokenizer = load_text(write_folder(tmp_path, byte_level())).tokenizer
    names = ("<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|start_header_id|>")
    more = ("<|end_header_id|>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>")
    ids = {token: i for i, token in enumerate((*names, *more, "<|im_end|>"))}
    template, _ = make_format(name, ids)
    assert template.tool_parser == "hermes"
    messages = [user("q"), called("f", "g"), {"role": "tool", "content": "R"}, user("and?")]
    written = template.render_tokens(messages, [TOOL], True, False, {}, tokenizer)
    text = tokenizer.decode(written)
    places = [text.index(part) for part in ("You may call", '"g", "arg', "\nR\n", "and?")]
    # ChatGLM2 has what a system says in front of the last question
    assert (places == sorted(places)) == (name != "chatglm2")


TURNS = [system("S"), user("Q"), assistant("A"), user("R")]
WRITTEN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] S\n\nQ [/INST] A</s>[INST] R [/INST]",
    "gemma": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n"
    "<|user|>\nR<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n<|user|>\nR</s>\n"
    "<|assistant|>\n",
    "llama-2": "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]",
    "vicuna_v1.1": "S USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "chatglm2": "[Round 1]\n\n问：Q\n\n答：A\n\n[Round 2]\n\n问：SR\n\n答：",
}
ENDS = {
    "chatml": "<|im_end|>",
    "llama-3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi-3": "<|end|>",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_how_each_format_is_written(tmp_path: Path, name: str) -> None:
    library = byte_level()
    needed = "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end|> </s>"
    needed += " <start_of_turn> <end_of_turn> <|user|> <|assistant|>"
    library.add_special_tokens(needed.split())
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = write_folder(tmp_path, library, settings=settings)
    text = load_text(folder, chat_format=name)
    ids = render(text, TURNS)
    assert text.tokenizer.decode(ids, skip_special=False) == WRITTEN[name]
    ends = [text.tokenizer.token_text(token) for token in text.tokenizer.eos_ids]
    assert ends == ["</s>", *([ENDS[name]] if name in ENDS else [])]


# -- which format a model gets


@pytest.mark.parametrize(
    ("config", "names", "settings", "asked", "expected"),
    [
        ({}, [], {}, "", "chatglm2"),
        ({"_name_or_path": "THUDM/chatglm3-6b-32k"}, [], {}, "", "chatglm3"),
        ({"_name_or_path": "THUDM/chatglm2-6b"}, ["chatglm3"], {}, "", "chatglm2"),
        ({}, [], {"name_or_path": "THUDM/chatglm2-6b"}, "", "chatglm2"),
        ({}, ["my-model", "ChatGLM3-6B"], {}, "", "chatglm3"),
        ({}, ["models--THUDM--chatglm3-6b"], {}, "", "chatglm3"),
        ({}, [], {"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}, "", "chatglm3"),
        ({}, ["chatglm2"], {"chat_template": "[gMASK]sop<|user|>"}, "", "chatglm3"),
        ({"_name_or_path": "/data/chatglm2/out-chatglm3"}, [], {}, "", "chatglm3"),
        ({"_name_or_path": "THUDM/chatglm2-6b"}, [], {}, "chatglm3", "chatglm3"),
    ],
)
def test_chatglm2_or_chatglm3(
    config: dict[str, Any], names: list[str], settings: dict[str, Any], asked: str, expected: str
) -> None:
    assert glm_kind(config, settings, names, asked) == expected


def test_the_family_by_its_config() -> None:
    assert is_glm({"architectures": ["ChatGLMModel"]})  # the first release has no model_type
    assert is_glm({"model_type": "chatglm"})
    assert is_glm({"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}})
    assert not is_glm({"architectures": ["GlmForCausalLM"], "model_type": "glm"})
    assert not is_glm({"architectures": None, "auto_map": []})


def test_a_name_chooses_only_what_was_published_without_a_template(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", byte_level(), config=LLAMA)
    assert load_text(folder).template is None
    assert load_text(folder, names=["my-Vicuna-7b"]).template is not None
    named = write_folder(tmp_path / "vicuna-13b-v1.5", byte_level(), config=LLAMA)
    assert load_text(named).template is not None
    other = write_folder(tmp_path / "vicuna", byte_level(), config={"model_type": "gpt_neox"})
    assert load_text(other).template is None
    own = write_folder(tmp_path / "vicuna2", byte_level(), settings={"chat_template": CHATML})
    template = load_text(own, names=["vicuna"]).template
    assert isinstance(template, ChatTemplate)
    assert template.source == CHATML


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), settings={"chat_template": "own"})
    file = tmp_path / "t.jinja"
    file.write_text("file", encoding="utf-8")
    text = load_text(folder, chat_template=str(file))
    assert text.tokenizer.decode(render(text, [user("a")])) == "file"
    text = load_text(folder, chat_format="chatml")
    assert text.tokenizer.decode(render(text, [user("a")])) == "user\na\nassistant\n"


def test_the_help_names_all_formats() -> None:
    named = re.findall(r"[\w.-]+", HELP["chat-format"].partition(":")[2])
    assert sorted(named) == sorted(FORMATS)


def test_formats_and_files_that_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level())
    (tmp_path / "t.jinja").write_text("{% if %}", encoding="utf-8")
    for options, message in (
        ({"chat_format": "alpaca"}, f"'alpaca' is not known; known are {FORMATS[0]}"),
        ({"chat_format": "chatglm3"}, r"needs the control token <\|system\|>"),
        ({"chat_format": "gemma"}, "needs the control token <start_of_turn>"),
        ({"chat_template": str(tmp_path / "none")}, "none is not readable"),
        ({"chat_template": str(tmp_path / "t.jinja")}, r"t\.jinja: the chat template"),
    ):
        with pytest.raises(StartError, match=message) as caught:
            load_text(folder, **options)
        assert caught.value.code == EXIT_CONFIG


def test_chatglm3_keeps_its_format_whatever_template_is_published(tmp_path: Path) -> None:
    settings = {"chat_template": "{{ '[gMASK]sop<|user|>' }}"}
    path = real_folder(tmp_path / "m", "chatglm2-6b", config=GLM_CONFIG, tokenizer_config=settings)
    ids = render(load_text(path), [user("你好")])
    assert ids == [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]
