"""Triton's classification extension: an output as its strongest classes, in words.

Each is a text, `value:index` or `value:index:label`, on the wire as the protocol's BYTES: its length in four bytes, and
it. https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from dlops.errors import InputError
from dlops.signature import Array, TensorSpec, is_floating

DATATYPE = "BYTES"


def check_classes(spec: TensorSpec, count: object, *, field: str) -> int:
    """The number of classes asked of an output, 0 for its values as they are. Raises InputError."""
    if type(count) is not int or count < 0:
        raise InputError(f"{spec.name}: classification must be a number of classes", field=field)
    dtype = np.dtype(spec.dtype)
    if count and dtype.kind not in "iu" and not is_floating(dtype):
        raise InputError(f"{spec.name}: {spec.dtype} has no strongest classes", field=field)
    return count


def strongest(values: Array, count: int, labels: Sequence[str], *, batched: bool) -> Array:
    """The `count` largest of each row, the largest first, or all where there are fewer: (rows, count) texts.

    batched: the first axis is the batch; else all of it is one row, and the result is (count,).
    """
    rows = values.reshape(len(values) if batched else 1, -1)
    kept = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    texts = np.empty(kept.shape, np.object_)
    form = "{:f}" if is_floating(rows.dtype) else "{:d}"
    for place, index in zip(np.ndindex(kept.shape), kept.reshape(-1).tolist(), strict=True):
        text = f"{form.format(rows[place[0], index].tolist())}:{index}"
        if index < len(labels):
            text += f":{labels[index]}"
        texts[place] = text.encode()
    return texts if batched else texts.reshape(-1)


def to_bytes(texts: Array) -> bytes:
    """A BYTES tensor as it is sent."""
    return b"".join([struct.pack("<I", len(text)) + text for text in texts.reshape(-1).tolist()])
