"""The operator's routes on models: GET /admin/models, load, unload, and POST /admin/reload.

Owns their JSON. Names are looked up among the configured ones and used for nothing else. A change
that was begun goes on when its client leaves.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send

from router.api.http import send_json
from router.errors import BadRequest, Overloaded, StartError
from router.roster import ModelState, ModelView, Roster
from router.text.served import ServedModel
from router.turnover import Turnover


class Operator:
    """What the operator may do with models."""

    def __init__(self, roster: Roster, turnover: Turnover) -> None:
        self._roster = roster
        self._turnover = turnover

    async def list(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Every model with its state and replicas."""
        views = [self._roster.view(entry) for entry in self._roster.shown]
        await send_json(send, {"object": "list", "data": [_entry(view) for view in views]})

    async def load(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Starts its engines and waits until one serves. Raises ModelNotFound, Overloaded."""
        work = self._roster.load(scope["path_params"]["name"])
        try:
            view = await asyncio.shield(self._roster.spawn(work))
        except StartError as error:
            raise Overloaded(error.message, retry_after_s=30) from error
        await send_json(send, _entry(view))

    async def unload(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Takes its engines away after what runs. Raises ModelNotFound."""
        work = self._roster.unload(scope["path_params"]["name"])
        view = await asyncio.shield(self._roster.spawn(work))
        await send_json(send, _entry(view))

    async def reload(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Reads the configuration again. Raises BadRequest, which says what is wrong with it."""
        try:
            done = await asyncio.shield(self._roster.spawn(self._turnover.reload()))
        except StartError as error:
            message = error.message
            if self._turnover.file:  # where it lies is nobody's business
                message = message.replace(self._turnover.file, "the configuration file")
            raise BadRequest(message, code="invalid_configuration") from error
        changes = [
            {"model": change.model, "change": change.kind, "detail": change.detail}
            for change in done.models
        ]
        await send_json(send, {"object": "reload", "models": changes, "limits": done.limits})

    def state_of(self, model: ServedModel) -> ModelState:
        """Of a model that clients see."""
        return self._roster.state(self._roster.find(model.name))


def _entry(view: ModelView) -> dict[str, Any]:
    return {
        "id": view.names[0],
        "object": "model",
        "names": list(view.names),
        "state": view.state,
        "waiting": view.waiting,
        "needed_bytes": view.needed_bytes,
        "replicas": [
            {"index": index, "device": device, "state": state}
            for index, device, state in view.replicas
        ],
    }
