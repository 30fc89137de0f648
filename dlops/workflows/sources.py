"""A model that was not trained here, made a checkpoint: torchvision's and timm's by name, or a function of your own.

What follows, export and its gates above all, then is what it is for any checkpoint: so a source brings weights, real
samples and the preprocessing between the two.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import JsonValue

from dlops import catalog
from dlops.builders import (
    Published,
    builder_task,
    find_builder,
    is_family,
    published_labels,
    published_weights,
)
from dlops.checkpoint import (
    NAME_PATTERN,
    Checkpoint,
    ModelSpec,
    fill,
    import_model_source,
    load_checkpoint,
    misfits,
    rebuild,
)
from dlops.console import say
from dlops.errors import DlopsError, UsageError, first_line
from dlops.preprocess import Preprocess
from dlops.saving import save_checkpoint
from dlops.signature import DimRange, Signature, TensorSpec
from dlops.tensors import to_tensor
from dlops.workflows.source_data import SourceData, as_known, read_images, read_tensors
from dlops.workflows.source_weights import read_weights
from dlops.workflows.source_words import chosen_preprocess, parse_dims, parse_input
from dlops.workflows.untrained import draw_zeros, scale_weights, settle_statistics

if TYPE_CHECKING:
    from torch import nn

    from dlops.checkpoint import ModuleSource

# Samples in a call, where nothing else is said.
MAX_BATCH = 64
_PREFIXES = ("torchvision:", "timm:", "python:")
# What the only output is called where nobody names it.
_OUTPUT = {"regression": "values", "generation": "image"}
# For the statistics of an untrained network.
_SETTLING = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """A source as a checkpoint. model: what builds its module, where the checkpoint names no builder."""

    checkpoint: Checkpoint
    model: ModuleSource | None


def is_source(text: str) -> bool:
    """Whether it names a model elsewhere, and not the folder of a checkpoint."""
    return text.startswith(_PREFIXES)


def adopt(
    source: str,
    *,
    samples: str,
    weights: str | None = None,
    inputs: Sequence[str] = (),
    dims: Sequence[str] = (),
    preprocess: str | None = None,
    arguments: Mapping[str, JsonValue] | None = None,
    output_names: Sequence[str] = (),
    name: str | None = None,
    task: str | None = None,
    own: ModuleSource | None = None,
    max_batch: int = MAX_BATCH,
    root: Path = Path("runs"),
) -> Adopted:
    """Write the checkpoint runs/<name>/<time>/ of "torchvision:NAME", "timm:NAME" or "python:package.module:function".

    samples: a data set that dlops knows, a folder or archive of class folders, or a safetensors file with a tensor an
    input and, for accuracy, "targets". weights: "random", the name of published ones, or a .safetensors, .pth or .pt
    file; without it a function's module keeps its own. inputs: `name:dtype[dims]` in the order of the arguments; dims:
    `NAME=MIN:MAX[:STEP]` for each that has a name and not a size.
    preprocess: "imagenet", "unit" or a JSON file; by default what the published weights were trained with. arguments:
    for the builder. own: the module itself, where `source` only says where it came from. task: what it is for; by
    default what torchvision sorts it under, or a detector's, or classification. Raises UsageError for what does not fit
    together, before anything is written.
    """
    if task is not None:
        catalog.check(catalog.TASKS, "task", task)
    from torch import nn

    from dlops.adapters import task_of
    from dlops.export.module import check_state

    specs, ranges = [parse_input(text) for text in inputs], parse_dims(dims)
    for option, names in (("--input", [spec.name for spec in specs]), ("--output", list(output_names))):
        if twice := sorted(name for name in set(names) if names.count(name) > 1):
            raise UsageError(f"{option} {twice[0]}: given twice", hint="each has a name of its own")
    if own is None and source.startswith("python:"):
        own = import_model_source(source, said=source)
    if own is None and weights is None:
        raise UsageError(
            f"{source}: which weights?", hint="--weights random, a file, or the name of published ones such as DEFAULT"
        )
    if own is None:
        find_builder(source, arguments or {})
    if arguments and (isinstance(own, nn.Module) or (own is not None and not source.startswith("python:"))):
        raise UsageError(f"{source}: a module, which takes no arguments (--set)", hint="leave --set out")
    title = name or _title(source)
    if not re.fullmatch(NAME_PATTERN, title):
        raise UsageError(f"--name {title!r}: letters, digits, dots, hyphens and underscores", hint="my-model, say")
    _check_unused(root / title, source)
    published = _published(source, weights)
    steps = chosen_preprocess(preprocess, source, specs, published)
    if Path(samples).suffix == ".safetensors":
        if preprocess is not None:
            raise UsageError(
                f"--preprocess {preprocess}: {samples} holds tensors, which the model takes as they are",
                hint="leave it out, or give images",
            )
        data, steps = read_tensors(Path(samples), specs, ranges), None
    else:
        data = read_images(samples, steps, source)
    expected = task or (builder_task(source) if is_family(source) else "classification")
    classes = data.labels if expected == "classification" else ()
    module, kwargs = _module(source, own, weights, published, dict(arguments or {}), classes)
    task = task or task_of(module) or expected
    if task != "classification" and data.labels:
        # Class folders tell what is in an image, and not where.
        say(f"{source}: the classes of {samples} are no targets for {task}: accuracy is not measured")
        data = data.without_targets()
    check_state(module, title=source)
    if weights == "random":
        _settle(module, data, steps, source, scaled=task == "detection")
    _check_outputs(module, data, steps, output_names)
    # Weights that were trained elsewhere tell the classes apart that they were trained on.
    trained = is_family(source) and "num_classes" not in kwargs and (weights != "random" or task != "classification")
    labels = (published.labels if published is not None else published_labels(source)) if trained else data.labels
    if data.labels and tuple(labels) in ((), tuple(data.labels)):
        labels = _numbered(module, data, steps)
    checkpoint = save_checkpoint(
        module,
        _directory(root / title),
        evaluation=as_known(data.evaluation, data.labels, labels),
        calibration=None if data.calibration is None else as_known(data.calibration, data.labels, labels),
        labels=labels,
        preprocess=steps,
        task=task,
        name=title,
        builder=None if own is not None else source,
        kwargs=kwargs,
        config={"source": source, "weights": weights, "samples": Path(samples).name},
        max_batch=max_batch,
        output_names=output_names or (_OUTPUT.get(task, "logits"),),
        inputs=_taken(specs, steps) if ranges else (),
        dims=ranges,
    )
    checkpoint = _the_one_that_was_there(checkpoint)
    say(f"{source}: checkpoint in {checkpoint.directory}, {len(data.evaluation)} evaluation samples")
    # The very module: what a function makes anew may differ where it draws its weights.
    return Adopted(checkpoint=checkpoint, model=None if own is None else module)


def _settle(module: nn.Module, data: SourceData, steps: Preprocess | None, source: str, *, scaled: bool) -> None:
    few = (data.calibration or data.evaluation).take(slice(_SETTLING)).feed(steps, "input")
    draw_zeros(module)
    try:
        settle_statistics(module, few)
        if scaled:
            scale_weights(module, few)
    except Exception as error:  # whatever the network raises
        sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in few.items())
        raise UsageError(
            f"{source}: it does not run on the samples ({sizes}): {type(error).__name__}: {first_line(error)}",
            hint="samples as the network takes them: channels before height and width, and some of them",
        ) from error


def _check_outputs(module: nn.Module, data: SourceData, steps: Preprocess | None, names: Sequence[str]) -> None:
    """Raise UsageError where outputs are named that the module names itself, otherwise."""
    if not names:
        return
    try:
        answer = _answer(module, data, steps)
    except Exception:  # noqa: BLE001 - what it raises is said where its signature is looked for
        return
    if isinstance(answer, Mapping) and [*answer] != [*names]:
        raise UsageError(
            f"--output {', '.join(names)}: the model itself names its outputs {', '.join(map(str, answer))}",
            hint="leave --output out",
        )


def _answer(module: nn.Module, data: SourceData, preprocess: Preprocess | None) -> object:
    """What it gives for one sample."""
    import torch

    feed = data.evaluation.take(slice(1)).feed(preprocess, "input")
    with torch.no_grad():
        return module(*(to_tensor(np.ascontiguousarray(array)) for array in feed.values()))


def _check_unused(folder: Path, source: str) -> None:
    """Raise UsageError where checkpoints of another source have that name: artifacts of both would lie side by side."""
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (place / Checkpoint.file_name).is_file():
            continue
        try:
            before = load_checkpoint(place).config.get("source")
        except DlopsError:
            continue  # damaged, or of another version
        if isinstance(before, str) and before != source:
            raise UsageError(
                f"{source}: {folder} holds {before}, another model that is called {folder.name}",
                hint=f"--name NAME calls this one otherwise, or remove {folder}",
            )


def _published(source: str, weights: str | None) -> Published | None:
    """The published weights that are asked for by name; None where it is a file, random or nothing."""
    if weights is None or weights == "random" or Path(weights).suffix in (".safetensors", ".pth", ".pt"):
        return None
    if not is_family(source):
        raise UsageError(f"--weights {weights}: no file of weights", hint="a .safetensors, .pth or .pt file")
    return published_weights(source, weights)


def _module(
    source: str, own: ModuleSource | None, weights: str | None, published: Published | None,
    kwargs: dict[str, JsonValue], labels: Sequence[str],
) -> tuple[nn.Module, dict[str, JsonValue]]:  # fmt: skip
    """The module in eval mode with its weights, and the arguments that it was built with."""
    import torch

    from dlops.adapters import named_for

    path = None if weights is None or published is not None or weights == "random" else Path(weights)
    tensors = published.weights if published is not None else read_weights(path) if path is not None else None
    counted = is_family(source) and published is None and "num_classes" not in kwargs and len(labels) > 1
    attempts = [kwargs, kwargs | {"num_classes": len(labels)}] if counted else [kwargs]
    if tensors is None and counted:
        # Nothing else says how many classes an untrained network is to have.
        attempts = attempts[1:]
    problem = ""
    for attempt in attempts:
        spec = ModelSpec(
            builder=None if own is not None else source, source=source, kwargs=attempt, task="classification"
        )
        # Random weights are the same ones every time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = rebuild(spec, own, _ANY)
        fitting = None if tensors is None else named_for(dict(tensors), module)
        problem = "" if fitting is None else misfits(fitting, module)
        if not problem:
            if fitting is not None:
                fill(module, fitting)
            return module.eval(), attempt
    raise UsageError(
        f"{source}: the weights {weights} do not fit: {problem}",
        hint="--set num_classes=N, or what it was built with" if is_family(source) else "weights of this very module",
    )


def _taken(specs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Sequence[TensorSpec]:
    """The inputs as given; images go into the one that preprocessing makes, under the name that it has there."""
    return specs if preprocess is None else [specs[0].model_copy(update={"name": "input"})]


def _numbered(module: nn.Module, data: SourceData, preprocess: Preprocess | None) -> tuple[str, ...]:
    """Names for classes that nobody names: the samples' own where there are as many, else their numbers."""
    try:
        answer: Any = _answer(module, data, preprocess)
    except Exception:  # noqa: BLE001 - what it raises is said where its signature is looked for
        return data.labels
    first = next(iter(answer.values())) if isinstance(answer, Mapping) else answer
    classes = int((first[0] if isinstance(first, (tuple, list)) else first).shape[-1])
    return data.labels if classes == len(data.labels) else tuple(map(str, range(classes)))


def _the_one_that_was_there(checkpoint: Checkpoint) -> Checkpoint:
    """An older checkpoint beside this one of the very same content, this one removed; else this one.

    So that variants which were exported from it count as unchanged.
    """

    def content(one: Checkpoint) -> object:
        files = {role: payload.sha256 for role, payload in one.files.items()}
        return files, one.spec, one.signature, one.config, one.name

    for folder in sorted(checkpoint.directory.parent.iterdir()):
        if folder == checkpoint.directory or not (folder / Checkpoint.file_name).is_file():
            continue
        try:
            older = load_checkpoint(folder)
        except UsageError:
            continue  # damaged, or of another version
        if content(older) == content(checkpoint):
            shutil.rmtree(checkpoint.directory)
            return older
    return checkpoint


def _title(source: str) -> str:
    """What the checkpoint is called: the network's name, or the function's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.rpartition(":")[2]).strip("-.") or "model"


def _directory(root: Path) -> Path:
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return next(
        path
        for number in range(1, 1000)
        if not (path := root / (stamp if number == 1 else f"{stamp}-{number}")).exists()
    )


# A source's module is built before its signature is known, and only pruned ones need that.
_ANY = Signature(
    inputs=(TensorSpec(name="input", dtype="float32", shape=("batch",)),),
    outputs=(TensorSpec(name="output", dtype="float32", shape=("batch",)),),
    dims={"batch": DimRange(max=1)},
)
