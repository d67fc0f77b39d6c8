"""The JSON of POST /v1/responses: the answer, and the events of its stream.

Owns both shapes, made of the same items. Must not know requests before they are jobs, engines or
HTTP. Every event has a type and a number; numbers rise by one.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Final

from router.api.logprobs import TokenNames, chat_logprobs
from router.api.responses_schema import ResponsesRequest
from router.api.runs import Change, Run, RunKind, Runs
from router.api.sse import PING, named_event, quote
from router.errors import RequestError, error_body
from router.flow import Job, Progress
from router.record import RequestRecord
from router.text.assembly import Entry

_PREFIXES: Final[dict[RunKind, str]] = {"content": "msg", "reasoning": "rs", "call": "fc"}
# What is added to a growing run, by kind.
_DELTAS: Final[dict[RunKind, str]] = {
    "content": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
# The usual event, of text without log-probabilities: number, item's id and place, quoted text.
_TEXT_DELTA: Final = (
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
    b'"sequence_number":%d,"item_id":"%s","output_index":%d,"content_index":0,"delta":%s,'
    b'"logprobs":[]}\n\n'
)


class ResponseForm:
    """One response in the making. It takes each step once, as changes or as events."""

    ping = PING

    def __init__(self, request: ResponsesRequest, job: Job, *, logprobs: bool) -> None:
        self._request = request
        self._record = job.record
        self._key = secrets.token_hex(16)
        self._runs = Runs()
        self._num_events = 0
        self._names = TokenNames(job.model.tokenizer, job.rules.pieces) if logprobs else None

    def take(self, step: list[Progress]) -> list[Change]:
        """Takes in one step."""
        return [change for progress in step for change in self._runs.push(progress.piece)]

    def whole(self) -> dict[str, Any]:
        """The answer to a request whose generation is over."""
        cut = self._runs.finish == "length"
        answer = self._answer("incomplete" if cut else "completed")
        answer["output"] = [self._item(run) for run in self._runs.runs]
        answer["usage"] = usage_of(self._record)
        if cut:
            answer["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            answer["completed_at"] = int(time.time())
        return answer

    # -- the stream

    def opening(self) -> bytes:
        """The response exists, and is worked on."""
        answer = self._answer("in_progress")
        return b"".join(
            self._event(f"response.{name}", response=answer) for name in ("created", "in_progress")
        )

    def step(self, step: list[Progress]) -> bytes:
        """Takes in one step; its events."""
        return b"".join([self._events(change) for change in self.take(step)])

    def closing(self) -> bytes:
        """The whole answer once more."""
        answer = self.whole()
        return self._event(f"response.{answer['status']}", response=answer)

    # -- failures

    def body(self, error: RequestError, _request_id: str) -> dict[str, Any]:
        """Before the first byte: as on every OpenAI route."""
        return error_body(error)[2]

    def events(self, error: RequestError, _request_id: str) -> bytes:
        """After it: the error, and the response as far as it came."""
        told = error_body(error)[2]["error"]
        answer = self._answer("failed")
        answer["error"] = {"code": "server_error", "message": told["message"]}
        answer["output"] = [self._item(run) for run in self._runs.runs]
        fields = {key: told[key] for key in ("code", "message", "param")}
        return self._event("error", **fields) + self._event("response.failed", response=answer)

    # -- parts

    def _answer(self, status: str) -> dict[str, Any]:
        given = self._request
        form = given.text.format if given.text else None
        verbosity = given.text.verbosity if given.text else None
        return {
            "id": f"resp_{self._key}",
            "object": "response",
            "created_at": self._record.created_s,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": given.instructions,
            "max_output_tokens": given.max_output_tokens,
            "max_tool_calls": given.max_tool_calls,
            "model": given.model,
            "output": [],
            "parallel_tool_calls": given.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": given.prompt_cache_key,
            "reasoning": {
                "effort": given.reasoning.effort if given.reasoning else None,
                "summary": None,
            },
            "safety_identifier": given.safety_identifier,
            "service_tier": None,
            "store": False,  # whatever was asked for
            "temperature": 1.0 if given.temperature is None else given.temperature,
            "text": {"format": form or {"type": "text"}, "verbosity": verbosity},
            "tool_choice": given.tool_choice or "auto",
            "tools": given.tools or [],
            "top_logprobs": given.top_logprobs or 0,
            "top_p": 1.0 if given.top_p is None else given.top_p,
            "truncation": given.truncation or "disabled",
            "usage": None,
            "user": given.user,
            "metadata": given.metadata or {},
        }

    def _event(self, name: str, /, **members: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return named_event(name, {"type": name, "sequence_number": number, **members})

    def _events(self, change: Change) -> bytes:
        match change.what:
            case "opens":
                return self._opened(change.run)
            case "grows":
                return self._grown(change)
            case "ends":
                return self._ended(change.run)

    def _opened(self, run: Run) -> bytes:
        item = self._item(run, "in_progress", opens=True)
        added = self._event("response.output_item.added", output_index=run.index, item=item)
        if run.kind == "call":
            return added
        part = self._part(run)
        return added + self._event("response.content_part.added", **self._place(run), part=part)

    def _grown(self, change: Change) -> bytes:
        run = change.run
        if run.kind == "content" and not change.entries:  # the usual case
            number = self._num_events
            self._num_events += 1
            item_id = self._item_id(run).encode()
            return _TEXT_DELTA % (number, item_id, run.index, quote(change.text))
        more: dict[str, Any] = {"delta": change.text}
        if run.kind == "content":
            more["logprobs"] = self._logprobs(change.entries)
        return self._event(f"{_DELTAS[run.kind]}.delta", **self._place(run), **more)

    def _ended(self, run: Run) -> bytes:
        done: dict[str, Any] = {"text": run.text}
        if run.kind == "call":
            done = {"name": run.name, "arguments": run.text}
        if run.kind == "content":
            done["logprobs"] = self._logprobs(run.entries)
        place = self._place(run)
        events = self._event(f"{_DELTAS[run.kind]}.done", **place, **done)
        if run.kind != "call":
            part = self._part(run)
            events += self._event("response.content_part.done", **place, part=part)
        item = self._item(run)
        return events + self._event("response.output_item.done", output_index=run.index, item=item)

    def _place(self, run: Run) -> dict[str, Any]:
        """Where in the answer an event belongs; each item has one content at most."""
        place: dict[str, Any] = {"item_id": self._item_id(run), "output_index": run.index}
        return place if run.kind == "call" else {**place, "content_index": 0}

    def _item_id(self, run: Run) -> str:
        return f"{_PREFIXES[run.kind]}_{self._key}{run.index:04x}"

    def _item(self, run: Run, status: str = "", *, opens: bool = False) -> dict[str, Any]:
        """One entry of `output`; one that just opens has no content yet."""
        status = status or ("completed" if run.over and not run.cut else "incomplete")
        head = {"id": self._item_id(run), "status": status}
        content = [] if opens else [self._part(run)]
        match run.kind:
            case "content":
                return {**head, "type": "message", "role": "assistant", "content": content}
            case "reasoning":
                return {**head, "type": "reasoning", "summary": [], "content": content}
            case "call":
                call = {"call_id": run.id, "name": run.name, "arguments": run.text}
                return {**head, "type": "function_call", **call}

    def _part(self, run: Run) -> dict[str, Any]:
        if run.kind == "reasoning":
            return {"type": "reasoning_text", "text": run.text}
        logprobs = self._logprobs(run.entries)
        return {
            "type": "output_text",
            "text": run.text,
            "annotations": [],
            "logprobs": logprobs,
        }

    def _logprobs(self, entries: list[Entry] | tuple[Entry, ...]) -> list[dict[str, Any]]:
        if self._names is None or not entries:
            return []
        told: list[dict[str, Any]] = chat_logprobs(entries, self._names)["content"]
        return told


def usage_of(record: RequestRecord) -> dict[str, Any]:
    """The counts of a generation that is over."""
    return {
        "input_tokens": record.prompt_tokens,
        "input_tokens_details": {"cached_tokens": record.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": record.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": record.reasoning_tokens or 0},
        "total_tokens": record.prompt_tokens + record.completion_tokens,
    }
