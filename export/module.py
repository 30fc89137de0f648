"""What a module must be before it is exported, and what it answers: the eager reference."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from dlops.errors import UsageError
from dlops.runtimes.eager import outputs_by_name
from dlops.signature import Array, Feed, Signature, is_floating
from dlops.tensors import to_tensor
from dlops.unchanged import run_on_copies

_BATCH = 64


def check_module(module: nn.Module, feed: Feed, signature: Signature, *, title: str) -> None:
    """Raise UsageError where the module trains, holds NaN, is random, or does not answer as its signature says."""
    check_state(module, title=title)
    few = {name: array[:2] for name, array in feed.items()}
    try:
        run_on_copies(module, {spec.name: few[spec.name] for spec in signature.inputs}, title=title)
        first, second = (eager_outputs(module, few, signature) for _ in range(2))
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UsageError(f"{title}: the module does not run on the evaluation samples: {error}") from error
    for spec in signature.outputs:
        if first[spec.name].dtype.name != spec.dtype:
            raise UsageError(
                f"{title}: output {spec.name} is {first[spec.name].dtype}, the signature says {spec.dtype}"
            )
        if not np.array_equal(first[spec.name], second[spec.name]):
            raise UsageError(
                f"{title}: {spec.name} differs between two runs on the same input, so no export could be checked",
                hint="draw random numbers in training mode only",
            )


def check_state(module: nn.Module, *, title: str) -> None:
    """Raise UsageError where a part of the module trains or its weights hold NaN."""
    training = [name or "the module itself" for name, part in module.named_modules() if part.training]
    if training:
        raise UsageError(
            f"{title}: {training[0]} is in training mode after eval() (dropout and batch norm would be exported so)",
            hint="do not override train() or eval() to keep a part in training mode",
        )
    tensors = [*module.named_parameters(), *module.named_buffers()]
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UsageError(f"{title}: NaN or infinity in {', '.join(bad[:5])}", hint="the training diverged: train again")


def eager_outputs(module: nn.Module, feed: Feed, signature: Signature) -> dict[str, Array]:
    """What the module answers on all samples, on the CPU, in fp32."""
    inputs = [np.ascontiguousarray(feed[spec.name]) for spec in signature.inputs]
    size = min(_BATCH, signature.max_batch)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(inputs[0]), size):
            tensors = (to_tensor(array[start : start + size]) for array in inputs)
            parts.append(outputs_by_name(module(*tensors), signature))
    return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in signature.outputs}


def float64_outputs(module: nn.Module, feed: Feed, signature: Signature) -> dict[str, Array]:
    """The same of a copy in float64. Raises whatever the module does where it cannot compute so."""
    wide = {name: np.asarray(array, np.float64) if is_floating(array.dtype) else array for name, array in feed.items()}
    return eager_outputs(copy.deepcopy(module).double(), wide, signature)
