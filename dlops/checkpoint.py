"""Trained weights and how they came about: written, read, and rebuilt into a module."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

import numpy as np
from pydantic import Field, JsonValue, ValidationError

from dlops import catalog
from dlops.environment import Environment, describe_environment
from dlops.errors import CorruptError, InputError, UsageError, from_os_error, missing_package, unknown_name
from dlops.manifest import DirectoryWriter, Manifest, Record, explain_validation, newest_manifest, read_manifest
from dlops.preprocess import Preprocess
from dlops.samples import Samples, read_samples
from dlops.signature import Array, DimRange, DType, Signature, TensorSpec
from dlops.tasks import Task, open_task
from dlops.version import __version__

if TYPE_CHECKING:
    import torch
    from torch import nn

    ModuleSource = nn.Module | Callable[[], nn.Module]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
DEFAULT_MAX_BATCH = 256
# Of a split, how many raw samples are preprocessed when it is saved: a second's work for photos.
_CHECKED_SAMPLES = 256
_DTYPE_HINT = f"convert it inside the model to one of {', '.join(get_args(DType))}"


class PruningRecord(Record):
    """Which channels were removed, enough to prune the dense module the same way again.

    steps: (module name, whether its outputs were cut, channel indices), in the order of cutting.
    macs_removed: fraction of the dense model's multiply-accumulates.
    """

    steps: tuple[tuple[str, bool, tuple[int, ...]], ...]
    macs_removed: float = Field(ge=0, lt=1)


class ModelSpec(Record):
    """What rebuilds the module.

    builder: a catalog name, "torchvision:NAME", or null for a person's own module, which then must be passed in;
    source then says what it was, as text for the error message, never as a name to import.
    """

    builder: str | None
    source: str | None = None
    kwargs: dict[str, JsonValue] = {}
    task: str
    labels: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    pruning: PruningRecord | None = None


class Checkpoint(Manifest):
    """checkpoint.json: files hold the roles weights, evaluation and, where it was given, calibration."""

    file_name: ClassVar[str] = "checkpoint.json"
    required_roles: ClassVar[tuple[str, ...]] = ("weights", "evaluation")

    kind: Literal["checkpoint"] = "checkpoint"
    schema_version: int = Field(1, alias="schema", ge=1)
    dlops_version: str = __version__
    name: str = Field(pattern=NAME_PATTERN)
    version: str = "1"
    spec: ModelSpec
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
        return _rebuilt(self.spec, model, self.signature)

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


def save_checkpoint(
    model: nn.Module,
    directory: Path | str,
    *,
    evaluation: tuple[Any, Any] | Samples,
    calibration: tuple[Any, Any] | Samples | None = None,
    task: str = "classification",
    labels: Sequence[str] = (),
    preprocess: Preprocess | None = None,
    name: str | None = None,
    version: str = "1",
    builder: str | None = None,
    kwargs: Mapping[str, JsonValue] | None = None,
    pruning: PruningRecord | None = None,
    recipe: str | None = None,
    config: Mapping[str, JsonValue] | None = None,
    metrics: Mapping[str, JsonValue] | None = None,
    seed: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    output_names: Sequence[str] = ("logits",),
) -> Checkpoint:
    """Write a trained module as a checkpoint that `dlops export` can take.

    evaluation, calibration: (inputs, targets) with inputs (n, ...) as the module takes them, or Samples with raw
    inputs, which `preprocess` turns into the module's. Evaluation samples are held out from training; calibration
    samples come from the training split. builder: how to rebuild the module (a catalog name or "torchvision:NAME" with
    kwargs); without it, export asks for the module again. Raises UsageError where something does not fit together.
    """
    directory = Path(directory)
    evaluating = _as_samples(evaluation, "evaluation")
    calibrating = None if calibration is None else _as_samples(calibration, "calibration")
    if task not in catalog.TASKS:
        raise unknown_name("task", task, catalog.TASKS)
    if not len(evaluating):
        raise UsageError("evaluation samples are empty", hint="pass some held-out inputs with their targets")
    source = None if builder else f"{type(model).__module__}:{type(model).__qualname__}"
    spec = ModelSpec(
        builder=builder, source=source, kwargs=dict(kwargs or {}), task=task, labels=tuple(labels),
        preprocess=preprocess, pruning=pruning,
    )  # fmt: skip
    splits = {"evaluation": evaluating}
    if calibrating is not None and len(calibrating):
        splits["calibration"] = calibrating
    for split, samples in splits.items():
        _check_preprocessed(samples, preprocess, split)
    signature = _probe(model, evaluating, preprocess, max_batch=max_batch, output_names=output_names)
    for split, samples in splits.items():
        _check_fitting(samples, preprocess, signature, open_task(task), split)
    if builder is not None:
        _check_rebuilds(model, spec, signature)
    with DirectoryWriter(directory) as writer:
        files = {"weights": writer.add("weights.safetensors", _weights_bytes(model))}
        for split, samples in splits.items():
            files[split] = writer.add(f"{split}.safetensors", samples.to_bytes())
        try:
            checkpoint = Checkpoint(
                name=name or directory.resolve().name,
                version=version,
                created=datetime.now(UTC),
                spec=spec,
                signature=signature,
                recipe=recipe,
                config=dict(config or {}),
                metrics=dict(metrics or {}),
                seed=seed,
                environment=describe_environment(),
                files=files,
            )
        except ValidationError as error:
            raise UsageError(
                f"the checkpoint cannot be described: {explain_validation(error)}",
                hint="config and metrics hold plain numbers, text, lists and dicts; a name has no spaces",
            ) from None
        return writer.commit(checkpoint)


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
    wrong = _misfits(tensors, module)
    if wrong:
        raise CorruptError(
            f"{path}: weights do not fit the module: {wrong}",
            hint="pass the module that was trained, built with the same arguments",
        )
    module.load_state_dict(tensors)


def _misfits(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> str:
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


def import_model_source(name: str) -> ModuleSource:
    """The object behind `python:package.module:function`, which the user named on the command line."""
    prefix, _, rest = name.partition(":")
    module_name, _, attribute = rest.partition(":")
    if prefix != "python" or not module_name or not attribute:
        raise UsageError(f"--model {name!r}: expected python:package.module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        source: ModuleSource = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise UsageError(f"--model {name!r}: {error}", hint="run it where that module can be imported") from None
    except AttributeError as error:
        if module_name in sys.modules:
            raise UsageError(f"--model {name!r}: {module_name} has no {attribute!r}") from None
        raise _failed(f"--model {name!r}: importing {module_name}", error) from error
    except Exception as error:  # a person's own code, which may raise anything
        raise _failed(f"--model {name!r}: importing {module_name}", error) from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
    return source


def example_inputs(signature: Signature, *, batch: int) -> tuple[torch.Tensor, ...]:
    """Zeros that fit a signature; named dims other than batch take their smallest size."""
    import torch

    def sizes(spec: TensorSpec) -> list[int]:
        return [
            dim if isinstance(dim, int) else batch if dim == "batch" else signature.dims[dim].min for dim in spec.shape
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
            built = model if isinstance(model, nn.Module) else model()
        except Exception as error:  # a person's own code, which may raise anything
            raise _failed("making the model given", error) from error
        if not isinstance(built, nn.Module):
            raise UsageError(f"the model given is a {type(built).__name__}, not a torch.nn.Module")
        return built
    if spec.builder is None:
        raise UsageError(
            f"the checkpoint holds the weights of {spec.source or 'a module of your own'}, not its code",
            hint="pass --model python:package.module:function (in Python: model=...)",
        )
    if spec.builder.startswith("torchvision:"):
        build = _torchvision_builder(spec)
    else:
        build = catalog.resolve(catalog.BUILDERS, "model builder", spec.builder)
    try:
        return cast("nn.Module", build(**spec.kwargs))
    except (TypeError, ValueError, AttributeError) as error:
        raise _failed(f"building {spec.builder} with {spec.kwargs}", error) from error


def _torchvision_builder(spec: ModelSpec) -> Callable[..., Any]:
    """What builds "torchvision:NAME", untrained: a checkpoint from a stranger must not make us download anything."""
    try:
        from torchvision import models
    except ModuleNotFoundError:
        raise missing_package("torchvision", needed_for=f"rebuilding {spec.builder}") from None

    name = (spec.builder or "").partition(":")[2]
    if name not in models.list_models():
        raise unknown_name("torchvision model", name, models.list_models())
    # "pretrained" is the older spelling, which still works.
    loading = [key for key, value in spec.kwargs.items() if key.startswith(("weights", "pretrained")) and value]
    if loading:
        raise UsageError(
            f"{spec.builder}: {', '.join(sorted(loading))} in its arguments would download weights",
            hint="a checkpoint brings its own: pass the arguments without them",
        )
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    # A detector's backbone has weights by default.
    untrained = {key: None for key in parameters if key.startswith("weights")}
    return partial(models.get_model, name, **untrained)


def _as_samples(given: tuple[Any, Any] | Samples, split: str) -> Samples:
    if isinstance(given, Samples):
        return given
    try:
        inputs, targets = (_as_array(part) for part in given)
        return Samples(raw=tuple(inputs), inputs={"input": inputs}, targets=targets)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{split}: {error}", hint="pass (inputs, targets), two arrays or tensors of the same length, or Samples"
        ) from None


def _as_array(part: Any) -> Array:
    # numpy reads no tensor that needs a gradient or lies on a GPU.
    return np.asarray(part.detach().cpu() if hasattr(part, "detach") else part)


def _check_preprocessed(samples: Samples, preprocess: Preprocess | None, split: str) -> None:
    """Raise UsageError unless preprocessing raw samples works and gives the tensors that are kept beside them.

    Of more than _CHECKED_SAMPLES, that many are drawn with a fixed seed.
    """
    if preprocess is None:
        return
    kept = next(iter(samples.inputs.values()), None)
    for place in np.sort(np.random.default_rng(0).permutation(len(samples))[:_CHECKED_SAMPLES]).tolist():
        problem = ""
        try:
            made = preprocess.apply(samples.raw[place])
            if kept is not None and not (
                made.shape == kept[place].shape and np.allclose(made, kept[place], rtol=1e-5, atol=1e-5)
            ):
                problem = "it gives another tensor than the one passed in"
        except InputError as error:
            problem = error.message
        if problem:
            raise UsageError(
                f"{split}: the preprocessing does not fit the samples: sample {place}: {problem}",
                hint="with preprocess=, pass Samples(raw=..., targets=...) that hold the raw inputs",
            )


def _check_fitting(
    samples: Samples, preprocess: Preprocess | None, signature: Signature, task: Task, split: str
) -> None:
    """Raise UsageError unless all inputs fit the signature and all targets the task: export would fail on them."""
    feed = samples.inputs or samples.take(range(1)).feed(preprocess, signature.inputs[0].name)
    count = len(next(iter(feed.values())))
    try:
        for start in range(0, count, signature.max_batch):
            signature.check({name: array[start : start + signature.max_batch] for name, array in feed.items()})
        if samples.targets is not None:
            task.check_targets(samples.targets, signature.outputs[0])
    except InputError as error:
        raise UsageError(f"{split}: {error.message}", hint=error.hint) from None


def _check_rebuilds(model: nn.Module, spec: ModelSpec, signature: Signature) -> None:
    """Raise UsageError unless the spec's builder makes a module that takes these weights."""
    import torch

    # Building draws random weights; a training run that goes on after this must not notice.
    with torch.random.fork_rng(devices=[]):
        rebuilt = _rebuilt(spec, None, signature)
    wrong = _misfits(model.state_dict(), rebuilt)
    if wrong:
        raise UsageError(
            f"{spec.builder} with {spec.kwargs} does not rebuild this model: {wrong}",
            hint="pass the kwargs that it was built with, or no builder",
        )


def _rebuilt(spec: ModelSpec, model: ModuleSource | None, signature: Signature) -> nn.Module:
    module = _construct(spec, model)
    if spec.pruning is not None:
        from dlops.pruning import apply_pruning

        apply_pruning(module, spec.pruning, example=example_inputs(signature, batch=2))
    return module


def _probe(
    model: nn.Module, samples: Samples, preprocess: Preprocess | None, *, max_batch: int, output_names: Sequence[str]
) -> Signature:
    """The signature, from what the module does with two samples."""
    import torch

    few = samples.take(range(min(2, len(samples))))
    if preprocess is None and not few.inputs:
        raise UsageError("raw samples without a preprocessing", hint="pass preprocess=, or the tensors themselves")
    feed = few.feed(preprocess, "input")
    modes = {module: module.training for module in model.modules()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            result = model.eval()(*(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in feed.values()))
    except Exception as error:  # a person's own code, which may raise anything
        raise _failed("running the model on the evaluation samples", error) from error
    finally:
        # One by one: layers that were frozen in eval mode stay so.
        for module, was_training in modes.items():
            module.training = was_training
    outputs = dict(result) if isinstance(result, Mapping) else None
    if outputs is None:
        tensors = list(result) if isinstance(result, (tuple, list)) else [result]
        if len(tensors) != len(output_names):
            raise UsageError(f"the model gives {len(tensors)} outputs, {len(output_names)} names", hint="output_names=")
        outputs = dict(zip(output_names, tensors, strict=True))
    strange = [name for name, value in outputs.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UsageError(f"the model gives {', '.join(strange)}, which are not tensors", hint="return tensors only")
    count = len(few)

    def spec(name: str, shape: Sequence[int], dtype: str) -> TensorSpec:
        if not shape or shape[0] != count:
            raise InputError(f"{name}: no batch axis in front (shape {list(shape)})", field=name)
        if dtype not in get_args(DType):
            raise InputError(f"{name}: {dtype} is not a dtype that artifacts have", field=name, hint=_DTYPE_HINT)
        return TensorSpec(name=name, dtype=cast("DType", dtype), shape=("batch", *shape[1:]))

    return Signature(
        inputs=tuple(spec(name, array.shape, array.dtype.name) for name, array in feed.items()),
        outputs=tuple(
            spec(name, tensor.shape, str(tensor.dtype).removeprefix("torch.")) for name, tensor in outputs.items()
        ),
        dims={"batch": DimRange(min=1, max=max_batch)},
    )


def _weights_bytes(model: nn.Module) -> bytes:
    from safetensors.torch import save

    # Tied weights are stored once a name: safetensors refuses tensors that share memory.
    return save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()})
