"""A module that computes in a narrower float and keeps the dtypes of its signature."""

from __future__ import annotations

import torch
from torch import nn

from dlops.runtimes.eager import ordered_outputs
from dlops.signature import Signature


class Narrowed(nn.Module):
    """The module in `dtype` (as it is where that is None), which takes and gives the dtypes of the signature.

    Its outputs are a tuple in the signature's order, whatever the module returns.
    """

    def __init__(self, module: nn.Module, signature: Signature, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module = module if dtype is None else module.to(dtype)
        self._narrow = dtype
        self._signature = signature
        self._dtypes = [getattr(torch, spec.dtype) for spec in signature.outputs]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._narrow is None:
            return tuple(ordered_outputs(self.module(*inputs), self._signature))
        narrow = (tensor.to(self._narrow) if tensor.is_floating_point() else tensor for tensor in inputs)
        outputs = ordered_outputs(self.module(*narrow), self._signature)
        return tuple(tensor.to(dtype) for tensor, dtype in zip(outputs, self._dtypes, strict=True))
