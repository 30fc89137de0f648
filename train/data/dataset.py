"""What every data set is once it is read: three splits of raw samples, with targets and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlops.errors import InputError, UsageError
from dlops.preprocess import open_image
from dlops.samples import fingerprint
from dlops.signature import Array

# Validation is split off train: a share that a small set can spare, and no more images than early stopping needs.
VALIDATION_FRACTION = 0.15
MAX_VALIDATION = 5_000
# Where a data set names no test split at all.
TEST_FRACTION = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """raw: encoded image bytes, or uint8 pixels (H, W) or (H, W, 3). targets: (n,) class numbers.

    names: where each sample came from, for messages.
    """

    raw: Sequence[bytes | Array]
    targets: NDArray[np.int64]
    names: Sequence[str]

    def __post_init__(self) -> None:
        assert len(self.raw) == len(self.targets) == len(self.names)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Split:
        """The samples at those places, in that order. A lazy `raw` stays lazy."""
        places = [int(i) for i in indices]
        return Split(
            raw=self.raw.take(places) if isinstance(self.raw, Takeable) else tuple(self.raw[i] for i in places),
            targets=self.targets[places],
            names=tuple(self.names[i] for i in places),
        )


class Takeable(Sequence[bytes]):
    """A sequence that reads its items on demand and can be cut without reading them."""

    def take(self, indices: Sequence[int]) -> Takeable:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """name: short, for the checkpoint. duplicates_dropped: samples taken out of train (or validation) because the
    same raw input is in a split that is measured on. unreadable: files that would be samples if they could be read,
    with why they cannot. skipped: those and corrupt images, left out by request.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    duplicates_dropped: int = 0
    unreadable: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 over every raw sample, target and label of the three splits, in order."""
        total = hashlib.sha256("\0".join(self.labels).encode())
        for split in (self.train, self.validation, self.test):
            total.update(split.targets.tobytes())
            for raw in split.raw:
                total.update(bytes.fromhex(fingerprint(raw)))
        return total.hexdigest()


def assemble(
    name: str,
    labels: Sequence[str],
    *,
    train: Split,
    validation: Split | None = None,
    test: Split | None = None,
    split_seed: int,
) -> DataSet:
    """The data set with every split that is missing taken off train, stratified, and no sample in two splits.

    Raises UsageError where there is one class only, or too few samples of a class for a sample in each split.
    """
    if len(labels) < 2:
        only = f" ({labels[0]!r})" if labels else ""
        raise UsageError(f"{name}: {len(labels)} class{only}; a classifier needs two or more")
    _check_enough(name, labels, train, needed=1 + (validation is None) + (test is None))
    if test is None:
        test, train = split_off(train, TEST_FRACTION, seed=split_seed)
    if validation is None:
        fraction = min(VALIDATION_FRACTION, MAX_VALIDATION / len(train))
        validation, train = split_off(train, fraction, seed=split_seed + 1)
    for title, split in (("validation", validation), ("test", test)):
        if not len(split):
            raise UsageError(f"{name}: the {title} split is empty")
    train, validation, dropped = drop_duplicates(train, validation, test)
    _check_enough(name, labels, train, needed=1, after=f" after {dropped} duplicates were dropped" if dropped else "")
    return DataSet(
        name=name, labels=tuple(labels), train=train, validation=validation, test=test, duplicates_dropped=dropped
    )


def split_off(split: Split, fraction: float, *, seed: int) -> tuple[Split, Split]:
    """(taken, rest): that fraction of every class, at least one sample and never all, drawn with `seed`."""
    generator = np.random.default_rng(seed)
    taken = []
    for target in np.unique(split.targets):
        places = np.flatnonzero(split.targets == target)
        count = min(max(1, round(len(places) * fraction)), len(places) - 1)
        taken.append(generator.permutation(places)[:count])
    chosen = np.sort(np.concatenate(taken))
    rest = np.setdiff1d(np.arange(len(split)), chosen)
    return split.take(chosen), split.take(rest)


def drop_duplicates(train: Split, validation: Split, test: Split) -> tuple[Split, Split, int]:
    """(train, validation, how many were dropped): train without what validation or test holds too, validation
    without what test holds too. Same means the same bytes or pixels. What cannot be decoded is no duplicate: it stays,
    to be named as what it is.
    """
    held_out = {fingerprint(raw) for raw in test.raw}
    prints = [fingerprint(raw) for raw in validation.raw]
    keep = [i for i, digest in enumerate(prints) if digest not in held_out or not _decodes(validation.raw[i])]
    if not keep:
        raise UsageError(
            "every validation sample is in the test split too", hint="remove that split: one is then split off train"
        )
    dropped = len(validation) - len(keep)
    held_out |= set(prints)
    kept_train = [i for i, raw in enumerate(train.raw) if fingerprint(raw) not in held_out or not _decodes(raw)]
    dropped += len(train) - len(kept_train)
    return train.take(kept_train), validation.take(keep), dropped


def shown(described: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    return "; ".join(described[:10]) + (f"; and {len(described) - 10} more" if len(described) > 10 else "")


def _decodes(raw: bytes | Array) -> bool:
    if not isinstance(raw, bytes):
        return True
    try:
        open_image(raw, mode="L")
    except InputError:
        return False
    return True


def _check_enough(name: str, labels: Sequence[str], train: Split, *, needed: int, after: str = "") -> None:
    counts = np.bincount(train.targets, minlength=len(labels))
    few = [f"{label!r} has {count}" for label, count in zip(labels, counts, strict=True) if count < needed]
    if few:
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        raise UsageError(
            f"{name}: too few training images per class{after}: {shown}; at least {needed} needed",
            hint="one for each split that is taken off train: add images, or remove the class",
        )
