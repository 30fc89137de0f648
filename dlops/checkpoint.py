"""Trained weights and how they came about: written, read, and rebuilt into a module."""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, JsonValue

from dlops import catalog
from dlops.builders import find_builder, is_family
from dlops.environment import Environment
from dlops.errors import CorruptError, UsageError, from_os_error, missing_package
from dlops.manifest import Manifest, Record, Sha256, newest_manifest, read_manifest
from dlops.preprocess import Preprocess
from dlops.samples import Samples, read_samples
from dlops.signature import Signature, TensorSpec
from dlops.sizes import example_size
from dlops.version import __version__

if TYPE_CHECKING:
    import torch
    from torch import nn

    ModuleSource = nn.Module | Callable[[], nn.Module]

# What says in a run's folder how it was begun; the train stage writes it.
RUN_FILE = "run.json"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class PruningRecord(Record):
    """Which channels were removed, enough to prune the dense module the same way again.

    steps: (module name, whether its outputs were cut, channel indices), in the order of cutting.
    macs_removed: fraction of the dense model's multiply-accumulates.
    """

    steps: tuple[tuple[str, bool, tuple[int, ...]], ...]
    macs_removed: float = Field(ge=0, lt=1)


class ModelSpec(Record):
    """What rebuilds the module.

    builder: a catalog name, "torchvision:NAME", "timm:NAME", or null for a person's own module, which then must be
    passed in; source then says what it was, as text for the error message, never as a name to import.
    """

    builder: str | None
    source: str | None = None
    kwargs: dict[str, JsonValue] = {}
    task: str
    labels: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    pruning: PruningRecord | None = None


class DenseOrigin(Record):
    """The dense checkpoint that a pruned one was cut from. sha256: of its manifest."""

    name: str
    version: str
    sha256: Sha256


class Checkpoint(Manifest):
    """checkpoint.json: files hold the roles weights, evaluation and, where it was given, calibration.

    dense: where it is pruned and to be judged by the dense model: its evaluation samples then carry the dense outputs.
    """

    file_name: ClassVar[str] = "checkpoint.json"
    required_roles: ClassVar[tuple[str, ...]] = ("weights", "evaluation")

    kind: Literal["checkpoint"] = "checkpoint"
    schema_version: int = Field(1, alias="schema", ge=1)
    dlops_version: str = __version__
    name: str = Field(pattern=NAME_PATTERN)
    version: str = "1"
    spec: ModelSpec
    dense: DenseOrigin | None = None
    signature: Signature
    recipe: str | None = None
    config: dict[str, JsonValue] = {}
    metrics: dict[str, JsonValue] = {}
    seed: int | None = None
    environment: Environment

    def samples(self, split: Literal["calibration", "evaluation"]) -> Samples | None:
        """The samples of a split, None where the checkpoint has none."""
        return read_samples(self.path(split)) if split in self.files else None

    def build_module(self, model: ModuleSource | None = None) -> nn.Module:
        """The module with the trained weights, in eval mode, on the CPU.

        model: the module or a function that makes it, needed where the spec names no builder. Raises UsageError where
        it is missing, CorruptError where the weights do not fit.
        """
        module = self.build_untrained(model)
        load_weights(module, self.path("weights"))
        return module.eval()

    def build_untrained(self, model: ModuleSource | None = None) -> nn.Module:
        """The module's structure, pruned as recorded, its weights not loaded."""
        return rebuild(self.spec, model, self.signature)

    def example(self, batch: int = 2) -> tuple[torch.Tensor, ...]:
        """Input tensors of zeros that fit the signature, in its order."""
        return example_inputs(self.signature, batch=batch)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint in a directory (or at its checkpoint.json), its digests checked."""
    path = Path(path)
    return read_manifest(path.parent if path.name == Checkpoint.file_name else path, Checkpoint)


def newest_checkpoint(root: Path | str = "runs") -> Checkpoint:
    """The checkpoint under `root` with the latest `created`, its digests checked."""
    return newest_manifest(Path(root), Checkpoint, make_one="train one: dlops train cnn, or dlops quickstart")


def check_vacant(directory: Path) -> None:
    """Raise UsageError where a checkpoint lies, or a run that is to become one: writing there would replace it."""
    # The first is written by training before there is a checkpoint.
    for name in (RUN_FILE, Checkpoint.file_name):
        if (directory / name).exists():
            raise UsageError(
                f"{directory}: a run or checkpoint is there ({name}), and would be replaced", hint="name a new folder"
            )


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module. Raises CorruptError naming the tensors that do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except SafetensorError as error:
        raise CorruptError(f"{path}: not a safetensors file ({error})") from None
    wrong = misfits(tensors, module)
    if wrong:
        raise CorruptError(
            f"{path}: weights do not fit the module: {wrong}",
            hint="pass the module that was trained, built with the same arguments",
        )
    fill(module, tensors)


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load tensors that fit, of the module's own version: torchvision's MNASNet asks for that, which no file of tensors
    says."""
    state = OrderedDict(tensors)
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(state)


def misfits(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> str:
    """Which tensors a module would refuse to load, the first five named; empty where all fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    wrong += [
        f"{name} is {list(found[name])}, the module has {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    return "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def import_model_source(name: str, *, said: str | None = None) -> ModuleSource:
    """The object behind `python:package.module:function`, which the user named on the command line.

    said: what an error calls it; `--model NAME` if left out.
    """
    said = said or f"--model {name!r}"
    prefix, _, rest = name.partition(":")
    module_name, _, attribute = rest.partition(":")
    if prefix != "python" or not module_name or not attribute:
        raise UsageError(f"{said}: expected python:package.module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        source: ModuleSource = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise UsageError(f"{said}: {error}", hint="run it where that module can be imported") from None
    except AttributeError as error:
        if module_name in sys.modules:
            raise UsageError(f"{said}: {module_name} has no {attribute!r}") from None
        raise _failed(f"{said}: importing {module_name}", error) from error
    except Exception as error:  # a person's own code, which may raise anything
        raise _failed(f"{said}: importing {module_name}", error) from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
    return source


def example_inputs(signature: Signature, *, batch: int) -> tuple[torch.Tensor, ...]:
    """Zeros that fit a signature, of that batch where it allows one; other named dims take a small size, not 1."""
    import torch

    batch = min(batch, signature.max_batch)

    def sizes(spec: TensorSpec) -> list[int]:
        return [
            dim if isinstance(dim, int) else batch if dim == "batch" else example_size(signature.dims[dim])
            for dim in spec.shape
        ]

    return tuple(torch.zeros(sizes(spec), dtype=getattr(torch, spec.dtype)) for spec in signature.inputs)


def _failed(doing: str, error: Exception) -> UsageError:
    return UsageError(f"{doing} failed: {type(error).__name__}: {error}")


def _construct(spec: ModelSpec, model: ModuleSource | None) -> nn.Module:
    try:
        from torch import nn
    except ModuleNotFoundError:
        raise missing_package("torch", extra="export", needed_for="rebuilding a checkpoint's module") from None

    if model is not None:
        try:
            built = model if isinstance(model, nn.Module) else model(**spec.kwargs)
        except Exception as error:  # a person's own code, which may raise anything
            raise _failed("making the model given", error) from error
        if not isinstance(built, nn.Module):
            raise UsageError(f"the model given is of type {type(built).__name__}, not a torch.nn.Module")
        from dlops.adapters import adapted

        return adapted(built)
    if spec.builder is None:
        raise UsageError(
            f"the checkpoint holds the weights of {spec.source or 'a module of your own'}, not its code",
            hint="pass --model python:package.module:function (in Python: model=...)",
        )
    return construct(spec.builder, spec.kwargs)


def construct(builder: str, kwargs: Mapping[str, JsonValue]) -> nn.Module:
    """The untrained network of a catalog name, "torchvision:NAME" or "timm:NAME".

    Raises UsageError for an unknown name and for arguments that the builder refuses.
    """
    if is_family(builder):
        build = find_builder(builder, kwargs)
    else:
        build = catalog.resolve(catalog.BUILDERS, "model builder", builder)
    try:
        made: nn.Module = build(**kwargs)
    except (TypeError, ValueError, AttributeError) as error:
        raise _failed(f"building {builder} with {kwargs}", error) from error
    return made


def rebuild(spec: ModelSpec, model: ModuleSource | None, signature: Signature) -> nn.Module:
    module = _construct(spec, model)
    if spec.pruning is not None:
        from dlops.pruning import apply_pruning

        apply_pruning(module, spec.pruning, example=example_inputs(signature, batch=2))
    return module
