"""Your own images: a folder or a .tar.gz of class folders.

    <class>/...                     train, validation and test are split off, stratified and seeded
    train/<class>/...  test/ or val/    that second split is the test split; validation is taken off train
    train/<class>/...  val/  test/      used as they are

One folder around all of it is fine. A file whose name does not end like an image's is passed over and counted. One that
does but cannot be read (a broken link, a pipe, no permission) is no sample, and the data set says so.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import overload

import numpy as np

from dlops.console import say
from dlops.errors import UsageError, from_os_error
from dlops.train.data import archive
from dlops.train.data.dataset import DataSet, Split, Takeable, assemble, shown

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff")
)
_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_EMPTY = "an empty file"
_LAYOUT = "expected <class>/IMAGE, or train/<class>/IMAGE beside test/ or val/"


class Files(Takeable):
    """Image files, read one at a time when asked for, so that a folder may be larger than the memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> bytes | Files:
        if isinstance(index, slice):
            return Files(self._paths[index])
        path = self._paths[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise from_os_error(error, doing=f"reading {path}") from error

    def take(self, indices: Sequence[int]) -> Files:
        return Files([self._paths[i] for i in indices])


@dataclass(frozen=True, slots=True)
class _Found:
    """One image: its parts below the data set's root, without the split; and where it is in `raw`."""

    split: str
    label: str
    place: int


def load_folder(path: Path, *, split_seed: int) -> DataSet:
    """The data set in a folder or an archive (.tar.gz, .tgz, .tar). Raises UsageError where it is none."""
    names: list[str]
    raw: Sequence[bytes]
    unreadable: dict[int, str] = {}
    if path.is_dir():
        names = _walk(path)
        raw = Files([path / name for name in names])
        unreadable = {i: problem for i, name in enumerate(names) if (problem := _problem(path / name))}
    elif path.is_file():
        names, raw = archive.read_images(path, suffixes=IMAGE_SUFFIXES)
        unreadable = {i: _EMPTY for i, content in enumerate(raw) if not content}
    else:
        raise UsageError(f"{path}: no such data set, folder or archive")
    if not names:
        raise UsageError(f"{path}: no image in it", hint=_LAYOUT)
    _check_names(path, names)
    found = _arrange(path, names)
    labels = _ordered({image.label for image in found if image.split == "train"})
    number = {label: i for i, label in enumerate(labels)}
    splits: dict[str, list[_Found]] = defaultdict(list)
    for image in found:
        if image.label not in number:
            raise UsageError(f"{path}: the class {image.label!r} is in {image.split} but not in train")
        if image.place not in unreadable:
            splits[image.split].append(image)
    if "test" not in splits and "validation" in splits:
        # Two splits only: the second is what results are reported on, so nothing may be tuned on it.
        splits["test"] = splits.pop("validation")

    def split(name: str) -> Split | None:
        chosen = splits.get(name)
        if chosen is None:
            return None
        places = [image.place for image in chosen]
        return Split(
            raw=raw.take(places) if isinstance(raw, Takeable) else tuple(raw[i] for i in places),
            targets=np.array([number[image.label] for image in chosen], dtype=np.int64),
            names=tuple(names[i] for i in places),
        )

    described = tuple(f"{names[place]} ({problem})" for place, problem in unreadable.items())
    train = split("train")
    if train is None:
        raise UsageError(f"{path}: no training image in it can be read: {', '.join(described[:3])}")
    try:
        data = assemble(
            _title(path), labels, train=train, validation=split("validation"), test=split("test"), split_seed=split_seed
        )
    except UsageError as error:
        if not described:
            raise
        raise UsageError(
            f"{error.message}; {len(described)} of its images cannot be read: {shown(described)}",
            hint=error.hint,
        ) from None
    return replace(data, unreadable=described)


def _walk(root: Path) -> list[str]:
    """What ends like an image below `root`, links followed. Raises UsageError where they lead into a loop."""
    names, passed_over = [], 0
    visited: dict[tuple[int, int], str] = {}

    def refuse(error: OSError) -> None:
        raise from_os_error(error, doing=f"reading {root}") from error

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        found = Path(folder).stat()
        here = (found.st_dev, found.st_ino)
        if here in visited:
            raise UsageError(
                f"{folder}: the same folder as {visited[here]}",
                hint="remove that link, or its images would count twice",
            )
        visited[here] = folder
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for file in sorted(files):
            relative = (Path(folder) / file).relative_to(root).as_posix()
            if is_hidden(file):
                continue
            if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES:
                names.append(relative)
            else:
                passed_over += 1
    if passed_over:
        say(f"{root}: {passed_over} files are not images by their names and were passed over")
    return names


def _problem(path: Path) -> str | None:
    """Why a file cannot be read, None where it can. A pipe is not opened: that would wait for its writer."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "neither a file nor a folder"
        with path.open("rb") as file:
            # Alike as they are, they would else be taken for duplicates of one another.
            if not file.read(1):
                return _EMPTY
    except FileNotFoundError:
        return "a link to nowhere"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise UsageError for a name that is not text: it could be neither a label nor printed."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{path}: the name {os.fsencode(name)!r} is not UTF-8", hint="rename it") from None


def is_hidden(part: str) -> bool:
    """What file managers and archivers leave behind."""
    return part.startswith(".") or part == "__MACOSX"


def _arrange(path: Path, names: Sequence[str]) -> list[_Found]:
    """Split and class of every image, from its path."""
    parts = [PurePosixPath(name).parts for name in names]
    depth = 0
    # Folders around the whole of it: down to the first level where there is a choice, or a split.
    while all(len(p) > depth + 2 for p in parts) and len({p[depth] for p in parts}) == 1:
        if parts[0][depth].lower() in _SPLIT_NAMES:
            break
        depth += 1
    tops = {p[depth] for p in parts}
    splits = {top for top in tops if top.lower() in _SPLIT_NAMES}
    if splits and any(_SPLIT_NAMES[top.lower()] == "train" for top in splits):
        if other := tops - splits:
            raise UsageError(f"{path}: {', '.join(sorted(other)[:5])} beside {', '.join(sorted(splits))}", hint=_LAYOUT)
        within = depth + 1
    elif splits and splits == tops:
        raise UsageError(f"{path}: {', '.join(sorted(splits))} but no train", hint=_LAYOUT)
    else:
        splits, within = set(), depth
    stray = [name for name, p in zip(names, parts, strict=True) if len(p) < within + 2]
    if stray:
        raise UsageError(
            f"{path}: {len(stray)} images are in no class folder ({', '.join(itertools.islice(stray, 3))})",
            hint=_LAYOUT,
        )
    return [_Found(_SPLIT_NAMES[p[depth].lower()] if splits else "train", p[within], i) for i, p in enumerate(parts)]


def _ordered(labels: set[str]) -> list[str]:
    """Alphabetical, numbers by value: the order is part of the model, so it must not depend on the file system."""
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _title(path: Path) -> str:
    """The file or folder name as a checkpoint may be called."""
    name = path.resolve().name
    for suffix in (".tar.gz", ".tgz", ".tar"):
        name = name.removesuffix(suffix)
    cleaned = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip("._-")
    return cleaned[:60] or "images"
