"""Models that come and go while a worker serves: two steps, all workers or none, nobody's request lost."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from dlops.artifact import Artifact
from dlops.errors import DlopsError, MachineError
from dlops.serve import control as controls
from dlops.serve.answers import NotReadyError, UnknownModelError, UnsupportedError
from dlops.serve.cells import Cells
from dlops.serve.control import Control, LoadError, State, read_state, write_state
from dlops.serve.metrics import Metrics
from dlops.serve.model import ServedModel
from dlops.serve.models import Models
from dlops.serve.repository import Repository
from dlops.serve.settings import Settings

X = np.zeros((1, 1, 8, 8), np.float32)


class Worker:
    """What one process of a server has of the models."""

    def __init__(self, root: Path, folder: Path, *, control: str = "explicit", versions: int | None = 1) -> None:
        settings = Settings(device="cpu", threads=1, model_control=control)
        self.models = Models()
        self.metrics = Metrics(Cells(folder))
        self.repository = Repository([root], versions=versions)
        if not (folder / "state.json").exists():
            write_state(folder, State(generation=1, entries=self.repository.entries()))
        self.control = Control(self.models, self.repository, settings, self.metrics, folder)

    @property
    def served(self) -> list[tuple[str, str]]:
        return [(model.name, model.version) for model in self.models]


@pytest.fixture
def root(digits_artifact: Artifact, tmp_path: Path) -> Path:
    shutil.copytree(digits_artifact.directory, tmp_path / "models/digits/1")
    return tmp_path / "models"


@pytest.fixture
def add(digits_artifact: Artifact, root: Path) -> Callable[[str], Path]:
    """add("digits/2"): one more in the repository."""

    def copy(where: str) -> Path:
        return Path(shutil.copytree(digits_artifact.directory, root / where))

    return copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "server").mkdir()
    return tmp_path / "server"


@asynccontextmanager
async def begun(worker: Worker) -> AsyncIterator[Worker]:
    await worker.control.begin()
    worker.models.is_loaded = True
    try:
        yield worker
    finally:
        await worker.control.end()


def test_a_new_version_takes_the_place_of_the_old_one(root: Path, folder: Path, add) -> None:
    async def scenario() -> None:
        worker = Worker(root, folder)
        with pytest.raises(NotReadyError):
            worker.models.find("digits")
        async with begun(worker):
            first = worker.models.find("digits")
            assert worker.served == [("digits", "1")]
            assert list(worker.models.paths) == [b"/v2/models/digits/infer", b"/v2/models/digits/versions/1/infer"]
            add("digits/2")
            # Not before somebody says so.
            assert worker.served == [("digits", "1")]
            assert await worker.control.index() == [
                {"name": "digits", "version": "1", "state": "READY", "reason": ""},
                {"name": "digits", "version": "2", "state": "UNAVAILABLE", "reason": "not loaded"},
            ]
            await worker.control.load("digits")
            assert worker.served == [("digits", "2")]
            assert worker.models.find("digits") is not first
            with pytest.raises(UnknownModelError, match="unknown version '1' of digits, there is 2"):
                worker.models.find("digits", "1")
            answer = await worker.models.find("digits").queue.submit({"image": X}, rows=1)
            assert answer.outputs["logits"].shape == (1, 10)
            await closed(first)
            # Once more changes nothing.
            second = worker.models.find("digits")
            await worker.control.load("digits")
            assert worker.models.find("digits") is second

    asyncio.run(scenario())


async def closed(model: ServedModel) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                model.queue.put({"image": X}, rows=1, deliver=lambda answer: None)
            except DlopsError:
                return
            await asyncio.sleep(0.01)


def test_what_came_to_the_old_version_is_answered_by_it(root: Path, folder: Path, add) -> None:
    async def scenario() -> None:
        async with begun(Worker(root, folder)) as worker:
            old = worker.models.find("digits")
            with old.used():  # a request whose body has not come whole yet
                add("digits/2")
                await worker.control.load("digits")
                await asyncio.sleep(0.05)
                answer = await old.queue.submit({"image": X}, rows=1)
                assert answer.outputs["logits"].shape == (1, 10)
            await closed(old)

    asyncio.run(scenario())


def test_several_models_and_versions_side_by_side(root: Path, folder: Path, add) -> None:
    async def scenario() -> None:
        add("digits/2")
        async with begun(Worker(root, folder, versions=None)) as worker:
            assert worker.served == [("digits", "2"), ("digits", "1")]
            assert worker.models.find("digits").version == "2"
            assert worker.models.find("digits", "1").version == "1"
            # One name: where none is said it is meant, in its newest version.
            assert worker.models.only().version == "2"
            add("numbers/7")
            await worker.control.load("numbers")
            assert worker.served == [("digits", "2"), ("digits", "1"), ("numbers", "7")]
            with pytest.raises(DlopsError, match=r"which model\? this server has digits, numbers"):
                worker.models.only()
            worker.metrics.show_load(worker.models)
            worker.metrics.queue_rows.set("digits", to=3)
            await worker.control.unload("digits")
            assert worker.served == [("numbers", "7")]
            worker.metrics.show_load(worker.models)
            assert 'dlops_queue_rows{model="digits"} 0.0' in worker.metrics.render().decode()
            with pytest.raises(UnknownModelError, match="unknown model 'digits', this server has numbers"):
                worker.models.find("digits")
            with pytest.raises(UnknownModelError, match="no model 'digits' is served"):
                await worker.control.unload("digits")
            with pytest.raises(UnknownModelError, match="no model 'other' is in the repository"):
                await worker.control.load("other")
            await worker.control.unload("numbers")
            assert worker.served == []
            assert worker.models.is_loaded
            with pytest.raises(UnknownModelError, match="this server has none"):
                worker.models.find("digits")

    asyncio.run(scenario())


def test_one_that_fails_its_self_test_leaves_all_as_it_was(
    root: Path, folder: Path, add, make_digits_artifact, monkeypatch
) -> None:
    async def scenario() -> None:
        async with begun(Worker(root, folder)) as worker:
            first = worker.models.find("digits")
            make_digits_artifact(root / "digits/2", scale=1.5)
            with pytest.raises(LoadError, match="outputs differ from the reference"):
                await worker.control.load("digits")
            assert worker.models.find("digits") is first
            state = read_state(folder)
            assert (state.preparing, [entry.version for entry in state.entries]) == (None, ["1"])
            (add("digits/3") / "artifact.json").write_text("{")
            with pytest.raises(LoadError, match="digits/3"):
                await worker.control.load("digits")
            shutil.rmtree(root / "digits/3")
            shutil.rmtree(root / "digits/2")
            add("digits/2")
            await worker.control.load("digits")
            assert worker.served == [("digits", "2")]

    asyncio.run(scenario())


def test_the_same_version_with_other_content_is_loaded_anew(root: Path, folder: Path, make_digits_artifact) -> None:
    async def scenario() -> None:
        async with begun(Worker(root, folder)) as worker:
            first = worker.models.find("digits", "1")
            shutil.rmtree(root / "digits/1")
            make_digits_artifact(root / "digits/1", name="others")
            await worker.control.load("digits")
            assert worker.served == [("digits", "1")]
            assert worker.models.find("digits", "1") is not first
            await closed(first)
            # What is served is shown as such, whatever has gone that had the same labels.
            text = worker.metrics.render().decode()
            assert 'dlops_model_info{device="cpu",model="digits"' in text

    asyncio.run(scenario())


def test_all_workers_follow_or_none_does(root: Path, folder: Path, add, monkeypatch) -> None:
    """Two workers in one process: each has a number of its own to report under."""

    async def scenario() -> None:
        numbers = {}
        one, other = Worker(root, folder), Worker(root, folder)
        for number, worker in enumerate((one, other), start=1):
            numbers[worker] = number
            monkeypatch.setattr(worker.metrics.cells, "living", lambda: [1, 2])
        real = controls.Control._report

        def report(self: Control, generation: int, error: str | None) -> None:
            number = 1 if self is one.control else 2
            monkeypatch.setattr(controls.os, "getpid", lambda: number)
            real(self, generation, error)

        monkeypatch.setattr(Control, "_report", report)
        for worker in (one, other):
            await worker.control.begin()
            worker.models.is_loaded = True
        follower = asyncio.ensure_future(other.control.follow())
        add("digits/2")
        await one.control.load("digits")
        assert one.served == other.served == [("digits", "2")]
        # Asked at the other one, while the first only follows; and there it cannot be loaded.
        following = asyncio.ensure_future(one.control.follow())
        add("digits/3")
        load, here = controls.load_model, threading.get_ident()

        def fails_there(entry, settings, metrics):
            if metrics is one.metrics and entry.version == "3":
                raise RuntimeError("no memory left there")
            assert threading.get_ident() != here
            return load(entry, settings, metrics)

        monkeypatch.setattr(controls, "load_model", fails_there)
        with pytest.raises(LoadError, match="RuntimeError: no memory left there"):
            await other.control.load("digits")
        await asyncio.sleep(0.3)
        assert one.served == other.served == [("digits", "2")]
        assert read_state(folder).preparing is None
        monkeypatch.setattr(controls, "load_model", load)
        await other.control.load("digits")
        assert one.served == other.served == [("digits", "3")]
        for task in (follower, following):
            task.cancel()
        await one.control.end()
        await other.control.end()

    asyncio.run(scenario())


def test_a_worker_without_a_free_file_descriptor_follows_once_it_has_one(
    root: Path, folder: Path, monkeypatch, capsys
) -> None:
    async def scenario() -> None:
        async with begun(Worker(root, folder)) as worker:
            looks: list[bool] = []
            look = worker.control._catch_up

            async def catch_up() -> None:
                looks.append(True)
                if len(looks) == 1:
                    raise OSError(errno.EMFILE, "Too many open files")
                await look()

            monkeypatch.setattr(worker.control, "_catch_up", catch_up)
            monkeypatch.setattr(controls, "_FOLLOW_AGAIN_S", 0.01)
            follower = asyncio.ensure_future(worker.control.follow())
            while len(looks) < 3:
                assert not follower.done()
                await asyncio.sleep(0.01)
            follower.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert "Too many open files" in capsys.readouterr().err


def test_a_report_that_could_not_be_written_is_written_again(
    root: Path, folder: Path, add, monkeypatch, capsys
) -> None:
    async def scenario() -> None:
        async with begun(Worker(root, folder)) as worker:
            add("digits/2")
            write, tries = controls.write_json, []

            def full(path: Path, text: str) -> None:
                tries.append(path)
                if len(tries) == 1:
                    raise MachineError("no space left on device")
                write(path, text)

            newest = [entry for entry in worker.repository.entries() if entry.version == "2"]
            write_state(folder, State(generation=2, entries=tuple(newest)))
            monkeypatch.setattr(controls, "write_json", full)
            monkeypatch.setattr(controls, "_FOLLOW_AGAIN_S", 0.01)
            follower = asyncio.ensure_future(worker.control.follow())
            while (report := worker.control._report_of(os.getpid())) is None or report.generation != 2:
                assert not follower.done()
                await asyncio.sleep(0.01)
            assert worker.served == [("digits", "2")]
            follower.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert "no space left on device" in capsys.readouterr().err


def test_a_worker_that_cannot_serve_what_the_others_do_tries_again(
    root: Path, folder: Path, add, monkeypatch, capsys
) -> None:
    async def scenario() -> None:
        async with begun(Worker(root, folder)) as worker:
            add("digits/2")
            load, tries = controls.load_model, []

            def fails(entry, settings, metrics):
                tries.append(entry)
                if len(tries) < 3:
                    raise RuntimeError("no memory left")
                return load(entry, settings, metrics)

            monkeypatch.setattr(controls, "load_model", fails)
            monkeypatch.setattr(controls, "_FOLLOW_AGAIN_S", 0.05)
            newest = [entry for entry in worker.repository.entries() if entry.version == "2"]
            write_state(folder, State(generation=2, entries=tuple(newest)))
            follower = asyncio.ensure_future(worker.control.follow())
            while not worker.control.is_behind:
                await asyncio.sleep(0.01)
            assert worker.served == [("digits", "1")]
            assert "no memory left" in worker.control._report_of(os.getpid()).error
            while worker.control.is_behind:
                await asyncio.sleep(0.01)
            assert worker.served == [("digits", "2")]
            assert worker.control._report_of(os.getpid()).error is None
            follower.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert capsys.readouterr().err.count("a worker cannot serve what it is to, and tries again") == 2


def test_a_change_whose_client_left_comes_to_its_end(root: Path, folder: Path, add) -> None:
    async def scenario() -> None:
        async with begun(Worker(root, folder)) as worker:
            add("digits/2")
            asked = asyncio.ensure_future(worker.control.load("digits"))
            await asyncio.sleep(0)
            asked.cancel()
            async with asyncio.timeout(10):
                while worker.served != [("digits", "2")]:
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_a_worker_that_comes_in_the_middle_of_a_change_serves_what_is_served(root: Path, folder: Path, add) -> None:
    async def scenario() -> None:
        first = Repository([root]).entries()
        add("digits/2")
        write_state(folder, State(generation=4, entries=first, preparing=Repository([root]).entries()))
        async with begun(Worker(root, folder)) as worker:
            assert worker.served == [("digits", "1")]
            # One whose driver was killed: the next change goes on from what is served.
            await worker.control.load("digits")
            assert worker.served == [("digits", "2")]

    asyncio.run(scenario())


def test_models_stay_as_they_are_unless_that_was_allowed(root: Path, folder: Path) -> None:
    async def scenario() -> None:
        async with begun(Worker(root, folder, control="none")) as worker:
            for change in (worker.control.load, worker.control.unload):
                with pytest.raises(UnsupportedError, match="--model-control explicit"):
                    await change("digits")
            assert await worker.control.index(ready=True) == [
                {"name": "digits", "version": "1", "state": "READY", "reason": ""}
            ]

    asyncio.run(scenario())
