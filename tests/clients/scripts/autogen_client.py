"""AutoGen's client for servers of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from autogen_core import CancellationToken
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    SystemMessage,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from harness import Settings, raised, run
from pydantic import BaseModel

ABILITIES = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
    "multiple_system_messages": True,
}


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


async def weather(city: str) -> str:
    """The weather of a city."""
    return f"twenty-one degrees in {city}"


WEATHER = FunctionTool(weather, description="The weather of a city.")


def user(text: str) -> UserMessage:
    return UserMessage(content=text, source="user")


def ask(
    settings: Settings, use: Callable[[OpenAIChatCompletionClient], Awaitable[Any]], **changed: Any
) -> Any:
    """What `use` gives with a client of its own."""

    async def work() -> Any:
        given = {
            "base_url": f"{settings['url']}/v1",
            "api_key": settings["key"],
            "model": settings["model"],
            "model_info": ABILITIES,
            "max_retries": 0,
        }
        client = OpenAIChatCompletionClient(**{**given, **changed})
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(work())


async def streamed(client: OpenAIChatCompletionClient, text: str, **given: Any) -> Any:
    parts = [part async for part in client.create_stream([user(text)], **given)]
    assert isinstance(parts[-1], CreateResult)
    return parts


def chat(settings: Settings) -> Any:
    async def use(client: OpenAIChatCompletionClient) -> Any:
        answer = await client.create([SystemMessage(content="be kind"), user("emoji")])
        return answer.content, answer.finish_reason, answer.usage.completion_tokens

    return ask(settings, use)


def chat_stream(settings: Settings) -> Any:
    async def use(client: OpenAIChatCompletionClient) -> Any:
        options = {"stream_options": {"include_usage": True}}
        parts = await streamed(client, "emoji", extra_create_args=options)
        end = parts[-1]
        return "".join(parts[:-1]), end.content, end.finish_reason, end.usage.completion_tokens

    return ask(settings, use)


def tools(settings: Settings) -> Any:
    async def use(client: OpenAIChatCompletionClient) -> Any:
        found = {}
        for choice in ("auto", "required", WEATHER):
            answer = await client.create(
                [user("What is the weather?")], tools=[WEATHER], tool_choice=choice
            )
            [call] = answer.content
            name = choice if isinstance(choice, str) else "named"
            found[name] = (call.name, call.arguments, answer.finish_reason)
        return found

    return ask(settings, use)


def tools_streamed(settings: Settings) -> Any:
    async def use(client: OpenAIChatCompletionClient) -> Any:
        parts = await streamed(client, "Compare both cities.", tools=[WEATHER])
        return [(call.name, call.arguments) for call in parts[-1].content]

    return ask(settings, use)


def tool_loop(settings: Settings) -> Any:
    async def use(client: OpenAIChatCompletionClient) -> Any:
        messages: list[Any] = [user("What is the weather?")]
        answer = await client.create(messages, tools=[WEATHER])
        messages.append(AssistantMessage(content=answer.content, source="assistant"))
        [call] = answer.content
        said = await WEATHER.run_json({"city": "Oslo"}, CancellationToken())
        result = FunctionExecutionResult(
            content=WEATHER.return_value_as_string(said), call_id=call.id, name=call.name
        )
        messages.append(FunctionExecutionResultMessage(content=[result]))
        return (await client.create(messages, tools=[WEATHER])).content

    return ask(settings, use)


def structured(settings: Settings) -> Any:
    async def use(client: OpenAIChatCompletionClient) -> Any:
        answer = await client.create([user("Oslo as JSON")], json_output=City)
        plain = await client.create([user("Oslo as JSON")], json_output=True)
        return [City.model_validate_json(text.content).model_dump() for text in (answer, plain)]

    return ask(settings, use)


def errors(settings: Settings) -> Any:
    def trial(text: str = "hi", **changed: Any) -> Any:
        return raised(lambda: ask(settings, lambda client: client.create([user(text)]), **changed))

    return {
        "value": trial(top_p=5),
        "length": trial("x" * 10_000),
        "key": trial(api_key="wrong"),
        "model": trial(model="nope"),
        "full": trial(base_url=f"{settings['full_url']}/v1"),
        "in_stream": raised(lambda: ask(settings, lambda client: streamed(client, "fails"))),
    }


run(chat, chat_stream, tools, tools_streamed, tool_loop, structured, errors)
