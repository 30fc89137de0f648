"""A run's directory: what it was started with, how far it got, its curves, and at the end its checkpoint.

run.json         recipe and config, written once
.lock            empty; locked by the process that trains
resume.safe.pt   everything needed to go on, replaced whole after each epoch, gone when the run is finished
tensorboard/     curves
checkpoint.json  and its files: the run is finished
"""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, JsonValue
from torch import nn

from dlops.checkpoint import RUN_FILE, Checkpoint
from dlops.directory import write_json
from dlops.environment import available_cores
from dlops.errors import CorruptError, MachineError, UsageError, from_os_error
from dlops.manifest import Manifest, find_manifests, read_manifest
from dlops.version import __version__

CURVES_DIRECTORY = "tensorboard"
_STATE_FILE = "resume.safe.pt"
_LOCK_FILE = ".lock"


class RunRecord(Manifest):
    """run.json. threads: of torch on the CPU, all processes together; another number sums in another order."""

    file_name: ClassVar[str] = RUN_FILE

    kind: Literal["run"] = "run"
    schema_version: int = Field(1, alias="schema", ge=1)
    dlops_version: str = __version__
    created: datetime
    recipe: str
    config: dict[str, JsonValue]
    threads: int = Field(ge=1)


@dataclass(kw_only=True)
class State:
    """After `epoch` whole epochs. best_rank: accuracy and negative loss on validation of the epoch `best_epoch`.

    Random generators are not in it: each epoch seeds them anew from its number (see batches.py), in every process,
    so that nothing depends on what was drawn before. The learning rate is a function of the step.
    """

    data_digest: str
    epoch: int = 0
    best_epoch: int = 0
    best_rank: tuple[float, float] = (-1.0, 0.0)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    model: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    stopped_early: bool = False

    @property
    def epochs_since_best(self) -> int:
        return self.epoch - self.best_epoch

    def end_epoch(self, *, accuracy: float, loss: float, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Count the epoch, hold what it left, and its weights as the best where accuracy, or then loss, is better."""
        self.epoch += 1
        self.model, self.optimizer = network.state_dict(), optimizer.state_dict()
        if (accuracy, -loss) > self.best_rank:
            self.best_epoch, self.best_rank = self.epoch, (accuracy, -loss)
            self.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in self.model.items()}

    def forget_best(self) -> None:
        """Take the next epoch for the best so far, whatever was before."""
        self.best_epoch, self.best_rank = self.epoch, (-1.0, 0.0)

    def is_over(self, epochs: int) -> bool:
        return self.stopped_early or self.epoch >= epochs


def _as_state(content: object) -> State:
    """Raises TypeError unless it is what `save_state` wrote: every field, none else, each of its type."""
    kinds = {
        "data_digest": str, "epoch": int, "best_epoch": int, "best_rank": tuple, "best_weights": dict, "model": dict,
        "optimizer": dict, "stopped_early": bool,
    }  # fmt: skip
    if not isinstance(content, dict) or content.keys() != kinds.keys():
        found = ", ".join(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise TypeError(f"it holds {found or 'nothing'}")
    for name, kind in kinds.items():
        # A state_dict is an OrderedDict, and True an int.
        if not isinstance(content[name], kind) or (kind is int and isinstance(content[name], bool)):
            raise TypeError(f"{name} is a {type(content[name]).__name__}")
    rank = content["best_rank"]
    if len(rank) != 2 or not all(isinstance(value, float) for value in rank):
        raise TypeError(f"best_rank is {rank!r}")
    if not 0 <= content["best_epoch"] <= content["epoch"]:
        raise TypeError(f"best_epoch is {content['best_epoch']} of {content['epoch']}")
    return State(**content)


@dataclass(frozen=True, slots=True)
class Run:
    """directory: exists. threads: as in the record. resume: whether to go on from its state."""

    directory: Path
    recipe: str
    threads: int
    resume: bool = False

    def set_threads(self, *, processes: int) -> None:
        """Give this process its share of the run's threads, the same before and after a kill."""
        torch.set_num_threads(max(1, self.threads // processes))

    def load_state(self, *, data_digest: str) -> State:
        """The state to go on from, a new one where there is none.

        Raises UsageError where the data are not those that the run began with, CorruptError for a damaged file.
        """
        path = self.directory / _STATE_FILE
        if not self.resume or not self.has_state:
            return State(data_digest=data_digest)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            state = _as_state(content)
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise self._unusable(error) from None
        if state.data_digest != data_digest:
            raise UsageError(
                f"{self.directory}: the data have changed since this run began",
                hint="start a new run; going on would mix training and test images",
            )
        return state

    def restore(self, state: State, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load a saved state into both. Raises CorruptError where it is another network's or another optimizer's."""
        if not state.epoch:
            return
        try:
            # First into the network, to see that they fit: they are what the run will end with.
            network.load_state_dict(state.best_weights)
            network.load_state_dict(state.model)
            optimizer.load_state_dict(state.optimizer)
            for parameter, kept in optimizer.state.items():
                for name, value in kept.items():
                    if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                        raise ValueError(f"{name} is {list(value.shape)} for weights of {list(parameter.shape)}")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> CorruptError:
        # PyTorch lists what does not fit over many lines.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return CorruptError(
            f"{self.directory / _STATE_FILE}: not a state that dlops can go on from ({reason})",
            hint="start anew with another --run-dir",
        )

    def save_state(self, state: State) -> None:
        """Replace the state whole: a kill leaves the last epoch's or this one."""
        path = self.directory / _STATE_FILE
        partial = path.with_name(f".{path.name}.partial")
        buffer = io.BytesIO()
        torch.save({name: getattr(state, name) for name in State.__dataclass_fields__}, buffer)
        try:
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise from_os_error(error, doing=f"writing {path}") from error

    def drop_state(self) -> None:
        (self.directory / _STATE_FILE).unlink(missing_ok=True)

    @property
    def has_state(self) -> bool:
        return (self.directory / _STATE_FILE).is_file()

    @property
    def is_finished(self) -> bool:
        return (self.directory / Checkpoint.file_name).is_file()


@contextmanager
def begin(recipe: str, config: Mapping[str, JsonValue], *, directory: Path | None) -> Iterator[Run]:
    """A new run in `directory`, else in runs/<recipe>/<time>, held against other processes while the block runs.

    An error out of the block before the first state was saved takes the run away again: there is nothing to go on
    with, and whatever is wrong would be wrong again. An interrupted run stays.
    """
    root = Path("runs") / recipe
    made = [path for path in ((directory or root), *(directory or root).parents) if not path.exists()]
    if directory is None:
        directory = _new_directory(root)
        made.insert(0, directory)
    else:
        _check_free(directory)
        _make_directory(directory)
    with _held(directory):
        _check_free(directory)
        before = {path.name for path in directory.iterdir()}
        threads = min(torch.get_num_threads(), available_cores())
        record = RunRecord(created=datetime.now(UTC), recipe=recipe, config=dict(config), threads=threads)
        write_json(directory / RunRecord.file_name, record.to_json())
        run = Run(directory, recipe, threads)
        try:
            yield run
        except Exception:
            if not run.has_state and not run.is_finished:
                _remove(directory, before=before, made=made)
            raise


def find_run(recipe: str, *, directory: Path | None) -> RunRecord:
    """The run in `directory`, else the newest unfinished one of the recipe. Raises UsageError where there is none."""
    if directory is not None:
        record = read_manifest(directory, RunRecord)
        if record.recipe != recipe:
            raise UsageError(f"{directory}: a run of the recipe {record.recipe!r}, not {recipe!r}")
        return record
    root = Path("runs") / recipe
    unfinished = [r for r in find_manifests(root, RunRecord) if not (r.directory / Checkpoint.file_name).exists()]
    if not unfinished:
        raise UsageError(
            f"no unfinished run under {root}",
            hint="name a run that lies elsewhere by --run-dir, or start one without --resume",
        )
    return unfinished[0]


@contextmanager
def resume(record: RunRecord) -> Iterator[Run]:
    """That run again, held against other processes while the block runs."""
    with _held(record.directory):
        yield Run(record.directory, record.recipe, record.threads, resume=True)


def differing_keys(mine: Mapping[str, JsonValue], theirs: Mapping[str, JsonValue]) -> list[str]:
    """`key: the run has X, asked for Y`, for every key of `mine` whose value differs."""
    return [
        f"{key}: the run has {theirs.get(key)!r}, asked for {value!r}"
        for key, value in sorted(mine.items())
        if theirs.get(key) != value
    ]


def _check_free(directory: Path) -> None:
    if (directory / RunRecord.file_name).exists() or (directory / Checkpoint.file_name).exists():
        raise UsageError(
            f"{directory}: there is a run already", hint="go on with it by --resume, or name another --run-dir"
        )


def _new_directory(root: Path) -> Path:
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        directory = root / f"{stamp}{suffix}"
        try:
            directory.mkdir(parents=True)
        except FileExistsError:  # another run began in this second
            continue
        except OSError as error:
            raise from_os_error(error, doing=f"creating {directory}") from error
        return directory
    raise MachineError(f"{root}: a hundred runs in one second", hint="name a --run-dir")


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, doing=f"creating {directory}") from error


def _remove(directory: Path, *, before: set[str], made: Sequence[Path]) -> None:
    """Take away what a run has written so far, and the folders made for it; what else is in them stays."""
    for name in {RunRecord.file_name, _LOCK_FILE} - (before - {_LOCK_FILE}):
        (directory / name).unlink(missing_ok=True)
    if CURVES_DIRECTORY not in before:
        shutil.rmtree(directory / CURVES_DIRECTORY, ignore_errors=True)
    for path in made:
        try:
            path.rmdir()
        except OSError:  # someone else's files are in there by now: theirs to keep
            break


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """One process at a time in a run's directory.

    By a file of its own: run.json is replaced, and the directory itself is what the checkpoint's writer locks.
    """
    path = directory / _LOCK_FILE
    try:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                # A run that failed removed the file between our opening it and our lock.
                raise BlockingIOError
            held = os.dup(file.fileno())
    except (BlockingIOError, FileNotFoundError):
        raise MachineError(
            f"{directory}: another process is training there", hint="wait for it, or start a new run"
        ) from None
    except OSError as error:
        raise from_os_error(error, doing=f"locking {path}") from error
    try:
        yield
    finally:
        os.close(held)
