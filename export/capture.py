"""The module as torch.export captures it: dynamic dims with the signature's ranges, and no word of this machine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from dlops.blame import code_line, where
from dlops.checkpoint import example_inputs
from dlops.console import say
from dlops.errors import GateError, UsageError
from dlops.export.formats import EXAMPLE_BATCH, ExportRequest
from dlops.export.narrow import Narrowed
from dlops.runtimes.torchscript import computed_precision
from dlops.signature import DimRange, Signature

_DTYPES: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


def capture(request: ExportRequest, *, device: torch.device) -> ExportedProgram:
    """The module in the precision asked for, its weights on `device`; captured once for a module and a precision.

    Raises UsageError where torch.export cannot take the module, GateError where it would bake in a size.
    """
    precision = request.variant.precision
    if precision == "bf16" and computed_precision("bf16", device) != "bf16":
        say(
            f"WARNING: {request.title}: this CPU has no bfloat16 instructions: it is slower than fp32 here, "
            "and so is this check"
        )
    key = f"program {precision} {device}"
    if key not in request.captured:
        request.captured[key] = _capture(request, _DTYPES[precision], device)
    found: ExportedProgram = request.captured[key]
    return found


def _capture(request: ExportRequest, dtype: torch.dtype | None, device: torch.device) -> ExportedProgram:
    signature = request.signature
    module = Narrowed(request.module, signature, dtype).eval().to(device)
    batch = min(EXAMPLE_BATCH, signature.max_batch)
    example = tuple(tensor.to(device) for tensor in example_inputs(signature, batch=batch))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Retirements inside torch, and what they mean is torch's own affair.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            program = torch.export.export(module, example, dynamic_shapes=(_dynamic(signature),))
    # torch.export raises classes of its own for what it cannot capture, and torch's for what does not run.
    except Exception as error:
        raise UsageError(
            f"{request.title}: torch.export cannot take this module{where(code_line(error))}: {_first_lines(error)}",
            hint="torchscript and onnx take modules in other ways",
        ) from error
    _check_dims(program, signature, request.title)
    _strip(program)
    return program


def _dynamic(signature: Signature) -> tuple[dict[int, Any], ...]:
    # A dim of one size is none for torch.
    dims = {name: _dim(name, limits) for name, limits in signature.dims.items() if limits.min < limits.max}
    return tuple(
        {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and dim in dims}
        for spec in signature.inputs
    )


def _dim(name: str, limits: DimRange) -> Any:
    if limits.step == 1:
        return Dim(name, min=limits.min, max=limits.max)
    return limits.step * Dim(f"{name}_steps", min=limits.min // limits.step, max=limits.max // limits.step)


def _check_dims(program: ExportedProgram, signature: Signature, title: str) -> None:
    """Raise GateError unless every named dim of the inputs is one in the program, with the whole range."""
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    for spec, node in zip(signature.inputs, inputs, strict=True):
        for dim, size in zip(spec.shape, node.meta["val"].shape, strict=True):
            if not isinstance(dim, str) or signature.dims[dim].min == signature.dims[dim].max:
                continue
            limits = signature.dims[dim]
            found = None if isinstance(size, int) else _ends(program, size.node.expr)
            if found is None or not (found[0] <= max(limits.min, 2) and limits.max <= found[1]):
                raise GateError(
                    f"{title}: torch.export would hold {dim} of {spec.name} to {found or size}, and it may be "
                    f"{limits.min} to {limits.max}",
                    hint="a branch or an operator of the module depends on that size",
                )


def _ends(program: ExportedProgram, size: Any) -> tuple[Any, Any] | None:
    """The smallest and the largest value of a size: a symbol of the program, or some multiple of one."""
    symbols = list(size.free_symbols)
    limits = program.range_constraints.get(symbols[0]) if len(symbols) == 1 else None
    return None if limits is None else (size.subs(symbols[0], limits.lower), size.subs(symbols[0], limits.upper))


def _strip(program: ExportedProgram) -> None:
    """Leave out where the module's source lies and what it was captured with."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.meta.clear()
            for node in module.graph.nodes:
                node.meta = {key: value for key, value in node.meta.items() if key == "val"}


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] if lines else type(error).__name__
