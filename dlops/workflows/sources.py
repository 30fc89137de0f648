"""A model that was not trained here, made a checkpoint: torchvision's and timm's by name, or a function of your own.

What follows, export and its gates above all, then is what it is for any checkpoint: so a source brings weights, real
samples and the preprocessing between the two.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from pydantic import JsonValue, ValidationError

from dlops import catalog
from dlops.builders import (
    Published,
    builder_task,
    find_builder,
    is_family,
    published_labels,
    published_preprocess,
    published_weights,
)
from dlops.checkpoint import Checkpoint, ModelSpec, import_model_source, load_checkpoint, misfits, rebuild
from dlops.console import say
from dlops.errors import CorruptError, UsageError, from_os_error
from dlops.manifest import explain_validation
from dlops.preprocess import CenterCrop, Decode, Normalize, Preprocess, Resize, Scale, Step
from dlops.probing import check_named
from dlops.samples import MAX_SAMPLES, MAX_SAMPLES_BYTES, Samples
from dlops.saving import save_checkpoint
from dlops.signature import Array, DimRange, DType, Signature, TensorSpec
from dlops.workflows.untrained import scale_weights, settle_statistics

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dlops.checkpoint import ModuleSource

_PREFIXES = ("torchvision:", "timm:", "python:")
_INPUT = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*):([a-z]+\d*)\[([^\]]*)\]")
_RANGE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(\d+):(\d+)(?::(\d+))?")
_TARGETS = ("targets", "target", "labels")
_IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# As in the recipes: of two classes or more, drawn with a fixed seed.
_SPLIT_SEED = 0
# What the only output is called where nobody names it.
_OUTPUT = {"regression": "values"}
# For the statistics of an untrained network.
_SETTLING = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """A source as a checkpoint. model: what builds its module, where the checkpoint names no builder."""

    checkpoint: Checkpoint
    model: ModuleSource | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """labels: of the targets. calibration: None where there are too few samples for two splits."""

    evaluation: Samples
    calibration: Samples | None
    labels: tuple[str, ...] = ()

    def without_targets(self) -> _Data:
        def bare(samples: Samples) -> Samples:
            return Samples(raw=samples.raw, inputs=samples.inputs)

        return _Data(
            evaluation=bare(self.evaluation), calibration=None if self.calibration is None else bare(self.calibration)
        )


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
    max_batch: int = 64,
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
    from dlops.adapters import task_of

    specs, ranges = [parse_input(text) for text in inputs], parse_dims(dims)
    if own is None and source.startswith("python:"):
        own = import_model_source(source)
    if own is None and weights is None:
        raise UsageError(
            f"{source}: which weights?", hint="--weights random, a file, or the name of published ones such as DEFAULT"
        )
    if own is None:
        find_builder(source, arguments or {})
    title = name or _title(source)
    published = _published(source, weights)
    steps = _preprocess(preprocess, source, specs, published)
    if Path(samples).suffix == ".safetensors":
        data, steps = _from_tensors(Path(samples), specs, ranges), None
    else:
        data = _from_images(samples, steps, source)
    expected = task or (builder_task(source) if is_family(source) else "classification")
    classes = data.labels if expected == "classification" else ()
    module, kwargs = _module(source, own, weights, published, dict(arguments or {}), classes)
    task = task or task_of(module) or expected
    if task != "classification" and data.labels:
        # Class folders tell what is in an image, and not where.
        say(f"{source}: the classes of {samples} are no targets for {task}: accuracy is not measured")
        data = data.without_targets()
    if weights == "random":
        few = (data.calibration or data.evaluation).take(slice(_SETTLING))
        settle_statistics(module, few.feed(steps, "input"))
        if task == "detection":
            scale_weights(module, few.feed(steps, "input"))
    # Weights that were trained elsewhere tell the classes apart that they were trained on.
    trained = is_family(source) and "num_classes" not in kwargs and (weights != "random" or task != "classification")
    labels = (published.labels if published is not None else published_labels(source)) if trained else data.labels
    if not labels and data.labels:
        labels = _numbered(module, data, steps)
    checkpoint = save_checkpoint(
        module,
        _directory(root / title),
        evaluation=_as_known(data.evaluation, data.labels, labels),
        calibration=None if data.calibration is None else _as_known(data.calibration, data.labels, labels),
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


def parse_input(text: str) -> TensorSpec:
    """`pixels:float32[batch,3,224,224]`. Raises UsageError for what is not written so."""
    match = _INPUT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UsageError(f"--input {text!r}: expected name:dtype[dims]", hint="such as pixels:float32[batch,3,224,224]")
    name, dtype, dims = match.groups()
    if dtype not in get_args(DType):
        raise UsageError(f"--input {text!r}: {dtype} is not one of {', '.join(get_args(DType))}")
    parts = dims.split(",") if dims else []
    if not parts or parts[0] != "batch":
        raise UsageError(f"--input {text!r}: the first dim is the batch", hint=f"{name}:{dtype}[batch,...]")
    if strange := [part for part in parts[1:] if not (part.isdecimal() or part.isidentifier()) or part == "batch"]:
        raise UsageError(
            f"--input {text!r}: {strange[0]!r} is no size", hint="a number, or a name with a range: --dim NAME=MIN:MAX"
        )
    shape = ("batch", *(int(part) if part.isdecimal() else part for part in parts[1:]))
    return TensorSpec(name=name, dtype=cast("DType", dtype), shape=shape)


def parse_dims(given: Sequence[str]) -> dict[str, DimRange]:
    """`height=224:640` or `height=224:640:32`, the last a step, as ranges by name. Raises UsageError."""
    ranges = {}
    for one in given:
        match = _RANGE.fullmatch(one.replace(" ", ""))
        if match is None:
            raise UsageError(f"--dim {one!r}: expected NAME=MIN:MAX or NAME=MIN:MAX:STEP", hint="height=224:640:32")
        name, low, high, step = match.groups()
        try:
            ranges[name] = DimRange(min=int(low), max=int(high), step=int(step or 1))
        except ValidationError as error:
            raise UsageError(f"--dim {one!r}: {explain_validation(error)}") from None
    return ranges


def parse_arguments(given: Sequence[str]) -> dict[str, JsonValue]:
    """`num_classes=10` as arguments of a builder; values are JSON, or else text. Raises UsageError."""
    arguments: dict[str, JsonValue] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise UsageError(f"--set {one!r}: expected KEY=VALUE", hint="such as num_classes=10")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors, .pth or .pt file; of a training checkpoint the part that is one.

    Raises CorruptError where it holds something else, or would have to be unpickled.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded: Any = (
            load_file(path) if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )  # fmt: skip
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except (SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise CorruptError(f"{path}: no weights in it: {_first_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - torch raises pickle's own error for what weights_only refuses
        raise CorruptError(
            f"{path}: not read, because it holds more than tensors: {_first_line(error)}",
            hint="save its state_dict() alone, best as safetensors",
        ) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CorruptError(f"{path}: no state dict in it", hint="save the module's state_dict()")
    # Wrapped for several devices, or compiled.
    names = {key: str(key).removeprefix("module.").removeprefix("_orig_mod.") for key in loaded}
    return {names[key]: value for key, value in loaded.items()}


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
                module.load_state_dict(fitting)
            return module.eval(), attempt
    raise UsageError(
        f"{source}: the weights {weights} do not fit: {problem}", hint="--set num_classes=N, or what it was built with"
    )


def _preprocess(
    given: str | None, source: str, specs: Sequence[TensorSpec], published: Published | None
) -> Preprocess | None:
    """What images go through: as given, else as the published weights want it, else scaled to [0, 1]."""
    if given is not None and given not in ("imagenet", "unit"):
        return _read_preprocess(Path(given))
    default = (
        published.preprocess if published is not None else published_preprocess(source) if is_family(source) else None
    )
    if given is None and default is not None:
        return _sized(default, specs)
    shape = default.shape if default is not None else specs[0].shape[1:] if len(specs) == 1 else ()
    if len(shape) != 3 or shape[0] not in (1, 3) or not all(isinstance(size, int) for size in shape):
        return None
    channels, height, width = (int(size) for size in shape)
    steps: list[Step] = [
        Decode(mode="RGB" if channels == 3 else "L"), Resize(size=max(height, width)), CenterCrop(size=(height, width)),
        Scale(),
    ]  # fmt: skip
    if given == "imagenet":
        if channels != 3:
            raise UsageError("--preprocess imagenet: normalizes three channels, and the input has one")
        steps.append(_IMAGENET)
    return Preprocess(input="image", shape=(channels, height, width), steps=tuple(steps))


def _sized(preprocess: Preprocess, specs: Sequence[TensorSpec]) -> Preprocess:
    """Where images are stretched to one size, and the input is given another: that one."""
    shape = specs[0].shape[1:] if len(specs) == 1 else ()
    if len(shape) != 3 or not all(isinstance(dim, int) for dim in shape) or shape == preprocess.shape:
        return preprocess
    size = (int(shape[1]), int(shape[2]))
    steps = tuple(
        Resize(size=size, interpolation=step.interpolation)
        if isinstance(step, Resize) and isinstance(step.size, tuple) else step
        for step in preprocess.steps
    )  # fmt: skip
    stretched = steps != preprocess.steps
    return Preprocess(input="image", shape=(preprocess.shape[0], *size), steps=steps) if stretched else preprocess


def _read_preprocess(path: Path) -> Preprocess:
    try:
        return Preprocess.model_validate_json(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, doing=f"--preprocess {path}") from error
    except ValidationError as error:
        raise UsageError(
            f"--preprocess {path}: {explain_validation(error)}", hint="as `preprocess` stands in an artifact.json"
        ) from None


def _from_images(samples: str, preprocess: Preprocess | None, source: str) -> _Data:
    """From the data sets and folders that training takes: evaluation from test, calibration from train."""
    from dlops.train.data.source import open_data
    from dlops.train.finish import MAX_CALIBRATION, MAX_CALIBRATION_BYTES, chosen_samples

    if preprocess is None:
        raise UsageError(
            f"{source}: images are given, and nothing says what it makes of them",
            hint="--input name:float32[batch,3,H,W], or --preprocess FILE",
        )
    data = open_data(samples, split_seed=_SPLIT_SEED)
    return _Data(
        evaluation=chosen_samples(data.test, MAX_SAMPLES, MAX_SAMPLES_BYTES),
        calibration=chosen_samples(data.train, MAX_CALIBRATION, MAX_CALIBRATION_BYTES),
        labels=data.labels,
    )


def _from_tensors(path: Path, specs: Sequence[TensorSpec], ranges: Mapping[str, DimRange]) -> _Data:
    """Every second sample of a file is for evaluation, the others for calibration."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, Array] = dict(load_file(path))
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except SafetensorError as error:
        raise CorruptError(f"{path}: not a safetensors file ({error})") from None
    targets = next((tensors.pop(name) for name in _TARGETS if name in tensors), None)
    names = [spec.name for spec in specs] or sorted(tensors)
    if len(names) > 1 and not specs:
        raise UsageError(
            f"{path}: several tensors ({', '.join(names)}), and nothing says in which order the model takes them",
            hint="--input name:dtype[dims] for each, in order",
        )
    if missing := [name for name in names if name not in tensors]:
        raise UsageError(f"{path}: no tensor {missing[0]!r} in it; there are {', '.join(sorted(tensors)) or 'none'}")
    feed = {name: tensors[name] for name in names}
    lengths = {name: len(array) if array.ndim else 0 for name, array in feed.items()}
    if targets is not None:
        lengths["targets"] = len(targets) if targets.ndim else 0
    count = min(lengths.values())
    if len(set(lengths.values())) > 1 or count < 2:
        raise UsageError(
            f"{path}: {', '.join(f'{name} has {n}' for name, n in lengths.items())} samples; two or more, alike"
        )
    if specs:
        check_named(specs, ranges, feed)
    whole = Samples(raw=tuple(next(iter(feed.values()))), inputs=feed, targets=targets)
    places = np.arange(count)
    return _Data(evaluation=whole.take(list(places[::2])), calibration=whole.take(list(places[1::2])))


def _as_known(samples: Samples, labels: Sequence[str], known: Sequence[str]) -> Samples:
    """The samples with targets counted as the model counts its classes: by label, or by number where labels are."""
    if samples.targets is None or not labels or tuple(labels) == tuple(known) or not known:
        return samples
    # ImageNet's labels are lists of synonyms in some collections.
    places = {word.casefold(): place for place, label in enumerate(known) for word in (*label.split(", "), label)}
    numbers = []
    for label in labels:
        place = places.get(label.casefold().replace("_", " "), places.get(label.casefold()))
        if place is None and label.isdecimal() and int(label) < len(known):
            place = int(label)
        if place is None:
            raise UsageError(
                f"the class {label!r} is none of the model's {len(known)} ({', '.join(known[:3])}, ...)",
                hint="name the class folders as the model's labels, or by their numbers",
            )
        numbers.append(place)
    targets = np.array(numbers, np.int64)[samples.targets]
    return Samples(raw=samples.raw, inputs=samples.inputs, outputs=samples.outputs, targets=targets)


def _taken(specs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Sequence[TensorSpec]:
    """The inputs as given; images go into the one that preprocessing makes, under the name that it has there."""
    return specs if preprocess is None else [specs[0].model_copy(update={"name": "input"})]


def _numbered(module: nn.Module, data: _Data, preprocess: Preprocess | None) -> tuple[str, ...]:
    """Names for classes that nobody names: the samples' own where there are as many, else their numbers."""
    import torch

    feed = data.evaluation.take(slice(1)).feed(preprocess, "input")
    with torch.no_grad():
        answer = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in feed.values()))
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


def _first_line(error: Exception) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


# A source's module is built before its signature is known, and only pruned ones need that.
_ANY = Signature(
    inputs=(TensorSpec(name="input", dtype="float32", shape=("batch",)),),
    outputs=(TensorSpec(name="output", dtype="float32", shape=("batch",)),),
    dims={"batch": DimRange(max=1)},
)
