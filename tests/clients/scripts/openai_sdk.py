"""The openai package, in any of its majors."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from harness import Settings, raised, run
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def connect(settings: Settings, **changed: Any) -> openai.OpenAI:
    given = {"base_url": f"{settings['url']}/v1", "api_key": settings["key"], "max_retries": 0}
    return openai.OpenAI(**{**given, **changed})


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def version(settings: Settings) -> Any:
    return openai.__version__


def models(settings: Settings) -> Any:
    client = connect(settings)
    return [model.id for model in client.models.list()], client.models.retrieve("tiny").object


def chat(settings: Settings) -> Any:
    answer = connect(settings).chat.completions.create(
        model=settings["model"], messages=user("emoji"), temperature=0
    )
    return answer.model_dump()


def chat_stream(settings: Settings) -> Any:
    stream = connect(settings).chat.completions.create(
        model=settings["model"],
        messages=user("emoji"),
        stream=True,
        stream_options={"include_usage": True},
    )
    return [chunk.model_dump() for chunk in stream]


def stream_helper(settings: Settings) -> Any:
    with connect(settings).chat.completions.stream(
        model=settings["model"], messages=user("variants"), n=3, seed=1, logprobs=True
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    texts = [
        (choice.index, choice.message.role, choice.message.content) for choice in final.choices
    ]
    spelled = [
        b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
        for choice in final.choices
    ]
    return {"kinds": sorted(set(kinds)), "texts": texts, "spelled": spelled}


def chat_async(settings: Settings) -> Any:
    async def ask() -> str:
        async with openai.AsyncOpenAI(
            base_url=f"{settings['url']}/v1", api_key=settings["key"]
        ) as client:
            stream = await client.chat.completions.create(
                model=settings["model"], messages=user("hi"), stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    return asyncio.run(ask())


def raw_response(settings: Settings) -> Any:
    answer = connect(settings).chat.completions.with_raw_response.create(
        model=settings["model"], messages=user("hi"), extra_headers={"X-Request-Id": "abc"}
    )
    return answer.headers["x-request-id"], answer.parse()._request_id


def completions(settings: Settings) -> Any:
    answer = connect(settings).completions.create(
        model=settings["model"], prompt=["emoji", "hi"], echo=True, logprobs=1, max_tokens=100
    )
    return answer.model_dump()


def completions_stream(settings: Settings) -> Any:
    stream = connect(settings).completions.create(
        model=settings["model"], prompt="hi", stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    return "".join(c.choices[0].text for c in chunks if c.choices), chunks[-1].usage.model_dump()


def embeddings(settings: Settings) -> Any:
    client = connect(settings)
    asked = {"model": settings["model"], "input": ["hi", "there"]}
    packed = client.embeddings.create(**asked)  # the client asks for base64 by itself
    plain = client.embeddings.create(**asked, encoding_format="float")
    return {
        "packed": [entry.embedding for entry in packed.data],
        "plain": [entry.embedding for entry in plain.data],
        "usage": packed.usage.model_dump(),
    }


def tools(settings: Settings) -> Any:
    client = connect(settings)
    found = {}
    named = {"type": "function", "function": {"name": "weather"}}
    for name, choice in (("auto", "auto"), ("required", "required"), ("named", named)):
        answer = client.chat.completions.create(
            model=settings["model"],
            messages=user("What is the weather?"),
            tools=[TOOL],
            tool_choice=choice,
        )
        [call] = answer.choices[0].message.tool_calls
        found[name] = (
            call.id != "",
            call.function.name,
            call.function.arguments,
            answer.choices[0].finish_reason,
        )
    return found


def tools_streamed(settings: Settings) -> Any:
    with connect(settings).chat.completions.stream(
        model=settings["model"], messages=user("Compare both cities."), tools=[TOOL]
    ) as stream:
        kinds = sorted({event.type for event in stream})
        [choice] = stream.get_final_completion().choices
    calls = choice.message.tool_calls
    return {
        "kinds": kinds,
        "calls": [(call.function.name, call.function.parsed_arguments) for call in calls],
        "ids": len({call.id for call in calls}),
        "finish": choice.finish_reason,
    }


def tool_loop(settings: Settings) -> Any:
    client = connect(settings)
    asked = {"model": settings["model"], "tools": [TOOL]}
    messages = user("What is the weather?")
    answer = client.chat.completions.create(**asked, messages=messages).choices[0].message
    messages.append(answer)
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": "twenty-one degrees"}
        for call in answer.tool_calls
    ]
    return client.chat.completions.create(**asked, messages=messages).choices[0].message.content


def structured(settings: Settings) -> Any:
    client = connect(settings)
    asked = {"model": settings["model"], "messages": user("Oslo as JSON")}
    whole = client.chat.completions.parse(**asked, response_format=City)
    with client.chat.completions.stream(**asked, response_format=City) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    return [answer.choices[0].message.parsed.model_dump() for answer in (whole, streamed)]


def responses(settings: Settings) -> Any:
    client = connect(settings)
    asked = {"model": settings["model"], "input": "emoji"}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    return {
        "texts": [whole.output_text, final.output_text],
        "ends": [kinds[0], kinds[-1]],
        "status": [whole.status, final.status],
        "usage": whole.usage.model_dump(),
    }


def responses_tools(settings: Settings) -> Any:
    client = connect(settings)
    tool = {"type": "function", **TOOL["function"]}
    asked = {"model": settings["model"], "input": "What is the weather?", "tools": [tool]}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    calls = [
        [(item.type, item.name, item.arguments) for item in answer.output]
        for answer in (whole, final)
    ]
    result = {
        "type": "function_call_output",
        "call_id": whole.output[0].call_id,
        "output": "twenty-one degrees",
    }
    history = [*user("What is the weather?"), *whole.output, result]
    after = client.responses.create(**{**asked, "input": history})
    return {"calls": calls, "after": after.output_text}


def responses_structured(settings: Settings) -> Any:
    answer = connect(settings).responses.parse(
        model=settings["model"], input="Oslo as JSON", text_format=City
    )
    return answer.output_parsed.model_dump()


def errors(settings: Settings) -> Any:
    client = connect(settings)
    create = client.chat.completions.create
    asked = {"model": settings["model"], "messages": user("hi")}
    stranger = connect(settings, api_key="wrong")
    full = connect(settings, base_url=f"{settings['full_url']}/v1")
    return {
        "value": raised(lambda: create(**{**asked, "temperature": 3})),
        "streamed_value": raised(lambda: create(**asked, stream=True, top_p=3)),
        "length": raised(lambda: create(**{**asked, "messages": user("x" * 10_000)})),
        "key": raised(lambda: stranger.chat.completions.create(**asked)),
        "model": raised(lambda: create(**{**asked, "model": "nope"})),
        "model_route": raised(lambda: client.models.retrieve("nope")),
        "route": raised(lambda: client.files.list()),
        "engine": raised(lambda: create(**{**asked, "messages": user("fails")})),
        "full": raised(lambda: full.chat.completions.create(**asked)),
        "in_stream": raised(
            lambda: list(create(**{**asked, "messages": user("fails"), "stream": True}))
        ),
    }


run(
    version,
    models,
    chat,
    chat_stream,
    stream_helper,
    chat_async,
    raw_response,
    completions,
    completions_stream,
    embeddings,
    tools,
    tools_streamed,
    tool_loop,
    structured,
    responses,
    responses_tools,
    responses_structured,
    errors,
)
