"""The JSON of POST /v1/messages: the answer, and the events of its stream.

Owns both shapes, made of the same blocks. Must not know requests before they are jobs, engines or
HTTP.

Tokens found in the prefix cache count as input tokens: the API's own split is one of prices, and
the sum of its three numbers is the prompt here too.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

import jiter

from router.api.messages_schema import MessagesRequest
from router.api.runs import Change, Run, Runs
from router.api.sse import named_event, quote
from router.flow import Job, Progress

PING: Final = named_event("ping", {"type": "ping"})
# The usual event, of text: block and quoted text.
_TEXT_DELTA: Final = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
    b'"delta":{"type":"text_delta","text":%s}}\n\n'
)


class MessageForm:
    """One message in the making. It takes each step once, as changes or as events."""

    ping = PING

    def __init__(self, request: MessagesRequest, job: Job) -> None:
        self._id = f"msg_{secrets.token_hex(12)}"
        self._model = request.model
        self._job = job
        self._runs = Runs()

    def take(self, step: list[Progress]) -> list[Change]:
        """Takes in one step."""
        return [change for progress in step for change in self._runs.push(progress.piece)]

    def whole(self) -> dict[str, Any]:
        """The answer to a request whose generation is over."""
        return {
            **self._head(),
            "content": [_block(run) for run in self._runs.runs],
            **self._end(),
            "usage": self._usage(self._job.record.completion_tokens),
        }

    # -- the stream

    def opening(self) -> bytes:
        """The message begins. The size of its prompt is known; nothing is generated yet."""
        message = {
            **self._head(),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(0),
        }
        return _event("message_start", message=message)

    def step(self, step: list[Progress]) -> bytes:
        """Takes in one step; its events."""
        return b"".join(map(_change_event, self.take(step)))

    def closing(self) -> bytes:
        """Why it ended, and the sums."""
        usage = self._usage(self._job.record.completion_tokens)
        return _event("message_delta", delta=self._end(), usage=usage) + _event("message_stop")

    # -- parts

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model}

    def _end(self) -> dict[str, Any]:
        """Why it ended, and with which stop string."""
        finish, matched = self._runs.finish, self._runs.matched
        if finish == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if finish == "length":
            # The limit that was asked for, or the model's own.
            wanted = self._job.max_new
            full = wanted is not None and self._job.record.completion_tokens < wanted
            reason = "model_context_window_exceeded" if full else "max_tokens"
            return {"stop_reason": reason, "stop_sequence": None}
        reason = "end_turn" if matched is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": matched}

    def _usage(self, output_tokens: int) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "input_tokens": len(self._job.prompts[0]),
            "output_tokens": output_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }
        thinking = self._job.record.reasoning_tokens
        if thinking is not None:
            usage["output_tokens_details"] = {"thinking_tokens": thinking}
        return usage


def _event(name: str, /, **members: Any) -> bytes:
    return named_event(name, {"type": name, **members})


def _change_event(change: Change) -> bytes:
    run = change.run
    match change.what:
        case "opens":
            block = _block(Run(run.index, run.kind, run.id, run.name))
            return _event("content_block_start", index=run.index, content_block=block)
        case "grows" if run.kind == "content":  # the usual case
            return _TEXT_DELTA % (run.index, quote(change.text))
        case "grows":
            name = "thinking" if run.kind == "reasoning" else "partial_json"
            kind = "thinking_delta" if run.kind == "reasoning" else "input_json_delta"
            delta = {"type": kind, name: change.text}
            return _event("content_block_delta", index=run.index, delta=delta)
        case "ends":
            return _event("content_block_stop", index=run.index)


def _block(run: Run) -> dict[str, Any]:
    match run.kind:
        case "content":
            return {"type": "text", "text": run.text}
        case "reasoning":  # nothing here is signed; the member must be there
            return {"type": "thinking", "thinking": run.text, "signature": ""}
        case "call":
            return {"type": "tool_use", "id": run.id, "name": run.name, "input": _input(run.text)}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as far as they are JSON: the token limit may have cut them."""
    try:
        value = jiter.from_json(arguments.encode(), partial_mode="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
