"""What clients sent and got, and the proof that nothing was lost, repeated or foreign.

`History` owns the record of a load test: for each client its requests in order, every token with
its index, and the one end. It knows no sockets. `ask` is a client that streams a request over HTTP
(or reads a whole answer) into a history; `undisturbed` is what it gets while nothing happens.

    history = History()
    await ask(history, "client 3", http, request)
    assert history.check(answers.__getitem__) == []
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import httpx

Finish: TypeAlias = str | tuple[str, ...]
SHOWN = 12  # tokens around a fault that a sentence shows
ALIGNED = 4  # tokens that must agree before a shift is called a loss or a repeat


class Request(NamedTuple):
    """A request as a value: answers can be looked up by it. `body` is JSON."""

    route: str
    body: str


def request(route: str = "/v1/completions", **fields: Any) -> Request:
    """A request that asks for what the checker needs: token ids, and usage where it streams."""
    fields.setdefault("return_token_ids", True)
    if fields.get("stream"):
        fields.setdefault("stream_options", {"include_usage": True})
    return Request(route, json.dumps(fields, sort_keys=True))


@dataclass(frozen=True)
class Answer:
    """A whole answer, one entry for each choice. A token is any text that names it.

    `texts` are compared as they are: the bytes a user saw. `usage` is (prompt, completion) tokens.
    """

    tokens: tuple[tuple[str, ...], ...]
    texts: tuple[str, ...]
    finish: tuple[str, ...]
    usage: tuple[int, int]


@dataclass
class _Run:
    """One request of one client, as it went."""

    client: str
    number: int
    request: Request
    tokens: dict[int, list[tuple[int, str]]] = field(default_factory=dict)  # by choice
    texts: dict[int, str] = field(default_factory=dict)
    ends: list[tuple[tuple[str, ...], tuple[int, int]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    late: int = 0  # tokens behind the end

    @property
    def name(self) -> str:
        return f"{self.client}, request {self.number}"

    @property
    def over(self) -> bool:
        return bool(self.ends or self.failures)


class History:
    """The record. A client has at most one request at a time."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._open: dict[str, _Run] = {}
        self._numbers: dict[str, int] = {}
        self.num_ended = 0
        self.num_failed = 0
        self.num_tokens = 0

    def sent(self, client: str, request: Request) -> None:
        """A client sends a request; what is recorded for it from now on belongs to that."""
        number = self._numbers[client] = self._numbers.get(client, 0) + 1
        run = _Run(client, number, request)
        self._runs.append(run)
        self._open[client] = run

    def token(self, client: str, index: int, text: str, choice: int = 0) -> None:
        """Token number `index` of a choice, from 0."""
        run = self._open[client]
        run.late += run.over
        run.tokens.setdefault(choice, []).append((index, text))
        self.num_tokens += 1

    def shown(self, client: str, text: str, choice: int = 0) -> None:
        """More text of a choice, as a user sees it."""
        run = self._open[client]
        run.texts[choice] = run.texts.get(choice, "") + text

    def ended(self, client: str, finish: Finish, usage: tuple[int, int]) -> None:
        """The request ended as it should: a finish reason (of each choice), and the usage."""
        reasons = (finish,) if isinstance(finish, str) else finish
        self._open[client].ends.append((reasons, usage))
        self.num_ended += 1

    def failed(self, client: str, what: str) -> None:
        """The request failed: an error, a broken connection."""
        self._open[client].failures.append(what)
        self.num_failed += 1

    def answer(self, client: str) -> Answer:
        """What the client's latest request got. Raises ValueError if it did not end well."""
        run = self._open[client]
        if run.failures or len(run.ends) != 1:
            raise ValueError(f"{run.name} has no answer: {run.failures or 'no end'}")
        finish, usage = run.ends[0]
        choices = range(len(finish))
        tokens = tuple(tuple(text for _, text in run.tokens.get(i, [])) for i in choices)
        return Answer(tokens, tuple(run.texts.get(i, "") for i in choices), finish, usage)

    def check(self, expected: Callable[[Request], Answer], *, running: bool = False) -> list[str]:
        """Every loss, repeat, foreign token, missing or second end, as a sentence.

        With `running` requests that go on are left for a later check. What was checked is
        forgotten, so that a record of hours stays small.
        """
        left = [run for run in self._runs if running and not run.over]
        checked = [run for run in self._runs if not running or run.over]
        self._runs = left
        return [fault for run in checked for fault in _faults(run, expected(run.request))]


def _faults(run: _Run, expected: Answer) -> list[str]:
    faults = [f"failed: {what}" for what in run.failures]
    if not run.over:
        faults.append("has no end")
    if len(run.ends) + len(run.failures) > 1:
        faults.append(f"ended {len(run.ends) + len(run.failures)} times")
    if run.late:
        faults.append(f"got {run.late} tokens behind its end")
    for choice in sorted(run.tokens.keys() | set(range(len(expected.tokens)))):
        where = f"choice {choice}: " if len(expected.tokens) > 1 else ""
        if choice >= len(expected.tokens):
            faults.append(f"{where}there should be none of that number")
            continue
        got = run.tokens.get(choice, [])
        wanted = expected.tokens[choice]
        whole = not run.failures and run.over
        found = _order_faults(got) or _token_faults([t for _, t in got], wanted, whole=whole)
        text = run.texts.get(choice, "")
        if not found and whole and text != expected.texts[choice]:
            found = [f"the text is {text[-80:]!r}, not {expected.texts[choice][-80:]!r}"]
        faults += [where + fault for fault in found]
    for finish, usage in run.ends:
        if finish != expected.finish:
            faults.append(f"ended with {finish}, not {expected.finish}")
        if usage != expected.usage:
            faults.append(f"usage {usage}, not {expected.usage}")
    return [f"{run.name}: {fault}" for fault in faults]


def _order_faults(got: Sequence[tuple[int, str]]) -> list[str]:
    """Indexes rise by one, from 0."""
    for at, (index, text) in enumerate(got):
        if index < at:
            return [f"token {index} ({text}) is repeated"]
        if index > at:
            return [f"{index - at} tokens are lost before token {index} ({text})"]
    return []


def _token_faults(got: list[str], wanted: Sequence[str], *, whole: bool) -> list[str]:
    """The first place where the tokens are not those expected, and what happened there."""
    both = min(len(got), len(wanted))
    at = next((i for i in range(both) if got[i] != wanted[i]), both)
    if at == len(got):
        if whole and len(got) < len(wanted):
            return [f"the last {len(wanted) - len(got)} of {len(wanted)} tokens are lost"]
        return []
    size = min(ALIGNED, len(got) - at)
    ahead = got[at : at + size]
    seen = f"{got[at : at + SHOWN]}, expected {list(wanted[at : at + SHOWN])}"
    for lost in range(1, len(wanted) - at - size + 1):
        if list(wanted[at + lost : at + lost + size]) == ahead:
            return [f"{lost} tokens are lost at {at}: {seen}"]
    for repeated in range(1, at + 1):
        if list(wanted[at - repeated : at - repeated + size]) == ahead:
            return [f"{repeated} tokens are repeated at {at}: {seen}"]
    return [f"a foreign token at {at}: {seen}"]


async def ask(history: History, client: str, http: httpx.AsyncClient, request: Request) -> None:
    """Sends one request and records all that comes; what fails is recorded, not raised."""
    history.sent(client, request)
    reader = _Reader(history, client)
    headers = {"Content-Type": "application/json"}
    try:
        if not json.loads(request.body).get("stream"):
            answer = await http.post(request.route, content=request.body, headers=headers)
            if answer.status_code != 200:
                history.failed(client, f"{answer.status_code} {answer.text[:300]}")
                return
            reader.whole(answer.json())
            reader.end()
            return
        stream = http.stream("POST", request.route, content=request.body, headers=headers)
        async with stream as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                history.failed(client, f"{response.status_code} {text[:300]}")
                return
            async for line in response.aiter_lines():
                reader.line(line)
        reader.end()
    except httpx.HTTPError as error:
        history.failed(client, f"{type(error).__name__} {error}")


async def undisturbed(http: httpx.AsyncClient, request: Request) -> Answer:
    """The answer to a request while nothing happens. Raises ValueError if there is none."""
    history = History()
    await ask(history, "undisturbed", http, request)
    return history.answer("undisturbed")


class _Reader:
    """The answer to one request: whole, or chunk by chunk."""

    def __init__(self, history: History, client: str) -> None:
        self._history = history
        self._client = client
        self._next: dict[int, int] = {}
        self._finish: dict[int, str] = {}
        self._usage: tuple[int, int] | None = None
        self._done = False
        self._error = ""

    def line(self, line: str) -> None:
        """One line of a stream of events."""
        if not line.startswith("data: "):
            return
        data = line.removeprefix("data: ")
        if self._done:
            self._error = "something behind [DONE]"
        elif data == "[DONE]":
            self._done = True
        else:
            self.read(json.loads(data))

    def whole(self, answer: dict[str, Any]) -> None:
        """An answer that is not streamed."""
        self.read(answer)
        self._done = True

    def read(self, event: dict[str, Any]) -> None:
        """One chunk, or a whole answer."""
        if "error" in event:
            self._error = str(event["error"])
            return
        if usage := event.get("usage"):
            self._usage = (usage["prompt_tokens"], usage["completion_tokens"])
        for choice in event.get("choices", ()):
            index = choice["index"]
            for token in choice.get("token_ids") or ():
                at = self._next.get(index, 0)
                self._next[index] = at + 1
                self._history.token(self._client, at, str(token), index)
            said = choice.get("delta") or choice.get("message") or choice
            self._history.shown(self._client, said.get("text") or said.get("content") or "", index)
            if choice.get("finish_reason"):
                if index in self._finish:
                    self._error = f"choice {index} finished twice"
                self._finish[index] = choice["finish_reason"]

    def end(self) -> None:
        """The connection gave all it will give."""
        if self._error:
            self._history.failed(self._client, self._error)
        elif not self._done or self._usage is None or not self._finish:
            what = "the answer was cut: no finish reason, no usage or no [DONE]"
            self._history.failed(self._client, what)
        else:
            finish = tuple(self._finish[index] for index in sorted(self._finish))
            self._history.ended(self._client, finish, self._usage)
