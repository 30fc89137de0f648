"""The zeros of a written file: those that were asked for must be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dlops.errors import GateError

if TYPE_CHECKING:
    import torch

Zero = NDArray[np.bool_]
Notes = dict[str, str | int | float | bool]
# Where integers are unsigned their zero is in the middle: what ConvInteger is written with.
_UNSIGNED_ZERO = 128


def check_zeros(path: Path, form: str, masks: Mapping[str, torch.Tensor], *, title: str) -> Notes:
    """How many weights and zeros the file has in the layers of `masks` (True where a weight stays).

    Raises GateError, naming the layer, unless for each mask the file holds a tensor that is zero wherever the mask is.
    """
    found = [zero for zero in FORMATS[form](path) if zero.ndim > 1]
    weights = zeros = 0
    for name, mask in masks.items():
        wanted = ~mask.cpu().numpy()
        fitting = [
            (int(laid.sum()), place)
            for place, zero in enumerate(found)
            for laid in _layouts(zero, wanted)
            if not (wanted & ~laid).any()
        ]
        if not fitting:
            raise GateError(
                f"{title}: {int(wanted.sum())} of the {wanted.size} weights of {name} were set to zero, and no tensor "
                "in the written file has them",
                hint="this is a defect of the exporter: report it with the model's type and the variant",
            )
        # The one with the fewest zeros: a layer that is zero throughout would pass for any other of its shape.
        count, place = min(fitting)
        del found[place]
        weights, zeros = weights + wanted.size, zeros + count
    return {"sparse_weights": weights, "sparse_zeros": zeros}


def _layouts(zero: Zero, wanted: Zero) -> Iterator[Zero]:
    """As it lies there, and the other way round: a linear layer may be a product with the transposed weight."""
    if zero.shape == wanted.shape:
        yield zero
    if zero.ndim == 2 and zero.T.shape == wanted.shape:
        yield zero.T


def _of_onnx(path: Path) -> Iterator[Zero]:
    import onnx
    from onnx import numpy_helper

    for tensor in onnx.load(path).graph.initializer:
        values = numpy_helper.to_array(tensor)
        # numpy has no letter for fp8.
        if values.dtype.kind in "fiu" or tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN:
            yield values == (_UNSIGNED_ZERO if values.dtype == np.uint8 else 0)


def _of_torchscript(path: Path) -> Iterator[Zero]:
    from dlops.export.to_torchscript import stored_tensors

    for tensor in stored_tensors(path):
        yield (tensor == 0).numpy()


# Of a TensorRT engine it is the graph that it was built from.
FORMATS: Mapping[str, Callable[[Path], Iterator[Zero]]] = {
    "onnx": _of_onnx, "torchscript": _of_torchscript, "tensorrt": _of_onnx,
}  # fmt: skip
