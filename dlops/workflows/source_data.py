"""The samples that a source is given: images in class folders, or a safetensors file of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlops import catalog
from dlops.errors import CorruptError, UsageError, from_os_error
from dlops.preprocess import Preprocess
from dlops.probing import check_named
from dlops.samples import MAX_SAMPLES, MAX_SAMPLES_BYTES, Samples, read_safetensors
from dlops.signature import DimRange, TensorSpec

_TARGETS = ("targets", "target", "labels")
# As in the recipes: of two classes or more, drawn with a fixed seed.
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceData:
    """labels: of the targets. calibration: None where there are too few samples for two splits."""

    evaluation: Samples
    calibration: Samples | None
    labels: tuple[str, ...] = ()

    def without_targets(self) -> SourceData:
        def bare(samples: Samples) -> Samples:
            return Samples(raw=samples.raw, inputs=samples.inputs)

        return SourceData(
            evaluation=bare(self.evaluation), calibration=None if self.calibration is None else bare(self.calibration)
        )


def read_images(samples: str, preprocess: Preprocess | None, source: str) -> SourceData:
    """From the data sets and folders that training takes: evaluation from test, calibration from train.

    Raises CorruptError naming the images that cannot be read or decoded.
    """
    from dlops.train.data.dataset import shown
    from dlops.train.data.source import open_data
    from dlops.train.finish import MAX_CALIBRATION, MAX_CALIBRATION_BYTES, chosen, read
    from dlops.train.images import undecodable

    if preprocess is None:
        if samples not in catalog.DATASETS and not Path(samples).expanduser().exists():
            open_data(samples, split_seed=_SPLIT_SEED)  # which raises: there is nothing of that name
        raise UsageError(
            f"{source}: images are given, and nothing says what it makes of them",
            hint="--input name:float32[batch,3,224,224], sizes as numbers, or --preprocess FILE",
        )
    data = open_data(samples, split_seed=_SPLIT_SEED)
    evaluation = chosen(data.test, MAX_SAMPLES, MAX_SAMPLES_BYTES)
    calibration = chosen(data.train, MAX_CALIBRATION, MAX_CALIBRATION_BYTES)
    damaged = list(data.unreadable)
    for title, split in (("test", evaluation), ("train", calibration)):
        damaged += [f"{split.names[i]} ({problem})" for i, problem in sorted(undecodable(title, split).items())]
    if damaged:
        raise CorruptError(
            f"{samples}: {len(damaged)} of {len(evaluation) + len(calibration) + len(data.unreadable)} images cannot "
            f"be read or decoded: {shown(damaged)}",
            hint="repair or remove them",
        )
    return SourceData(evaluation=read(evaluation), calibration=read(calibration), labels=data.labels)


def read_tensors(path: Path, specs: Sequence[TensorSpec], ranges: Mapping[str, DimRange]) -> SourceData:
    """Every second sample of a file is for evaluation, the others for calibration."""
    from safetensors import SafetensorError

    try:
        tensors = read_safetensors(path)
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except (SafetensorError, ValueError) as error:
        raise CorruptError(f"{path}: not a safetensors file of tensors that a model takes ({error})") from None
    taken = {spec.name for spec in specs}
    targets = next((tensors.pop(name) for name in _TARGETS if name in tensors and name not in taken), None)
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
    return SourceData(evaluation=whole.take(list(places[::2])), calibration=whole.take(list(places[1::2])))


def as_known(samples: Samples, labels: Sequence[str], known: Sequence[str]) -> Samples:
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
