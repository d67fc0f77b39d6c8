"""llama-index's OpenAILike: chats, completions, tools, structured output, errors."""

from __future__ import annotations

import asyncio
from typing import Any

from harness import Settings, raised, run
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


def weather(city: str) -> str:
    """The weather of a city."""
    return f"twenty-one degrees in {city}"


def connect(settings: Settings, **changed: Any) -> OpenAILike:
    given = {
        "api_base": f"{settings['url']}/v1",
        "api_key": settings["key"],
        "model": settings["model"],
        "max_retries": 0,
        "is_chat_model": True,
        "is_function_calling_model": True,
        "context_window": 2048,
    }
    return OpenAILike(**{**given, **changed})


def chat(settings: Settings) -> Any:
    answer = connect(settings).chat([ChatMessage(role="user", content="emoji")])
    return answer.message.content, answer.raw.usage.completion_tokens


def chat_stream(settings: Settings) -> Any:
    chunks = list(connect(settings).stream_chat([ChatMessage(role="user", content="emoji")]))
    return "".join(chunk.delta or "" for chunk in chunks), chunks[-1].message.content


def complete(settings: Settings) -> Any:
    model = connect(settings, is_chat_model=False)
    return model.complete("hi").text, "".join(c.delta or "" for c in model.stream_complete("hi"))


def chat_async(settings: Settings) -> Any:
    return asyncio.run(connect(settings).acomplete("hi")).text


def tools(settings: Settings) -> Any:
    model = connect(settings)
    found = {}
    for required in (False, True):
        answer = model.chat_with_tools(
            [FunctionTool.from_defaults(weather)],
            user_msg="What is the weather?",
            tool_required=required,
        )
        calls = model.get_tool_calls_from_response(answer)
        found[str(required)] = [(call.tool_name, call.tool_kwargs) for call in calls]
    return found


def tools_streamed(settings: Settings) -> Any:
    model = connect(settings)
    tool = FunctionTool.from_defaults(weather)
    chunks = list(model.stream_chat_with_tools([tool], user_msg="Compare both cities."))
    calls = model.get_tool_calls_from_response(chunks[-1])
    return [(call.tool_name, call.tool_kwargs) for call in calls]


def structured(settings: Settings) -> Any:
    called = connect(settings).as_structured_llm(City).complete("Oslo as a City").raw
    model = connect(settings, should_use_structured_outputs=True)
    written = model.as_structured_llm(City).complete("Oslo as JSON").raw
    return called.model_dump(), written.model_dump()


def errors(settings: Settings) -> Any:
    model = connect(settings)
    full = connect(settings, api_base=f"{settings['full_url']}/v1")
    hello = [ChatMessage(role="user", content="hi")]
    failing = [ChatMessage(role="user", content="fails")]
    return {
        "value": raised(lambda: model.chat(hello, top_p=5)),
        "length": raised(lambda: model.complete("x" * 10_000)),
        "key": raised(lambda: connect(settings, api_key="wrong").chat(hello)),
        "model": raised(lambda: connect(settings, model="nope").chat(hello)),
        "full": raised(lambda: full.chat(hello)),
        "in_stream": raised(lambda: list(model.stream_chat(failing))),
    }


run(chat, chat_stream, complete, chat_async, tools, tools_streamed, structured, errors)
