"""Pictures and texts in a BYTES tensor, and pixels in a UINT8 one: what the model's own preprocessing makes its input
of.

On the wire each of BYTES is its length in four bytes, little-endian, and itself.
https://github.com/triton-inference-server/server extension_binary_data.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlops.artifact import Artifact
from dlops.errors import InputError
from dlops.serve.classes import DATATYPE

PIXELS = "UINT8"
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RawInput:
    """The input that takes BYTES beside its own datatype. kind: image or text. most: rows of one request. takes_pixels:
    UINT8 of shape [n, height, width] or [n, height, width, 3] too, which its own datatype then is not."""

    name: str
    kind: str
    most: int
    takes_pixels: bool = False

    @classmethod
    def of(cls, artifact: Artifact) -> RawInput | None:
        """None where nothing decodes: the model has several inputs, or its preprocessing begins with numbers."""
        (spec, *others), preprocess = artifact.signature.inputs, artifact.preprocess
        if others or preprocess is None or preprocess.input == "numbers" or not spec.is_batched:
            return None
        return cls(
            name=spec.name, kind=preprocess.input, most=artifact.signature.max_batch,
            takes_pixels=preprocess.input == "image" and spec.dtype != "uint8",
        )  # fmt: skip

    def is_meant(self, *, name: object, datatype: object) -> bool:
        return name == self.name and (datatype == DATATYPE or (self.takes_pixels and datatype == PIXELS))

    def rows(self, shape: tuple[int, ...]) -> int:
        """How many a shape says there are: [n], or [n, 1] as Triton's clients have it. Raises InputError."""
        if len(shape) not in (1, 2) or math.prod(shape[1:]) != 1:
            raise self._error(f"BYTES of shape {list(shape)}, expected [n] or [n, 1], one {self.kind} a row")
        if not 1 <= shape[0] <= self.most:
            raise self._error(f"{shape[0]} rows, one to {self.most} in one request")
        return shape[0]

    def from_binary(self, data: memoryview, shape: tuple[int, ...], datatype: str = DATATYPE) -> list[Any]:
        """Each row's bytes, or its pixels. Raises InputError."""
        if datatype == PIXELS:
            self.check_pixels(shape, len(data))
            return list(np.frombuffer(bytes(data), np.uint8).reshape(shape))
        found, offset = [], 0
        for row in range(self.rows(shape)):
            if offset + _LENGTH_BYTES > len(data):
                raise self._error(f"the bytes end before row {row}")
            size = int.from_bytes(data[offset : offset + _LENGTH_BYTES], "little")
            offset += _LENGTH_BYTES
            if offset + size > len(data):
                raise self._error(f"row {row} is to have {size} bytes, {len(data) - offset} are left")
            found.append(bytes(data[offset : offset + size]))
            offset += size
        if offset != len(data):
            raise self._error(f"{len(data) - offset} bytes follow the last row")
        return found

    def from_json(self, data: object, shape: tuple[int, ...], datatype: str = DATATYPE) -> list[Any]:
        """Texts as they stand in JSON, which has no place for a file, or pixels as numbers. Raises InputError."""
        if datatype == PIXELS:
            return self.from_numbers(data, shape)
        if self.kind != "text":
            raise self._error(f"JSON holds no {self.kind}", hint="send it in binary, or to /predict")
        texts = [text for row in data for text in (row if isinstance(row, list) else [row])] \
            if isinstance(data, list) else []  # fmt: skip
        if len(texts) != self.rows(shape) or not all(isinstance(text, str) for text in texts):
            raise self._error(f"data must be {shape[0]} texts")
        return texts

    def from_numbers(self, numbers: object, shape: tuple[int, ...]) -> list[Any]:
        """Pixels, flat or nested as the shape is. Raises InputError."""
        try:
            found = np.asarray(numbers)
        except (TypeError, ValueError, OverflowError):  # rows of different lengths, say
            raise self._error("data must be whole numbers from 0 to 255") from None
        if found.dtype.kind not in "iu" or not found.size or found.min() < 0 or found.max() > 255:
            raise self._error("data must be whole numbers from 0 to 255")
        self.check_pixels(shape, found.size)
        return list(found.astype(np.uint8).reshape(shape))

    def check_pixels(self, shape: tuple[int, ...], size: int) -> None:
        """Raises InputError where no such number of pixels has this shape."""
        form = "[n, height, width] or [n, height, width, 3]"
        if len(shape) not in (3, 4) or min(shape) < 1 or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise self._error(f"{PIXELS} of shape {list(shape)}, expected {form}")
        if shape[0] > self.most:
            raise self._error(f"{shape[0]} rows, one to {self.most} in one request")
        if math.prod(shape) != size:
            raise self._error(f"{size} values do not have the shape {list(shape)}")

    def from_contents(self, contents: list[bytes], shape: tuple[int, ...]) -> list[bytes]:
        """gRPC's `bytes_contents`. Raises InputError."""
        if len(contents) != self.rows(shape):
            raise self._error(f"{len(contents)} values, shape {list(shape)} takes {shape[0]}")
        return contents

    def _error(self, message: str, *, hint: str | None = None) -> InputError:
        return InputError(f"{self.name}: {message}", field=self.name, hint=hint)
