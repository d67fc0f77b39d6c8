"""Carries out a changed configuration under load: load first, then show, then let the old ones end.

Owns the configuration that is in force, and the order of the steps; each step is the roster's. Must
not know HTTP or files.

    newcomers       load, then are shown
    exchanged ones  the first new engine serves, then newcomers go there and the old ones finish;
                    without memory for both, old replicas hand over their streams and make room
    removed ones    are hidden, then finish
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from router import logs
from router.config import RouterConfig
from router.errors import EXIT_CONFIG, EXIT_NO_MEMORY, ModelNotFound, Overloaded, StartError
from router.planning import PlannedModel, Running
from router.reload import Change, Kind, compare, fixed_changes, limit_changes
from router.roster import Entry, Planner, Roster, held

Limit = Callable[[RouterConfig, Iterable[PlannedModel]], None]


class Reloaded(NamedTuple):
    """What a reload changed."""

    models: list[Change]
    limits: list[str]

    @property
    def sentences(self) -> list[str]:
        """For people."""
        return [*map(_sentence, self.models), *self.limits]


class Turnover:
    """Reloads, one after the other."""

    def __init__(
        self, roster: Roster, planner: Planner, config: RouterConfig, limit: Limit
    ) -> None:
        """`limit` puts the limits of a configuration into force."""
        self._roster = roster
        self._planner = planner
        self._config = config
        self._limit = limit

    @property
    def file(self) -> str:
        """The configuration file, "" if there is none."""
        return self._config.file

    async def reload(self) -> Reloaded:
        """Reads the configuration again and carries out what differs.

        Raises StartError. What is wrong, does not fit, or is a newcomer that does not load is found
        before anything that runs is touched.
        """
        try:
            async with self._roster.changing:
                done = await self._reload()
        except StartError as error:
            logs.error("reload_refused", reason=error.message)
            raise
        logs.info("reloaded", changes="; ".join(done.sentences) or "none")
        return done

    async def _reload(self) -> Reloaded:
        config = await asyncio.to_thread(self._planner.read)
        fixed = fixed_changes(self._config, config)
        if fixed:
            text = f"{', '.join(fixed)}: cannot change while the server runs, restart it for that"
            raise StartError(text, EXIT_CONFIG)
        running = [Running(entry.planned, self._is_loaded(entry)) for entry in self._roster.shown]
        planned = await asyncio.to_thread(self._planner.plan, config, running)
        done = Reloaded(
            compare([each.planned.wanted for each in running], [each.wanted for each in planned]),
            limit_changes(self._config, config),
        )
        await self._carry_out(done.models, planned)
        self._config = config
        self._roster.limits = config.limits
        self._limit(config, planned)
        return done

    def _is_loaded(self, entry: Entry) -> bool:
        return not set(self._roster.states(entry)) <= {"asleep"}

    async def _carry_out(self, changes: Sequence[Change], planned: Sequence[PlannedModel]) -> None:
        new = {model.served.name: model for model in planned}
        entries = {entry.name: entry for entry in self._roster.shown}

        def names(kind: Kind) -> list[str]:
            return [change.model for change in changes if change.kind == kind]

        added = [self._roster.enter(new[name]) for name in names("add")]
        later = await self._load(added, can_wait=bool(names("remove") or names("replace")))
        self._show([*self._roster.shown, *(e for e in added if e not in later)], planned)
        for name in names("rename"):
            entries[name].planned = new[name]
            self._show(self._roster.shown, planned)
        for name in names("replicas"):
            await self._resize(entries[name], new[name])
        for name in names("replace"):
            await self._exchange(entries[name], new[name])
        for name in names("remove"):
            await self._remove(entries[name])
        await self._load(later, can_wait=False)
        self._show([*self._roster.shown, *later], planned)

    def _show(self, entries: Sequence[Entry], planned: Sequence[PlannedModel]) -> None:
        """In the order of the configuration; what it does not name comes last."""
        order = {model.served.name: place for place, model in enumerate(planned)}
        self._roster.show(sorted(entries, key=lambda entry: order.get(entry.name, len(order))))

    async def _load(self, entries: Sequence[Entry], *, can_wait: bool) -> list[Entry]:
        """Loads newcomers; returns those for whom others must make room first.

        Raises StartError, and none of them is there then.
        """
        later: list[Entry] = []
        try:
            for entry in entries:
                with held(entry):
                    problem = await self._roster.start(entry, list(entry.engines))
                    if problem and not can_wait:
                        raise StartError(problem, EXIT_NO_MEMORY)
                    if problem:
                        later.append(entry)
                    else:
                        for index in entry.engines:
                            await self._roster.serves(entry, [index])
        except StartError:
            for entry in entries:
                await self._roster.leave(entry, "It did not load.", Overloaded)
            raise
        return later

    async def _resize(self, entry: Entry, planned: PlannedModel) -> None:
        """More or fewer replicas of one model."""
        have = list(entry.engines.items())
        kept = {id(engine) for engine in planned.engines}
        known = {id(engine) for _, engine in have}
        loaded = self._is_loaded(entry)
        with held(entry):
            for engine in planned.engines:
                if id(engine) in known:
                    continue
                index = self._roster.add_replica(entry, engine)
                if loaded:
                    await self._start_one(entry, index)
            for index, engine in have:
                if id(engine) not in kept:
                    await self._roster.drop(entry, index, "it is not wanted any more")
            entry.planned = planned

    async def _start_one(self, entry: Entry, index: int) -> None:
        """One more replica; if it does not load, it is not there. Raises StartError."""
        try:
            problem = await self._roster.start(entry, [index])
            if problem:
                raise StartError(problem, EXIT_NO_MEMORY)
            await self._roster.serves(entry, [index])
        except StartError:
            await self._roster.drop(entry, index, "it did not load")
            raise

    async def _exchange(self, old: Entry, planned: PlannedModel) -> None:
        """The name comes to mean another model. What the old one began, it ends."""
        served = replace(planned.served, version=old.served.version + 1)
        new = self._roster.enter(planned._replace(served=served))
        with held(old), held(new):
            if self._is_loaded(old):
                try:
                    await self._replace_engines(old, new)
                except StartError:
                    if old.engines:
                        self._switch(new, old)
                        await self._roster.leave(new, "It did not load.", Overloaded)
                    raise
            else:
                self._roster.inherit(old, new)
                self._switch(old, new)
            gone = f"Model '{old.name}' was exchanged, try again."
            await self._roster.leave(old, gone, Overloaded)

    async def _replace_engines(self, old: Entry, new: Entry) -> None:
        for index in list(new.engines):
            while problem := await self._roster.lack(new, [index]):
                if not old.engines:
                    raise StartError(problem, EXIT_NO_MEMORY)
                if len(old.engines) == 1:  # newcomers queue for the new one, the rest may end
                    self._switch(old, new)
                    gone = f"Model '{old.name}' was exchanged, try again."
                    await self._roster.finish(old, gone, Overloaded)
                device = new.engines[index].device
                near = [at for at, engine in old.engines.items() if engine.device == device]
                await self._roster.drop(old, (near or list(old.engines))[-1], "it makes room")
            await self._roster.start(new, [index])
            await self._roster.serves(new, [index])
            self._switch(old, new)

    def _switch(self, old: Entry, new: Entry) -> None:
        """Newcomers go to `new` from now on."""
        self._roster.show([new if entry is old else entry for entry in self._roster.shown])

    async def _remove(self, entry: Entry) -> None:
        self._roster.show([each for each in self._roster.shown if each is not entry])
        with held(entry):
            await self._roster.leave(
                entry, "This model is not served here any more.", ModelNotFound
            )


def _sentence(change: Change) -> str:
    words = {
        "add": "added",
        "remove": "removed",
        "replace": "exchanged",
        "rename": "renamed",
        "replicas": "replicas",
    }
    detail = f" ({change.detail})" if change.detail else ""
    return f"{change.model}: {words[change.kind]}{detail}"
