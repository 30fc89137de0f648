"""MNIST: 60,000 + 10,000 handwritten digits of 28×28 pixels, read by torchvision."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path

from dlops.errors import CorruptError, from_os_error, missing_package
from dlops.train.data import download
from dlops.train.data.dataset import DataSet, Split, assemble


def load(*, split_seed: int) -> DataSet:
    """Downloaded to data/MNIST/raw on first use. Its own test split; validation is taken off train."""
    try:
        from torchvision.datasets import MNIST
    except ModuleNotFoundError:
        raise missing_package("torchvision", extra="train", needed_for="the data set mnist") from None

    kept = download.DATA_DIR / "MNIST" / "raw"
    # Unpacked anew where nobody else writes: the packed files alone have published digests, and torchvision would
    # take older files that lie beside them, even pickled ones.
    with tempfile.TemporaryDirectory(prefix="dlops-mnist-") as own:
        raw = Path(own) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for file_name, md5 in MNIST.resources:
            urls = [f"{mirror}{file_name}" for mirror in MNIST.mirrors]
            packed = download.fetch(urls, kept / file_name, algorithm="md5", digest=md5)
            _unpack(packed, raw / file_name.removesuffix(".gz"))

        def split(name: str, *, train: bool) -> Split:
            images = MNIST(own, train=train, download=False)
            return Split(
                raw=tuple(images.data.numpy()),
                targets=images.targets.numpy().astype("int64"),
                names=tuple(f"mnist {name}[{i}]" for i in range(len(images.data))),
            )

        return assemble(
            "mnist",
            [str(digit) for digit in range(10)],
            train=split("train", train=True),
            test=split("test", train=False),
            split_seed=split_seed,
        )


def _unpack(packed: Path, into: Path) -> None:
    try:
        with gzip.open(packed) as source, into.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (EOFError, gzip.BadGzipFile) as error:
        raise CorruptError(f"{packed}: {error}", hint="delete it to have it downloaded again") from None
    except OSError as error:
        raise from_os_error(error, doing=f"unpacking {packed}") from error
