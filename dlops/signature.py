"""What a model takes and gives: named tensors with dtypes and symbolic dims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dlops.errors import InputError
from dlops.manifest import Record

DType = Literal[
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
    "uint8", "bool",
]  # fmt: skip
# numpy has it from ml_dtypes, by its name too.
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Array = NDArray[np.generic]
Feed = Mapping[str, NDArray[np.generic]]
"""Tensor name to array: what goes into a model and what comes out."""


def is_floating(dtype: np.dtype[np.generic]) -> bool:
    """Whether numbers of it have fractions, NaN and infinity. numpy's own `kind` takes bfloat16 for bytes."""
    return dtype.kind == "f" or dtype == BFLOAT16


class TensorSpec(Record):
    """shape: ints, and names of dims whose size is the caller's, such as "batch"."""

    name: str = Field(min_length=1, max_length=200)
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)], ...]

    @property
    def is_batched(self) -> bool:
        return bool(self.shape) and self.shape[0] == "batch"


class DimRange(Record):
    """Sizes that a named dim may take: from min to max, both included, by steps."""

    min: int = Field(1, ge=1)
    max: int = Field(ge=1)
    step: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> DimRange:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        if (self.max - self.min) % self.step or self.min % self.step:
            raise ValueError(f"{self.min} and {self.max} are not whole steps of {self.step}")
        return self


class Signature(Record):
    """Inputs, outputs, and the range of every named dim."""

    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    dims: dict[str, DimRange] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Signature:
        specs = [*self.inputs, *self.outputs]
        for group in (self.inputs, self.outputs):
            names = [spec.name for spec in group]
            if len(set(names)) != len(names):
                raise ValueError(f"tensor names repeat: {', '.join(names)}")
        unknown = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)} - set(self.dims)
        if unknown:
            raise ValueError(f"named dims without a range: {', '.join(sorted(unknown))}")
        return self

    @property
    def max_batch(self) -> int:
        """The largest batch, 1 where there is no batch axis."""
        return self.dims["batch"].max if "batch" in self.dims else 1

    def is_free(self, dim: str) -> bool:
        """Whether a named dim may take more than one size."""
        return self.dims[dim].min < self.dims[dim].max

    def declared(self, spec: TensorSpec) -> tuple[int | str, ...]:
        """A tensor's shape as a file declares it: a named dim of one size is that size."""
        return tuple(
            self.dims[dim].min if isinstance(dim, str) and not self.is_free(dim) else dim for dim in spec.shape
        )

    def check(self, feed: Feed, *, finite: bool = True) -> None:
        """Raise InputError, naming the tensor, unless `feed` fits the inputs exactly. finite: and every float is so."""
        wanted = {spec.name for spec in self.inputs}
        for name in sorted(set(feed) - wanted):
            raise InputError(f"unknown input {name!r}", field=name, hint=f"the model takes {', '.join(sorted(wanted))}")
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            if spec.name not in feed:
                raise InputError(f"input {spec.name!r} is missing", field=spec.name)
            self._check_tensor(spec, feed[spec.name], sizes)
            if finite and is_floating(feed[spec.name].dtype) and not np.isfinite(feed[spec.name]).all():
                raise InputError(f"{spec.name}: NaN or infinity in it", field=spec.name)

    def check_shape(self, spec: TensorSpec, shape: Sequence[int]) -> None:
        """Raise InputError unless the shape fits one of the inputs; sizes may be any whole numbers."""
        expected = f"[{', '.join(str(dim) for dim in spec.shape)}]"
        if len(shape) != len(spec.shape):
            raise InputError(f"{spec.name}: shape {list(shape)}, expected {expected}", field=spec.name)
        for size, dim in zip(shape, spec.shape, strict=True):
            if isinstance(dim, int):
                if size != dim:
                    raise InputError(f"{spec.name}: shape {list(shape)}, expected {expected}", field=spec.name)
                continue
            limits = self.dims[dim]
            if not limits.min <= size <= limits.max:
                raise InputError(
                    f"{spec.name}: {dim} is {size}, allowed is {limits.min} to {limits.max}", field=spec.name
                )
            if size % limits.step:
                raise InputError(
                    f"{spec.name}: {dim} is {size}, allowed are multiples of {limits.step}", field=spec.name
                )

    def _check_tensor(self, spec: TensorSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
        if array.dtype != np.dtype(spec.dtype):
            swapped = array.dtype.name == spec.dtype
            found = f"{array.dtype.name} in foreign byte order" if swapped else array.dtype.name
            raise InputError(f"{spec.name}: dtype {found}, expected {spec.dtype}", field=spec.name)
        self.check_shape(spec, array.shape)
        for size, dim in zip(array.shape, spec.shape, strict=True):
            if isinstance(dim, str):
                earlier, where = sizes.setdefault(dim, (size, spec.name))
                if earlier != size:
                    raise InputError(f"{spec.name}: {dim} is {size}, but {earlier} in {where}", field=spec.name)
