"""TorchScript: the module traced, frozen, and stripped of its source locations."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch

from dlops.checkpoint import example_inputs
from dlops.embedded import EXTRA_FILE
from dlops.errors import GateError, UsageError
from dlops.export.formats import EXAMPLE_BATCH, Exported, ExportRequest, check_embedded
from dlops.runtimes.eager import outputs_by_name
from dlops.signature import Signature

# Beside each source file: pickled locations of the code that was traced, absolute paths of this machine among them.
_DEBUG_SUFFIX = ".debug_pkl"
_TracerWarning: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]
# What the writer adds by itself.
_WRITTEN_BY_TORCH = ("version", ".data/serialization_id", "byteorder", ".data/version")


def export(request: ExportRequest) -> Exported:
    """Write the traced module to `request.into`; reopened, it must run at other batches than it was traced with.

    Raises UsageError where the module cannot be traced, GateError where tracing would bake in a branch or a size, or
    where the written file differs from the request.
    """
    traced = _trace(request)
    # Into memory: torch's writer ends the process where a disk is full (an exception thrown while it is destroyed).
    buffer = io.BytesIO()
    extra = {EXTRA_FILE: request.embedded.to_json()} if request.embedded is not None else {}
    with _without_retirement_notices():
        torch.jit.save(traced, buffer, _extra_files=extra)
    request.into.write_bytes(without_debug_files(buffer.getvalue()))
    check_written(request.into, request.signature, title=request.title)
    check_embedded(request)
    return Exported(path=request.into, notes={"torchscript": "traced and frozen", "torch": torch.__version__})


def check_written(path: Path, signature: Signature, *, title: str) -> None:
    """Raise GateError unless the file takes the signature's inputs and gives its outputs, at several batches.

    Its tensors have no names: inputs and outputs are matched by their place, and by number, shape and dtype.
    """
    with _without_retirement_notices():
        module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    taken = len(module.forward.schema.arguments) - 1  # the first is the module itself
    if taken != len(signature.inputs):
        raise GateError(f"{title}: the written file takes {taken} inputs, the signature has {len(signature.inputs)}")
    for batch in sorted({1, 2, EXAMPLE_BATCH + 2}):
        feed = example_inputs(signature, batch=batch)
        try:
            with torch.inference_mode():
                outputs = outputs_by_name(module(*feed), signature)
        except (RuntimeError, ValueError) as error:
            raise GateError(f"{title}: the written file does not run at batch {batch}: {_first_line(error)}") from error
        for spec in signature.outputs:
            array = outputs[spec.name]
            wanted = (spec.dtype, tuple(batch if dim == "batch" else dim for dim in spec.shape))
            if not _fits(array, *wanted):
                raise GateError(
                    f"{title}: output {spec.name} at batch {batch} is {array.dtype}{list(array.shape)}, "
                    f"asked for was {spec.dtype}{list(wanted[1])}"
                )


def without_debug_files(content: bytes) -> bytes:
    """A TorchScript file without its source locations, its records aligned as torch.jit.load wants them."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    del reader
    # torch's own writer aligns the tensors to 64 bytes.
    stripped = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stripped)
    for name, content in records.items():
        if not name.endswith(_DEBUG_SUFFIX) and name not in _WRITTEN_BY_TORCH:
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return stripped.getvalue()


def _trace(request: ExportRequest) -> torch.jit.ScriptModule:
    example = example_inputs(request.signature, batch=EXAMPLE_BATCH)
    try:
        # Recorded and not raised: raised inside torch's C code a warning comes out as a SystemError.
        with warnings.catch_warnings(record=True) as recorded, torch.no_grad():
            warnings.simplefilter("always")
            # The parity gate compares with eager on real inputs at several batches, which torch's own check does not.
            traced = torch.jit.trace(request.module, example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
            frozen: torch.jit.ScriptModule = torch.jit.freeze(traced)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{request.title}: torch.jit.trace cannot take this module: {_first_line(error)}") from error
    baked = next((entry.message for entry in recorded if issubclass(entry.category, _TracerWarning)), None)
    if baked is not None:
        raise GateError(
            f"{request.title}: tracing would bake in what should depend on the input: {_first_line(Warning(baked))}",
            hint="rewrite that branch with tensor operations (torch.where), or export to onnx",
        )
    return frozen


def _fits(array: np.ndarray, dtype: str, shape: tuple[int | str, ...]) -> bool:
    return (
        array.dtype.name == dtype
        and array.ndim == len(shape)
        and all(isinstance(dim, str) or size == dim for size, dim in zip(array.shape, shape, strict=True))
    )


class _without_retirement_notices(warnings.catch_warnings):  # noqa: N801 - used like the function it extends
    """torch announces TorchScript's retirement at every call; the format was the user's choice."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
