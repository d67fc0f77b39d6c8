"""The anthropic package, in any of its majors, against /v1/messages."""

from __future__ import annotations

from typing import Any

import anthropic
from harness import Settings, raised, run
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def connect(settings: Settings, **changed: Any) -> anthropic.Anthropic:
    given = {"base_url": settings["url"], "api_key": settings["key"], "max_retries": 0}
    return anthropic.Anthropic(**{**given, **changed})


def asked(settings: Settings, text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": settings["model"], "max_tokens": 200, "messages": messages}


def version(settings: Settings) -> Any:
    return anthropic.__version__


def create(settings: Settings) -> Any:
    client = connect(settings)
    answer = client.messages.create(**asked(settings, "emoji"), system="be kind")
    counted = client.messages.count_tokens(
        model=settings["model"],
        messages=asked(settings, "emoji")["messages"],
        system="be kind",
    )
    return answer.model_dump(), counted.input_tokens


def by_token(settings: Settings) -> Any:
    """The key as a bearer token."""
    client = connect(settings, api_key=None, auth_token=settings["key"])
    return client.messages.create(**asked(settings, "hi")).content[0].text


def stream(settings: Settings) -> Any:
    with connect(settings).messages.stream(**asked(settings, "emoji")) as events:
        kinds = [event.type for event in events]
        final = events.get_final_message()
    return kinds, final.model_dump()


def ends(settings: Settings) -> Any:
    client = connect(settings)
    short = client.messages.create(**{**asked(settings, "hi"), "max_tokens": 3})
    stopped = client.messages.create(**asked(settings, "hi"), stop_sequences=["the"])
    return [(a.stop_reason, a.stop_sequence, a.content[0].text) for a in (short, stopped)]


def tools(settings: Settings) -> Any:
    client = connect(settings)
    found = {}
    for choice in ("auto", "any", "tool"):
        wish = {"type": choice, **({"name": "weather"} if choice == "tool" else {})}
        answer = client.messages.create(
            **asked(settings, "What is the weather?"), tools=[TOOL], tool_choice=wish
        )
        [block] = answer.content
        found[choice] = (block.type, block.name, block.input, answer.stop_reason)
    return found


def tools_streamed(settings: Settings) -> Any:
    asking = asked(settings, "Compare both cities.")
    with connect(settings).messages.stream(**asking, tools=[TOOL]) as events:
        final = events.get_final_message()
    return [(block.name, block.input) for block in final.content], final.stop_reason


def tool_loop(settings: Settings) -> Any:
    client = connect(settings)
    asking = asked(settings, "What is the weather?")
    answer = client.messages.create(**asking, tools=[TOOL])
    result = {
        "type": "tool_result",
        "tool_use_id": answer.content[0].id,
        "content": "twenty-one degrees",
    }
    asking["messages"] += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    return client.messages.create(**asking, tools=[TOOL]).content[0].text


def structured(settings: Settings) -> Any:
    client = connect(settings)
    answer = client.messages.parse(**asked(settings, "Oslo as JSON"), output_format=City)
    return answer.parsed_output.model_dump()


def errors(settings: Settings) -> Any:
    client = connect(settings)
    hello = asked(settings, "hi")
    full = connect(settings, base_url=settings["full_url"])
    stranger = connect(settings, api_key="wrong")

    def streamed() -> Any:
        with client.messages.stream(**asked(settings, "fails")) as events:
            return list(events)

    return {
        "value": raised(lambda: client.messages.create(**hello, extra_body={"temperature": 3})),
        "length": raised(lambda: client.messages.create(**asked(settings, "x" * 10_000))),
        "key": raised(lambda: stranger.messages.create(**hello)),
        "model": raised(lambda: client.messages.create(**{**hello, "model": "nope"})),
        "engine": raised(lambda: client.messages.create(**asked(settings, "fails"))),
        "full": raised(lambda: full.messages.create(**hello)),
        "in_stream": raised(streamed),
    }


run(
    version,
    create,
    by_token,
    stream,
    ends,
    tools,
    tools_streamed,
    tool_loop,
    structured,
    errors,
)
