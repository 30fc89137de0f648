"""Arrays as torch's tensors and back: bfloat16 too, which neither numpy's own types nor torch's conversion have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dlops.signature import BFLOAT16, Array

if TYPE_CHECKING:
    import torch


def to_tensor(array: Array) -> torch.Tensor:
    """A tensor over the array's memory. Raises as torch.from_numpy does."""
    # Here and below: commands that find a mistake of their arguments should not wait for torch.
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: torch.Tensor) -> Array:
    """An array over the memory of a tensor on the CPU, which has no gradient. Raises as its numpy() does."""
    import torch

    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(BFLOAT16)
    array: Array = tensor.numpy()
    return array
