"""The operator's routes: GET /admin/replicas, POST /admin/replicas/{id}/drain and …/restart.

Owns their JSON. Must not know how an action is done. Who may call them is in `auth.AdminCheck`.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec
from starlette.types import Receive, Scope, Send

from router.api.http import send_json
from router.errors import ReplicaNotFound
from router.operations import Operations, ReplicaRow


class ReplicaList(msgspec.Struct, frozen=True):
    """All replicas."""

    object: Literal["list"]
    data: list[ReplicaRow]


class Replicas:
    """The routes on replicas. An action is answered at once with the replica as it is then: what it
    started goes on, and GET /admin/replicas shows it."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def list(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """All of them."""
        await send_json(send, ReplicaList("list", self._operations.rows()))

    async def drain(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Hands its streams over and stops it until it is restarted.

        Raises ReplicaNotFound, Conflict.
        """
        self._operations.drain(index := _index(scope))
        await self._answer(send, index)

    async def restart(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Hands its streams over and starts it anew. Raises ReplicaNotFound, Conflict."""
        self._operations.restart(index := _index(scope))
        await self._answer(send, index)

    async def _answer(self, send: Send, index: int) -> None:
        await send_json(send, self._operations.row(index))


def _index(scope: Scope) -> int:
    text: str = scope["path_params"]["id"]
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ReplicaNotFound
    return int(text)
