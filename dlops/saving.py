"""A person's trained module written as a checkpoint: what is passed in is checked against what the module does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import JsonValue, ValidationError

from dlops import catalog
from dlops.checkpoint import Checkpoint, DenseOrigin, ModelSpec, PruningRecord, misfits, rebuild
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.errors import InputError, UsageError, unknown_name
from dlops.manifest import explain_validation
from dlops.preprocess import Preprocess
from dlops.probing import probe_signature
from dlops.samples import Samples
from dlops.signature import Array, DimRange, Feed, Signature, TensorSpec
from dlops.tasks import Task, open_task

if TYPE_CHECKING:
    from torch import nn

DEFAULT_MAX_BATCH = 256
# Of a split, how many raw samples are preprocessed when it is saved: a second's work for photos.
_CHECKED_SAMPLES = 256
# Where torch has the layers whose weights are quantized.
_QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")


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
    dense: DenseOrigin | None = None,
    recipe: str | None = None,
    config: Mapping[str, JsonValue] | None = None,
    metrics: Mapping[str, JsonValue] | None = None,
    seed: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    output_names: Sequence[str] = ("logits",),
    inputs: Sequence[TensorSpec] = (),
    dims: Mapping[str, DimRange] | None = None,
) -> Checkpoint:
    """Write a trained module as a checkpoint that `dlops export` can take.

    evaluation, calibration: (inputs, targets) with inputs (n, ...) as the module takes them, or Samples with raw
    inputs, which `preprocess` turns into the module's. Evaluation samples are held out from training; calibration
    samples come from the training split. One of torchvision's detectors is taken as `dlops.adapters.Detector`, and
    gives boxes, scores and labels for one image at a time; RAFT gives its last flow of one pair. builder: how to
    rebuild the module (a catalog name or "torchvision:NAME"); without it, export asks for the module again, or for a
    function that makes it. kwargs: of the builder or of that function.
    inputs, dims: names, dtypes and shapes of the inputs, in the order of the module's arguments, where sizes other than
    the batch vary, and the ranges of those. Raises UsageError where something does not fit together.
    """
    from dlops.adapters import ADAPTED_BATCH, adapted, is_adapted

    _check_unquantized(model)
    model = adapted(model)
    if is_adapted(model):
        max_batch = ADAPTED_BATCH
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
    few = _few(evaluating, preprocess, max_batch=max_batch)
    signature = probe_signature(
        model, few, max_batch=max_batch, output_names=output_names, inputs=inputs, dims=dims
    )  # fmt: skip
    _check_labels(labels, task, signature)
    for split, samples in splits.items():
        _check_fitting(samples, preprocess, signature, open_task(task), split)
    if builder is not None:
        _check_rebuilds(model, spec, signature)
    with DirectoryWriter(directory) as writer:
        files = {"weights": writer.add("weights.safetensors", weights_bytes(model))}
        for split, samples in splits.items():
            files[split] = writer.add(f"{split}.safetensors", samples.to_bytes())
        try:
            checkpoint = Checkpoint(
                name=name or directory.resolve().name,
                version=version,
                created=datetime.now(UTC),
                spec=spec,
                dense=dense,
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


def _check_unquantized(model: nn.Module) -> None:
    for name, part in model.named_modules():
        kind = type(part)
        if kind.__module__.startswith(_QUANTIZED):
            raise UsageError(
                f"{type(model).__name__}: {name or 'it'} is quantized already, by torch's own kernels "
                f"({kind.__module__}.{kind.__qualname__}), which no exporter takes",
                hint="save the module as it was before that; dlops export --precision int8 quantizes it",
            )


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
    if not hasattr(part, "detach"):
        return np.asarray(part)
    from dlops.tensors import to_array

    # numpy reads no tensor that needs a gradient or lies on a GPU.
    return to_array(part.detach().cpu())


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


def _check_labels(labels: Sequence[str], task: str, signature: Signature) -> None:
    """Raise UsageError unless a classifier has as many as it has classes, or none."""
    classes = signature.outputs[0].shape[-1]
    if task == "classification" and labels and isinstance(classes, int) and len(labels) != classes:
        raise UsageError(
            f"{len(labels)} labels, and {signature.outputs[0].name} tells {classes} classes apart",
            hint="one label for each class, in the order of the outputs, or none at all",
        )


def _check_rebuilds(model: nn.Module, spec: ModelSpec, signature: Signature) -> None:
    """Raise UsageError unless the spec's builder makes a module that takes these weights."""
    import torch

    # Building draws random weights; a training run that goes on after this must not notice.
    with torch.random.fork_rng(devices=[]):
        rebuilt = rebuild(spec, None, signature)
    wrong = misfits(model.state_dict(), rebuilt)
    if wrong:
        raise UsageError(
            f"{spec.builder} with {spec.kwargs} does not rebuild this model: {wrong}",
            hint="pass the kwargs that it was built with, or no builder",
        )


def _few(samples: Samples, preprocess: Preprocess | None, *, max_batch: int) -> Feed:
    """The tensors of two samples, or of as many as there may be."""
    few = samples.take(range(min(2, max_batch, len(samples))))
    if preprocess is None and not few.inputs:
        raise UsageError("raw samples without a preprocessing", hint="pass preprocess=, or the tensors themselves")
    return few.feed(preprocess, "input")


def weights_bytes(model: nn.Module) -> bytes:
    """A module's parameters and buffers as a safetensors file."""
    from safetensors.torch import save

    # Tied weights are stored once a name: safetensors refuses tensors that share memory.
    return save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()})
