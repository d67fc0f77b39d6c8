"""What is told of a request when it is over. Owns nothing that lasts; must not know HTTP."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestRecord:
    """What the one log line of a request will say. Times in seconds of the monotonic clock."""

    request_id: str
    started_s: float
    created_s: int = 0  # unix time
    route: str = ""  # the route's pattern, never the client's path
    model: str = ""
    status: int = 0
    code: str = ""
    texts: int = 0  # to be embedded
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int | None = None  # of those; None where thinking is not looked for
    finish: str = ""
    queue_s: float | None = None
    ttft_s: float | None = None
    moves: int = 0  # continued on another engine

    def fields(self) -> dict[str, str | int | float | None]:
        """As fields of a log event; empty ones are left out."""
        values: dict[str, str | int | float | None] = {
            "request_id": self.request_id,
            "route": self.route,
            "model": self.model,
            "status": self.status,
            "code": self.code,
            "texts": self.texts,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "finish": self.finish,
            "queue_s": None if self.queue_s is None else round(self.queue_s, 6),
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "moves": self.moves,
        }
        return {key: value for key, value in values.items() if value or key == "status"}
