"""langchain-openai: chats, tools, structured output, embeddings, completions, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from harness import Settings, raised, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"twenty-one degrees in {city}"


def connect(settings: Settings, **changed: Any) -> ChatOpenAI:
    given = {
        "base_url": f"{settings['url']}/v1",
        "api_key": settings["key"],
        "model": settings["model"],
        "max_retries": 0,
        "stream_usage": True,
    }
    return ChatOpenAI(**{**given, **changed})


def version(settings: Settings) -> Any:
    return openai.__version__


def invoke(settings: Settings) -> Any:
    answer = connect(settings).invoke([("system", "be kind"), ("human", "emoji")])
    return answer.content, answer.usage_metadata, answer.response_metadata["finish_reason"]


def stream(settings: Settings) -> Any:
    chunks = list(connect(settings).stream("emoji"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return total.content, total.usage_metadata, len(chunks)


def batch(settings: Settings) -> Any:
    return [answer.content for answer in connect(settings).batch(["hi", "emoji", "hi"])]


def async_stream(settings: Settings) -> Any:
    async def ask() -> str:
        return "".join([chunk.content async for chunk in connect(settings).astream("hi")])

    return asyncio.run(ask())


def completions(settings: Settings) -> Any:
    model = OpenAI(
        base_url=f"{settings['url']}/v1",
        api_key=settings["key"],
        model=settings["model"],
        max_retries=0,
    )
    generations = model.generate(["hi", "emoji"]).generations
    return "".join(model.stream("hi")), [entry[0].text for entry in generations]


def embeddings(settings: Settings) -> Any:
    model = OpenAIEmbeddings(
        base_url=f"{settings['url']}/v1",
        api_key=settings["key"],
        model=settings["model"],
        max_retries=0,
        check_embedding_ctx_length=False,  # it would fetch a tokenizer
    )
    return model.embed_documents(["hi", "there"]), model.embed_query("hi")


def tools(settings: Settings) -> Any:
    calls = {}
    for choice in (None, "auto", "any", "weather"):
        model = connect(settings).bind_tools([weather], tool_choice=choice)
        answer = model.invoke("What is the weather?")
        calls[str(choice)] = (
            [(call["name"], call["args"]) for call in answer.tool_calls],
            answer.response_metadata["finish_reason"],
        )
    return calls


def tools_streamed(settings: Settings) -> Any:
    chunks = list(connect(settings).bind_tools([weather]).stream("Compare both cities."))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return [(call["name"], call["args"]) for call in total.tool_calls]


def tool_loop(settings: Settings) -> Any:
    model = connect(settings).bind_tools([weather])
    messages: list[Any] = [HumanMessage("What is the weather?")]
    answer = model.invoke(messages)
    messages.append(answer)
    messages += [
        ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
        for call in answer.tool_calls
    ]
    return model.invoke(messages).content


def structured(settings: Settings) -> Any:
    found = {}
    for method, text in (
        ("json_schema", "Oslo as JSON"),
        ("json_mode", "Oslo as JSON"),
        ("function_calling", "Oslo as a City"),
    ):
        model = connect(settings).with_structured_output(City, method=method)
        found[method] = model.invoke(text).model_dump()
    return found


def errors(settings: Settings) -> Any:
    model = connect(settings)
    full = connect(settings, base_url=f"{settings['full_url']}/v1")
    return {
        "value": raised(lambda: model.bind(temperature=5).invoke("hi")),
        "length": raised(lambda: model.invoke("x" * 10_000)),
        "key": raised(lambda: connect(settings, api_key="wrong").invoke("hi")),
        "model": raised(lambda: connect(settings, model="nope").invoke("hi")),
        "full": raised(lambda: full.invoke("hi")),
        "in_stream": raised(lambda: list(model.stream("fails"))),
    }


run(
    version,
    invoke,
    stream,
    batch,
    async_stream,
    completions,
    embeddings,
    tools,
    tools_streamed,
    tool_loop,
    structured,
    errors,
)
