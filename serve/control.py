"""Which models all workers of a server serve, and how that changes while they do.

What is to be served stands in one file that every worker follows. A change goes in two steps: all workers load what is
new and keep it aside, and only when the last of them has done so do all begin to serve it. So one that fails anywhere
leaves everything as it was, no request meets a model that is half there, and what came before the change is answered
by the model that it came to.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from dlops.console import say
from dlops.directory import write_json
from dlops.errors import DlopsError, UsageError
from dlops.manifest import Record
from dlops.serve.answers import UnknownModelError, UnsupportedError
from dlops.serve.metrics import Metrics
from dlops.serve.model import ServedModel, load_model
from dlops.serve.models import Models
from dlops.serve.repository import Entry, Repository
from dlops.serve.settings import Settings

_STATE = "state.json"
_LOCK = "control.lock"
_FOLLOW_S = 0.1
# Where that failed.
_FOLLOW_AGAIN_S = 1.0
_POLL_S = 0.02
# Every worker has loaded by then, or the change is taken back.
_LOADED_WITHIN_S = 900.0


class State(Record):
    """entries: to be served. preparing: to be loaded and kept aside; null where nothing is about to change."""

    generation: int
    entries: tuple[Entry, ...]
    preparing: tuple[Entry, ...] | None = None


class _Report(Record):
    """How far a worker has come, and why it could not follow."""

    generation: int
    error: str | None = None


class LoadError(DlopsError):
    """A model could not be loaded; what was served before still is."""


def _nothing(message: str) -> None:
    """Said by another worker."""


class Control:
    """Of one worker. folder: the server's, with the state that `write_state` left there. worker: which, from 1."""

    def __init__(
        self, models: Models, repository: Repository, settings: Settings, metrics: Metrics, folder: Path, *,
        worker: int = 1,
    ) -> None:  # fmt: skip
        self._models = models
        self._repository = repository
        self._settings = settings
        self._metrics = metrics
        self._folder = folder
        # All workers serve the same, so one says what.
        self._say = say if worker == 1 else _nothing
        self._generation = 0
        self.is_behind = False
        """Whether it could not follow what the others serve by now; it tries again."""
        self._serving: dict[Entry, ServedModel] = {}
        self._aside: dict[Entry, ServedModel] = {}
        self._following = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Load what is to be served; who calls this says when it may be asked. Raises what loading raises."""
        async with self._following:
            state = read_state(self._folder)
            await self._serve(state.entries, first=True)
            # One that came in the middle of a change follows it as the others do.
            self._generation = state.generation if state.preparing is None else 0
            self._report(self._generation, None)

    async def follow(self) -> None:
        """Do what the state says, again and again."""
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                await self._catch_up()
            except FileNotFoundError:  # the server has ended, and its folder with it
                return
            except Exception as error:  # noqa: BLE001 - no file descriptor is free, say: the next look may succeed
                say(f"looking for what is to be served: {error}")
                await asyncio.sleep(_FOLLOW_AGAIN_S)
            if self.is_behind:
                await asyncio.sleep(_FOLLOW_AGAIN_S)

    async def end(self) -> None:
        """Answer what waits, then free all models."""
        serving, self._serving = self._serving, {}
        await asyncio.gather(*[asyncio.to_thread(model.close) for model in (*serving.values(), *self._aside.values())])

    async def load(self, name: str, *, parameters: object = None) -> None:
        """Serve what the repository has of this name now, on all workers.

        parameters: of the request; in Triton's they are a configuration and files. Raises UnknownModelError, LoadError,
        and UnsupportedError where there are any, or where models are not to be changed.
        """
        self._check_allowed()
        if parameters:
            raise UnsupportedError("a model's configuration and files come from the repository alone", hint="send none")

        async def change() -> None:
            async with self._alone():
                found, damaged = await asyncio.to_thread(self._repository.readable)
                for one in damaged:
                    if one.name == name:
                        raise LoadError(one.reason)
                chosen = [entry for entry in found if entry.name == name]
                if not chosen:
                    raise UnknownModelError(f"no model {name[:200]!r} is in the repository")
                entries = read_state(self._folder).entries
                first = next((at for at, entry in enumerate(entries) if entry.name == name), len(entries))
                others = [[e for e in part if e.name != name] for part in (entries[:first], entries[first:])]
                await self._change((*others[0], *chosen, *others[1]))

        await self._to_its_end(change())

    async def unload(self, name: str) -> None:
        """Serve nothing of this name any more, on any worker. Raises UnknownModelError, UnsupportedError."""
        self._check_allowed()

        async def change() -> None:
            async with self._alone():
                entries = read_state(self._folder).entries
                left = tuple(entry for entry in entries if entry.name != name)
                if left == entries:
                    raise UnknownModelError(f"no model {name[:200]!r} is served")
                await self._change(left)

        await self._to_its_end(change())

    async def index(self, *, ready: bool = False) -> list[dict[str, str]]:
        """Everything in the repository and everything that is served. ready: the latter alone."""
        served = read_state(self._folder).entries
        rows = {(entry.name, entry.version): ("READY", "") for entry in served}
        if not ready:
            with suppress(UsageError):  # its folder has gone; what is served still is
                found, damaged = await asyncio.to_thread(self._repository.readable)
                for entry in found:
                    rows.setdefault((entry.name, entry.version), ("UNAVAILABLE", "not loaded"))
                for one in damaged:
                    rows.setdefault((one.name, one.version), ("UNAVAILABLE", one.reason))
        return [
            {"name": name, "version": version, "state": state, "reason": reason}
            for (name, version), (state, reason) in sorted(rows.items())
        ]

    def _check_allowed(self) -> None:
        if self._settings.model_control != "explicit":
            raise UnsupportedError(
                "this server's models do not change while it runs", hint="start it with --model-control explicit"
            )

    async def _to_its_end(self, change: Coroutine[Any, Any, None]) -> None:
        """A client that leaves, or is told that it waited too long, leaves no change half made."""
        await asyncio.shield(self._begin(change))

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One change at a time, whichever worker was asked for it; a killed one's lock goes with it."""
        async with self._changing:
            with (self._folder / _LOCK).open("wb") as file:
                await asyncio.to_thread(fcntl.flock, file.fileno(), fcntl.LOCK_EX)
                yield

    async def _change(self, entries: tuple[Entry, ...]) -> None:
        state = read_state(self._folder)
        if entries == state.entries and state.preparing is None:
            return
        try:
            if not set(entries) <= set(state.entries):
                state = await self._publish(
                    State(generation=state.generation + 1, entries=state.entries, preparing=entries)
                )
        except DlopsError:
            await self._publish(State(generation=state.generation + 2, entries=state.entries))
            raise
        await self._publish(State(generation=state.generation + 1, entries=entries))

    async def _publish(self, state: State) -> State:
        """Write it and wait until every living worker has followed. Raises LoadError with the first one's reason."""
        write_state(self._folder, state)
        deadline = time.monotonic() + _LOADED_WITHIN_S
        await self._catch_up()
        while True:
            reports = [self._report_of(pid) for pid in self._metrics.cells.living()]
            for report in reports:
                if report is not None and report.generation == state.generation and report.error is not None:
                    raise LoadError(report.error)
            if all(report is not None and report.generation >= state.generation for report in reports):
                return state
            if time.monotonic() > deadline:
                raise LoadError(f"a worker has not followed within {_LOADED_WITHIN_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def _catch_up(self) -> None:
        async with self._following:
            state = read_state(self._folder)
            if state.generation == self._generation:
                return
            error = None
            try:
                if state.preparing is None:
                    await self._serve(state.entries)
                else:
                    await self._prepare(state.preparing)
            except DlopsError as problem:
                error = str(problem)
            except Exception as problem:  # noqa: BLE001 - a runtime's: whoever asked for the change is told
                error = f"{type(problem).__name__}: {problem}"
            # A failed preparation is undone, by all; what is to be served is served by the others.
            self.is_behind = error is not None and state.preparing is None
            if self.is_behind:
                say(f"a worker cannot serve what it is to, and tries again in {_FOLLOW_AGAIN_S:g} s: {error}")
            self._report(state.generation, error)
            # Not before that: a report that was not written is written again.
            if not self.is_behind:
                self._generation = state.generation

    async def _prepare(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry not in self._serving and entry not in self._aside:
                self._aside[entry] = await asyncio.to_thread(load_model, entry, self._settings, self._metrics)

    async def _serve(self, entries: tuple[Entry, ...], *, first: bool = False) -> None:
        await self._prepare(entries)
        before, aside = self._serving, self._aside
        self._serving = {entry: before[entry] if entry in before else aside[entry] for entry in entries}
        self._aside = {}
        self._models.replace(list(self._serving.values()), first=first)
        for entry, model in {**before, **aside}.items():
            if entry not in self._serving:
                # Before the new ones are shown: another one may have the same labels.
                self._metrics.model.set(*model.describe().values(), to=0)
                self._begin(self._retire(model, served=entry in before))
        for entry, model in self._serving.items():
            if entry not in before:
                self._metrics.model.set(*model.describe().values(), to=1)
                self._say(f"serving {model.summary()}: self-test passed, ready")
        for name in {entry.name for entry in (*before, *entries)}:
            instances = sum(len(model.instances) for model in self._serving.values() if model.name == name)
            self._metrics.instances.set(name, to=instances)

    async def _retire(self, model: ServedModel, *, served: bool) -> None:
        await model.retire()
        if served:
            self._say(f"no longer serving {model.title} ({model.artifact.slug})")

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept until it is done: the event loop itself would not."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _report(self, generation: int, error: str | None) -> None:
        write_json(
            self._folder / _report_name(os.getpid()), _Report(generation=generation, error=error).model_dump_json()
        )

    def _report_of(self, pid: int) -> _Report | None:
        try:
            return _Report.model_validate_json((self._folder / _report_name(pid)).read_bytes())
        except FileNotFoundError:  # it loads what is served so far
            return None


def write_state(folder: Path, state: State) -> None:
    """Replaced whole, because every worker may look at any moment."""
    write_json(folder / _STATE, state.model_dump_json())


def read_state(folder: Path) -> State:
    """What `write_state` wrote last."""
    return State.model_validate_json((folder / _STATE).read_bytes())


def _report_name(pid: int) -> str:
    return f"{pid}.report.json"
