"""litellm: one call signature over our OpenAI and Anthropic routes."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
from harness import Settings, raised, run
from pydantic import BaseModel

litellm.telemetry = False
litellm.suppress_debug_info = True
PROVIDERS = ("hosted_vllm", "openai")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


def asked(settings: Settings, text: str, provider: str = "hosted_vllm") -> dict[str, Any]:
    return {
        "model": f"{provider}/{settings['model']}",
        "api_base": f"{settings['url']}/v1",
        "api_key": settings["key"],
        "messages": [{"role": "user", "content": text}],
        "num_retries": 0,
        "max_retries": 0,
    }


def chat(settings: Settings) -> Any:
    found = []
    for provider in PROVIDERS:
        answer = litellm.completion(**asked(settings, "emoji", provider))
        choice = answer.choices[0]
        found.append((choice.message.content, choice.finish_reason, answer.usage.completion_tokens))
    return found


def chat_stream(settings: Settings) -> Any:
    found = []
    for provider in PROVIDERS:
        chunks = list(
            litellm.completion(
                **asked(settings, "emoji", provider),
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        whole = litellm.stream_chunk_builder(chunks)
        found.append((whole.choices[0].message.content, whole.usage.completion_tokens))
    return found


def chat_async(settings: Settings) -> Any:
    async def ask() -> str:
        stream = await litellm.acompletion(**asked(settings, "hi"), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    return asyncio.run(ask())


def text_completion(settings: Settings) -> Any:
    given = asked(settings, "")
    del given["messages"]
    given["model"] = f"text-completion-openai/{settings['model']}"
    return litellm.text_completion(**given, prompt="hi").choices[0].text


def embeddings(settings: Settings) -> Any:
    found = []
    for provider in PROVIDERS:
        given = asked(settings, "", provider)
        del given["messages"]
        answer = litellm.embedding(**given, input=["hi", "there"], encoding_format="float")
        found.append([entry["embedding"] for entry in answer.data])
    return found


def tools(settings: Settings) -> Any:
    found = {}
    named = {"type": "function", "function": {"name": "weather"}}
    for name, choice in (("auto", "auto"), ("required", "required"), ("named", named)):
        answer = litellm.completion(
            **asked(settings, "What is the weather?"), tools=[TOOL], tool_choice=choice
        )
        [call] = answer.choices[0].message.tool_calls
        found[name] = (
            call.function.name,
            call.function.arguments,
            answer.choices[0].finish_reason,
        )
    return found


def tools_streamed(settings: Settings) -> Any:
    chunks = list(
        litellm.completion(**asked(settings, "Compare both cities."), tools=[TOOL], stream=True)
    )
    whole = litellm.stream_chunk_builder(chunks)
    calls = whole.choices[0].message.tool_calls
    return [(call.function.name, call.function.arguments) for call in calls]


def structured(settings: Settings) -> Any:
    answer = litellm.completion(**asked(settings, "Oslo as JSON"), response_format=City)
    return City.model_validate_json(answer.choices[0].message.content).model_dump()


def responses(settings: Settings) -> Any:
    given = asked(settings, "", "openai")
    del given["messages"]
    return litellm.responses(**given, input="hi").output[0].content[0].text


def messages(settings: Settings) -> Any:
    given = {**asked(settings, "hi", "anthropic"), "api_base": settings["url"], "max_tokens": 50}
    whole = litellm.completion(**given)
    chunks = list(litellm.completion(**given, stream=True))
    streamed = litellm.stream_chunk_builder(chunks).choices[0].message.content
    return whole.choices[0].message.content, streamed


def errors(settings: Settings) -> Any:
    hello = asked(settings, "hi")
    full = {**hello, "api_base": f"{settings['full_url']}/v1"}
    return {
        "value": raised(lambda: litellm.completion(**hello, top_p=5)),
        "length": raised(lambda: litellm.completion(**asked(settings, "x" * 10_000))),
        "key": raised(lambda: litellm.completion(**{**hello, "api_key": "wrong"})),
        "model": raised(lambda: litellm.completion(**{**hello, "model": "hosted_vllm/nope"})),
        "full": raised(lambda: litellm.completion(**full)),
        "in_stream": raised(
            lambda: list(litellm.completion(**asked(settings, "fails"), stream=True))
        ),
    }


run(
    chat,
    chat_stream,
    chat_async,
    text_completion,
    embeddings,
    tools,
    tools_streamed,
    structured,
    responses,
    messages,
    errors,
)
