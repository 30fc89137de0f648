"""CIFAR-10 and CIFAR-100 from their binary distribution: fixed-length records, nothing to unpickle.

Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html: one record is the label bytes (coarse and fine in
CIFAR-100, one in CIFAR-10), then 3 × 1,024 pixel bytes, red, green and blue planes of 32×32.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlops.errors import CorruptError
from dlops.train.data import download
from dlops.train.data.dataset import DataSet, Split, assemble

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One archive. label_bytes: before each image; the last of them is the class."""

    name: str
    url: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_names: str
    label_bytes: int


CIFAR10 = Distribution(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    train=tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
    test=("cifar-10-batches-bin/test_batch.bin",),
    label_names="cifar-10-batches-bin/batches.meta.txt",
    label_bytes=1,
)
CIFAR100 = Distribution(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    train=("cifar-100-binary/train.bin",),
    test=("cifar-100-binary/test.bin",),
    label_names="cifar-100-binary/fine_label_names.txt",
    label_bytes=2,
)


def load_cifar10(*, split_seed: int) -> DataSet:
    """50,000 + 10,000 photos of 32×32 pixels in 10 classes."""
    return _load(CIFAR10, split_seed)


def load_cifar100(*, split_seed: int) -> DataSet:
    """50,000 + 10,000 photos of 32×32 pixels in 100 (fine) classes."""
    return _load(CIFAR100, split_seed)


def read_distribution(archive: Path, distribution: Distribution, *, split_seed: int) -> DataSet:
    """The data set in a downloaded archive. Raises CorruptError where it is not that distribution."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            names = _member(tar, distribution.label_names).decode().split()
            splits = {
                "train": [_member(tar, name) for name in distribution.train],
                "test": [_member(tar, name) for name in distribution.test],
            }
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError, KeyError) as error:
        raise CorruptError(f"{archive}: not the {distribution.name} binary distribution ({error})") from None
    train, test = (_split(f"{distribution.name} {name}", chunks, distribution) for name, chunks in splits.items())
    highest = max(int(train.targets.max()), int(test.targets.max()))
    if highest >= len(names):
        raise CorruptError(f"{archive}: label {highest} in it, but only {len(names)} label names")
    return assemble(distribution.name, names, train=train, test=test, split_seed=split_seed)


def _load(distribution: Distribution, split_seed: int) -> DataSet:
    archive = download.fetch(
        [distribution.url],
        download.DATA_DIR / distribution.url.rpartition("/")[2],
        algorithm="md5",
        digest=distribution.md5,
    )
    return read_distribution(archive, distribution, split_seed=split_seed)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def _split(title: str, chunks: list[bytes], distribution: Distribution) -> Split:
    record = distribution.label_bytes + _PIXELS
    content = b"".join(chunks)
    if not content or len(content) % record:
        raise CorruptError(f"{title}: {len(content)} bytes are not whole records of {record}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    planes = records[:, distribution.label_bytes :].reshape(-1, 3, 32, 32)
    pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return Split(
        raw=tuple(pixels),
        targets=records[:, distribution.label_bytes - 1].astype(np.int64),
        names=tuple(f"{title}[{i}]" for i in range(len(pixels))),
    )
