"""The 1,797 scanned handwritten digits that scikit-learn ships: 8×8 pixels, ten classes, no download."""

from __future__ import annotations

import numpy as np

from dlops.errors import missing_package
from dlops.train.data.dataset import DataSet, Split, assemble


def load(*, split_seed: int) -> DataSet:
    """Test is 20 % of it and validation 15 % of the rest, stratified. The values 0..16 become pixels 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise missing_package("scikit-learn", extra="train", needed_for="the data set digits") from None

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    whole = Split(
        raw=tuple(pixels),
        targets=digits.target.astype(np.int64),
        names=tuple(f"digits[{i}]" for i in range(len(pixels))),
    )
    return assemble("digits", [str(digit) for digit in range(10)], train=whole, split_seed=split_seed)
