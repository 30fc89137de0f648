"""Modules are run on copies of their inputs, and one that changes its input is refused: it would change a caller's."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from dlops.blame import last_line, where
from dlops.errors import UsageError
from dlops.signature import Feed, is_floating
from dlops.tensors import to_array, to_tensor


def run_on_copies(module: torch.nn.Module, feed: Feed, *, title: str) -> Any:
    """What the module answers to the feed, which stays as it is. Raises UsageError where it changes an input in place.

    title: of the module, for the message.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    def copies() -> list[torch.Tensor]:
        return [to_tensor(np.array(array, order="C")).to(device) for array in feed.values()]

    tensors = copies()
    with torch.inference_mode():
        result = module(*tensors)
    for (name, array), tensor in zip(feed.items(), tensors, strict=True):
        if not np.array_equal(to_array(tensor.cpu()), array, equal_nan=is_floating(array.dtype)):
            line = _changing_line(module, copies())
            raise UsageError(
                f"{title}: the module changes its input {name} in place{where(line)}",
                hint="compute a new tensor (x = x * 0.5, not x *= 0.5), or begin with x = x.clone()",
            )
    return result


def _changing_line(module: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> str | None:
    watch = _Watch(tensors)
    with torch.no_grad(), watch:
        module(*tensors)
    return watch.line


class _Watch(TorchFunctionMode):
    """Notes the line of the first call that changes one of the tensors, or a view of one."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self.line: str | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = [tensor._version for tensor in self._tensors]
        result = func(*args, **(kwargs or {}))
        if self.line is None and [tensor._version for tensor in self._tensors] != before:
            self.line = last_line((frame.filename, frame.lineno or 0) for frame in traceback.extract_stack())
        return result
