"""torch.export: the captured program as a .pt2 file, which needs no trust to be read by dlops."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import torch

from dlops.checkpoint import example_inputs
from dlops.embedded import EXTRA_FILE
from dlops.errors import GateError
from dlops.export.capture import capture
from dlops.export.formats import EXAMPLE_BATCH, Exported, ExportRequest, check_embedded
from dlops.export.precision import MIN_SHARE
from dlops.program import Program, read_program
from dlops.runtimes.eager import outputs_by_name
from dlops.signature import Signature

_STORED = {"fp32": (torch.float32, torch.float64), "bf16": (torch.bfloat16,)}


def export(request: ExportRequest) -> Exported:
    """Write the program to `request.into`; read again, without unpickling, it must run at other batches.

    Raises UsageError where torch.export cannot take the module or it has an operator that dlops does not read back,
    GateError where the written file differs from the request.
    """
    program = capture(request, device=torch.device("cpu"))
    # Into memory: torch's writer ends the process where a disk is full.
    buffer = io.BytesIO()
    # They would be in the file, pickled.
    program.example_inputs = None
    extra = {EXTRA_FILE: request.embedded.to_json()} if request.embedded is not None else {}
    torch.export.save(program, buffer, extra_files=extra)
    request.into.write_bytes(buffer.getvalue())
    check_written(request.into, request.signature, precision=request.variant.precision, title=request.title)
    check_embedded(request)
    return Exported(path=request.into, notes={"torch": torch.__version__})


def check_written(path: Path, signature: Signature, *, precision: str, title: str) -> None:
    """Raise GateError unless the file takes the signature's inputs and gives its outputs, at several batches.

    90 % of its weights must be stored in `precision`. Raises UsageError where it cannot be read without unpickling.
    """
    program = read_program(path)
    for spec, found in zip(signature.inputs, program.inputs, strict=False):
        if str(found.dtype) != f"torch.{spec.dtype}" or len(found.shape) != len(spec.shape):
            raise GateError(
                f"{title}: input {spec.name} is {found.dtype} of {len(found.shape)} dims in the written file"
            )
    if len(program.inputs) != len(signature.inputs):
        raise GateError(
            f"{title}: the written file takes {len(program.inputs)} inputs, the signature has {len(signature.inputs)}"
        )
    for batch in sorted({1, 2, EXAMPLE_BATCH + 2} & set(range(1, signature.max_batch + 1))):
        try:
            with torch.inference_mode():
                outputs = outputs_by_name(program.module(*example_inputs(signature, batch=batch)), signature)
        except (RuntimeError, ValueError) as error:
            raise GateError(f"{title}: the written file does not run at batch {batch}: {error}") from error
        for spec in signature.outputs:
            array, shape = outputs[spec.name], [batch if dim == "batch" else dim for dim in spec.shape]
            known = all(isinstance(dim, str) or size == dim for size, dim in zip(array.shape, shape, strict=False))
            if array.dtype.name != spec.dtype or array.ndim != len(shape) or not known:
                raise GateError(
                    f"{title}: output {spec.name} at batch {batch} is {array.dtype}{list(array.shape)}, "
                    f"asked for was {spec.dtype}{shape}"
                )
    _check_precision(program, precision, title=title)


def _check_precision(program: Program, precision: str, *, title: str) -> None:
    weights: Counter[torch.dtype] = Counter()
    for tensor in program.module.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim:
            weights[tensor.dtype] += tensor.numel()
    total, kept = weights.total(), sum(weights[dtype] for dtype in _STORED[precision])
    if not total and precision != "fp32":
        raise GateError(f"{title}: {precision} was asked for, the written file holds no weights")
    if kept < MIN_SHARE * total:
        raise GateError(
            f"{title}: {precision} was asked for, {kept / total:.0%} of the weights in the written file are in it",
            hint="take torchexport-fp32",
        )
